"""`FilesystemBuffer`: entries as files of one directory, which any number of engines share.

An entry is a directory, whose renaming is every decision: ``draft.<id>`` while it is
written, ``<name>`` while it is offered, ``<name>.<grant>`` while somebody has it,
``gone.<id>`` while it is deleted. A rename happens once or not at all, so of all takers
one wins and nobody sees half of an entry. Nothing is synced to disk: after a crash of
the host a checksum fails and the prompt is computed, which is what a cache is for.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from kvconnect.buffers.store import MAX_MANIFEST_BYTES, Found, Store, Stored, StoreOptions
from kvconnect.buffers.store_table import StoreBuffer
from kvconnect.config import PATH
from kvconnect.errors import BrokenError, BufferFullError, ConfigError, KVConnectError, LoadError

logger = logging.getLogger(__name__)

_OFFERED: Final = re.compile(r"[0-9a-f]{32}")
_TAKEN: Final = re.compile(r"([0-9a-f]{32})\.[0-9a-f]+")
_MANIFEST: Final = "manifest"
#: Neither through a link nor waiting for whoever would open the other end of a pipe.
_HERE: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_THERE_IS_ONE: Final = (errno.ENOTEMPTY, errno.EEXIST)
#: A file or a link in an entry's place is no entry, a pipe in a file's is no file.
_THERE_IS_NONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)
#: Drafts this old have been left behind; what is being deleted, too.
_LEFT_BEHIND_S: Final = 900.0


@dataclass(frozen=True, kw_only=True)
class FilesystemOptions(StoreOptions):
    """Options of the buffer ``filesystem``.

    Args:
        path: the directory; it is made, for its owner only, if it is not there. Engines of several
            hosts may share it if its filesystem renames directories atomically, as NFS does, and
            their clocks differ by much less than ``lease_s``.

    """

    path: str = ""

    def __post_init__(self) -> None:
        """Check; raise `ConfigError`."""
        super().__post_init__()
        if not self.path:
            raise ConfigError(f"{PATH}.buffer.path is missing: name the directory that the engines share")


class FilesystemStore(Store):
    """A directory. See the module."""

    def __init__(self, path: str) -> None:
        """Open the directory, or make it.

        Raises:
            ConfigError: it cannot be made, or it is not one that we can write to.

        """
        try:
            Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
            # Everything is done relative to this: nobody who puts a link in its place leads us elsewhere.
            self._root: int | None = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"{PATH}.buffer.path {path!r} cannot be used: {error.strerror}") from error
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            self.close()
            raise ConfigError(f"{PATH}.buffer.path {path!r} cannot be used: this process may not write to it")
        mode = os.fstat(self._open_root()).st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            logger.warning(
                "%s.buffer.path %s is open to other users (mode %o): whoever writes there can put other KV in its "
                "place; chmod 700 it",
                *(PATH, path, mode & 0o777),
            )

    # -- writing --------------------------------------------------------------------

    def put(self, draft: str, part: int, offset: int, data: memoryview) -> None:
        """Write a chunk. See `Store.put`."""
        self._write(draft, str(part), offset, data)

    def publish(self, draft: str, name: str, manifest: bytes, *, nbytes: int, replace: bool) -> bool:
        """Rename a draft. See `Store.publish`."""
        self._write(draft, _MANIFEST, 0, memoryview(manifest))
        try:
            if self._look_at(f"draft.{draft}", name, taken=False).nbytes != nbytes + len(manifest):
                raise BrokenError("the draft was deleted while it was written")
            while not self._rename(f"draft.{draft}", name):
                if not replace:
                    self.discard(draft)
                    return False
                self.drop(name)
        except FileNotFoundError as error:
            raise BrokenError("the draft was deleted, or something that is no entry lies in its place") from error
        return True

    def discard(self, draft: str) -> None:
        """Delete a draft. See `Store.discard`."""
        self._delete(f"draft.{draft}")

    # -- reading --------------------------------------------------------------------

    def find(self, name: str) -> Found | None:
        """Read a manifest. See `Store.find`."""
        return self._read_manifest(name)

    def take(self, name: str, grant: str, lease_s: float) -> Found | None:
        """Rename an entry, if it is still there. See `Store.take`."""
        place = f"{name}.{grant}"
        # Before it is ours, so that nobody ever sees it taken and its lease over.
        if not self._expire_in(name, lease_s) or not self._moved(name, place):
            return None
        return self._read_manifest(place)

    def get(self, place: str, part: int, offset: int, into: memoryview) -> None:
        """Read a chunk. See `Store.get`."""
        try:
            with _mapped(), self._file(place, str(part), os.O_RDONLY) as fd:
                while into:
                    done = os.preadv(fd, [into], offset)
                    if not done:
                        raise LoadError(f"part {part} of the entry is cut off at byte {offset}")
                    into, offset = into[done:], offset + done
        except FileNotFoundError as error:
            raise LoadError("the entry is gone") from error

    def renew(self, name: str, grant: str, lease_s: float) -> bool:
        """Put the end of a lease off. See `Store.renew`."""
        return self._expire_in(f"{name}.{grant}", lease_s)

    def give_back(self, name: str, grant: str) -> None:
        """Rename an entry back. See `Store.give_back`."""
        self._offer_again(f"{name}.{grant}", name)

    # -- keeping --------------------------------------------------------------------

    def drop(self, name: str, grant: str | None = None) -> bool:
        """Delete an entry. See `Store.drop`."""
        return self._delete(name if grant is None else f"{name}.{grant}")

    def touch(self, name: str) -> None:
        """Set the manifest's time of access. See `Store.touch`."""
        with contextlib.suppress(FileNotFoundError), _mapped(), self._file(name, _MANIFEST, os.O_RDONLY) as fd:
            os.utime(fd, ns=(time.time_ns(), os.fstat(fd).st_mtime_ns))

    def entries(self) -> list[Stored]:
        """List the directory. See `Store.entries`."""
        found = []
        for place in self._places():
            taken = _TAKEN.fullmatch(place)
            if taken or _OFFERED.fullmatch(place):
                with contextlib.suppress(FileNotFoundError):  # taken or dropped meanwhile
                    found.append(self._look_at(place, taken[1] if taken else place, taken=taken is not None))
        return found

    def mend(self) -> None:
        """Offer again what takers left behind, delete what writers did. See `Store.mend`."""
        now = time.time()
        for place in self._places():
            taken = _TAKEN.fullmatch(place)
            with contextlib.suppress(FileNotFoundError), _mapped():
                changed = os.stat(place, dir_fd=self._open_root(), follow_symlinks=False).st_mtime
                if taken and changed < now:
                    self._offer_again(place, taken[1])
                elif place.startswith(("draft.", "gone.")) and changed + _LEFT_BEHIND_S < now:
                    self._delete(place)

    def close(self) -> None:
        """Let go of the directory."""
        root, self._root = self._root, None
        if root is not None:
            os.close(root)

    # -- inside -----------------------------------------------------------------------

    def _open_root(self) -> int:
        if self._root is None:
            raise BrokenError("the store was closed")
        return self._root

    def _places(self) -> list[str]:
        with _mapped(), os.scandir(self._open_root()) as found:
            return [each.name for each in found]

    def _write(self, draft: str, file: str, offset: int, data: memoryview) -> None:
        place = f"draft.{draft}"
        try:
            with _mapped(), contextlib.suppress(FileExistsError):
                os.mkdir(place, 0o700, dir_fd=self._open_root())
            with _mapped(), self._file(place, file, os.O_WRONLY | os.O_CREAT) as fd:
                while data:
                    done = os.pwrite(fd, data, offset)
                    data, offset = data[done:], offset + done
        except FileNotFoundError as error:
            raise BrokenError("the draft was deleted while it was written") from error

    @contextlib.contextmanager
    def _file(self, place: str, name: str, flags: int) -> Iterator[int]:
        """Open a file of an entry, through no link."""
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | _HERE, dir_fd=self._open_root())
        try:
            fd = os.open(name, flags | _HERE, 0o600, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, "it is no file", name)
            yield fd
        finally:
            os.close(fd)

    def _rename(self, old: str, new: str) -> bool:
        """Rename an entry; ``False`` if there is one under the new name. Raises ``FileNotFoundError``."""
        root = self._open_root()
        try:
            with _mapped():
                os.rename(old, new, src_dir_fd=root, dst_dir_fd=root)
        except FileExistsError:
            return False
        return True

    def _moved(self, old: str, new: str) -> bool:
        """Rename to a name that nobody else uses; ``False`` if somebody was faster."""
        try:
            return self._rename(old, new)
        except FileNotFoundError:
            return False

    def _offer_again(self, place: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not self._rename(place, name):
                self._delete(place)

    def _expire_in(self, place: str, lease_s: float) -> bool:
        """Write down, as the directory's time, when a lease ends; ``False`` if it is not there."""
        until = time.time() + lease_s
        try:
            with _mapped():
                os.utime(place, (until, until), dir_fd=self._open_root(), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _read_manifest(self, place: str) -> Found | None:
        try:
            with _mapped(), self._file(place, _MANIFEST, os.O_RDONLY) as fd, open(fd, "rb", closefd=False) as file:
                return Found(file.read(MAX_MANIFEST_BYTES + 1), place)
        except FileNotFoundError:
            return None

    def _look_at(self, place: str, name: str, *, taken: bool) -> Stored:
        with _mapped():
            folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | _HERE, dir_fd=self._open_root())
            try:
                with os.scandir(folder) as files:
                    about = {file.name: file.stat(follow_symlinks=False) for file in files}
                nbytes = sum(each.st_size for each in about.values() if stat.S_ISREG(each.st_mode))
            finally:
                os.close(folder)
        if _MANIFEST not in about:
            return Stored(name, nbytes, time.time(), taken)
        return Stored(name, nbytes, about[_MANIFEST].st_mtime, taken, about[_MANIFEST].st_atime)

    def _delete(self, place: str) -> bool:
        """Delete an entry, out of sight first; who has a file of it open reads on."""
        gone = f"gone.{secrets.token_hex(8)}"
        if not self._moved(place, gone):
            return False
        # What cannot be deleted now is tried again by `mend`.
        shutil.rmtree(gone, ignore_errors=True, dir_fd=self._open_root())
        return True


class FilesystemBuffer(StoreBuffer):
    """Entries in a directory. See `kvconnect.buffers.store_table.StoreBuffer`."""

    name: ClassVar[str] = "filesystem"
    options_type: ClassVar[type[StoreOptions]] = FilesystemOptions

    @classmethod
    def open_store(cls, options: StoreOptions) -> Store:
        """Open the directory."""
        if not isinstance(options, FilesystemOptions):
            raise ConfigError(f"FilesystemOptions are needed, not {type(options).__name__}")
        return FilesystemStore(options.path)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Map what a filesystem says; "there is none" and "there is one" are answers, each by one kind of error."""
    try:
        yield
    except OSError as error:
        raise _ours(error) from error


def _ours(error: OSError) -> KVConnectError | FileExistsError | FileNotFoundError:
    if error.errno in _THERE_IS_ONE:
        return FileExistsError(*error.args)
    if error.errno in _THERE_IS_NONE:
        return FileNotFoundError(*error.args)
    kind = BufferFullError if error.errno in _NO_ROOM else BrokenError
    return kind(f"the directory of the buffer failed: {error.strerror}")
