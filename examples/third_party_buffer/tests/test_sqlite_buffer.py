import itertools

import pytest
from sqlite_buffer import SqliteBuffer

from kvconnect.testing.buffer_laws import Ends
from kvconnect.testing.buffer_tests import BufferTests


class TestOneConnection(BufferTests):
    @pytest.fixture(autouse=True)
    def _files(self, tmp_path):
        self.files = (str(tmp_path / f"{number}.db") for number in itertools.count())

    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = SqliteBuffer(next(self.files))
        return Ends(put=buffer, take=buffer)

    def shared_options(self):
        return {"path": next(self.files)}


class TestTwoConnectionsToOneFile(TestOneConnection):
    def open_ends(self, *, policy, ttl_s, wait_s):
        file = next(self.files)
        return Ends(put=SqliteBuffer(file), take=SqliteBuffer(file))
