"""Each law about tables that processes share catches a buffer that breaks it. Other processes import them from here."""

import secrets
import threading
from pathlib import Path

import pytest
import torch

from kvconnect.buffers.arena import decode, encode
from kvconnect.buffers.base import BufferTraits, LookupBuffer
from kvconnect.buffers.memory import MemoryBuffer
from kvconnect.testing import shared_laws


class FolderBuffer(LookupBuffer):
    """Three methods over a folder, where renaming decides who has a file."""

    traits = BufferTraits(shared=True)

    def __init__(self, path):
        self.folder = Path(path)

    def insert(self, key, kv):
        draft = self.folder / secrets.token_hex(8)
        draft.write_bytes(torch.cat([piece.reshape(-1) for piece in encode(kv)]).numpy().tobytes())
        draft.rename(self._file(key))

    def drop_select(self, key):
        mine = self.folder / secrets.token_hex(8)
        try:
            self._file(key).rename(mine)
        except FileNotFoundError:
            return None
        return self._read(mine)

    def close(self):
        pass

    def _file(self, key):
        return self.folder / f"{key.namespace}-{key.digest.hex()}-{key.length}"

    def _read(self, file):
        stream = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        file.unlink()
        return decode(stream)


class ReadsAndThenDrops(FolderBuffer):
    """With a lock for this process alone."""

    lock = threading.Lock()

    def drop_select(self, key):
        with self.lock:
            try:
                stream = bytearray(self._file(key).read_bytes())
            except FileNotFoundError:
                return None
            threading.Event().wait(0.02)
            self._file(key).unlink(missing_ok=True)
        return decode(torch.frombuffer(stream, dtype=torch.uint8))


class IsShortOfWhatOthersInsert(MemoryBuffer):
    traits = BufferTraits(bounded=True, expires=True, joins=True, shared=True)

    def __init__(self, path):
        super().__init__()


class KeepsToItselfThatItIsShared(FolderBuffer):
    traits = BufferTraits()


CAUGHT = [
    (IsShortOfWhatOthersInsert, shared_laws.what_one_process_inserts_another_takes),
    (ReadsAndThenDrops, shared_laws.racing_processes_share_nothing),
    (KeepsToItselfThatItIsShared, shared_laws.what_is_not_shared_stays_in_its_process),
]


@pytest.mark.parametrize(("broken", "law"), CAUGHT, ids=lambda value: value.__name__)
def test_the_law_catches(broken, law, tmp_path):
    with pytest.raises(AssertionError):
        law(broken, {"path": str(tmp_path)})


@pytest.mark.parametrize("law", shared_laws.LAWS, ids=lambda law: law.__name__)
def test_a_folder_keeps_it(law, tmp_path):
    law(FolderBuffer, {"path": str(tmp_path)})


def test_every_law_is_caught_breaking_by_some_buffer():
    assert {law for _, law in CAUGHT} == {*shared_laws.LAWS, shared_laws.what_is_not_shared_stays_in_its_process}
