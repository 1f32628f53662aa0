from kvconnect.buffers.memory import MemoryBuffer
from kvconnect.testing.buffer_laws import ROOM_BYTES, Ends
from kvconnect.testing.buffer_tests import BufferTests


class TestMemoryBuffer(BufferTests):
    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = MemoryBuffer(ROOM_BYTES, policy, ttl_s, wait_s)
        return Ends(buffer, buffer)
