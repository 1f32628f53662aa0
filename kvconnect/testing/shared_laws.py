"""What `BufferTraits.shared` promises, as plain functions over a buffer's class and keyword arguments.

Each law opens the buffer here and in other processes, which import its class by its module and name. It
raises `AssertionError` when they do not meet in one table. The arguments have to name a fresh table.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from kvconnect.buffers.base import LookupBuffer
from kvconnect.testing.buffer_laws import key, tensor
from kvconnect.testing.peers import LIMIT_S
from kvconnect.testing.processes import START_S

Options = Mapping[str, Any]
Law = Callable[[type[LookupBuffer], Options], None]

_SPAWN = multiprocessing.get_context("spawn")
_MANY = 40


class OtherProcess:
    """A process with a buffer of its own. Numbers name entries: `key` and `tensor` of `buffer_laws`."""

    def __init__(self, buffer: type[LookupBuffer], options: Options) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_main, args=(theirs, buffer, dict(options)), daemon=True)
        self._process.start()
        theirs.close()
        self.answer(START_S)

    def tell(self, command: str, numbers: Sequence[int]) -> None:
        """Have it ``insert``, or ``take``, entries from several threads; `answer` says when it is done."""
        self._connection.send((command, list(numbers)))

    def answer(self, limit_s: float = LIMIT_S) -> list[int]:
        """Return which of the entries it was told of are there as they went in."""
        assert self._connection.poll(limit_s), f"the other process did not answer within {limit_s:g} s"
        try:
            found: list[int] | str = self._connection.recv()
        except EOFError:
            raise AssertionError("the other process ended: it has to be able to import the buffer's class") from None
        assert not isinstance(found, str), f"in the other process: {found}"
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join(LIMIT_S)
        self._connection.close()


def what_one_process_inserts_another_takes(buffer: type[LookupBuffer], options: Options) -> None:
    """Both ways, whole, once, and as soon as the insert has returned."""
    with closing(buffer(**options)) as here, closing(OtherProcess(buffer, options)) as other:
        numbers = range(_MANY)
        assert _each(numbers, lambda number: _insert(here, number)) == [*numbers]
        other.tell("take", numbers)
        assert other.answer() == [*numbers], "another process did not find what was inserted here"
        assert not _each(numbers, lambda number: _take(here, number)), "an entry was taken there and is still here"
        other.tell("insert", numbers)
        other.answer()
        assert _each(numbers, lambda number: _take(here, number)) == [*numbers], "what another process inserts is lost"


def racing_processes_share_nothing(buffer: type[LookupBuffer], options: Options) -> None:
    """Of takers in two processes, exactly one gets each entry."""
    with closing(buffer(**options)) as here, closing(OtherProcess(buffer, options)) as other:
        numbers = range(_MANY)
        for _ in range(3):
            _each(numbers, lambda number: _insert(here, number))
            other.tell("take", numbers)
            taken = [*_each(numbers, lambda number: _take(here, number)), *other.answer()]
            assert sorted(taken) == [*numbers], f"of {_MANY} entries, two racing processes took {len(taken)}"


def what_is_not_shared_stays_in_its_process(buffer: type[LookupBuffer], options: Options) -> None:
    """Not `BufferTraits.shared`: what would meet must be declared, or no engine could use it."""
    with contextlib.ExitStack() as stack:
        try:
            here = stack.enter_context(closing(buffer(**options)))
            other = stack.enter_context(closing(OtherProcess(buffer, options)))
        except Exception:  # noqa: BLE001 - what cannot even be opened by its options twice is not shared
            return
        _insert(here, 1)
        other.tell("take", [1])
        assert not other.answer(), "it does not declare that processes share it, and they do"


LAWS: tuple[Law, ...] = (what_one_process_inserts_another_takes, racing_processes_share_nothing)


def _each(numbers: Sequence[int], call: Callable[[int], bool]) -> list[int]:
    """Call from several threads; return the numbers that it was true for."""
    with ThreadPoolExecutor(4, thread_name_prefix="kvconnect-test-shared") as threads:
        return [number for number, good in zip(numbers, threads.map(call, numbers), strict=True) if good]


def _insert(buffer: LookupBuffer, number: int) -> bool:
    buffer.insert(key(number), [tensor(number), tensor(number + 1)])
    return True


def _take(buffer: LookupBuffer, number: int) -> bool:
    got = buffer.drop_select(key(number))
    if got is None:
        return False
    assert len(got) == 2, f"2 tensors went in, {len(got)} came out"
    assert all(part.equal(tensor(number + i)) for i, part in enumerate(got)), "values changed on the way"
    return True


def _main(connection: Any, buffer: type[LookupBuffer], options: Options) -> None:
    try:
        with closing(buffer(**options)) as table:
            connection.send([])
            while True:
                command, numbers = connection.recv()
                call = {"insert": _insert, "take": _take}[command]
                connection.send(_each(numbers, lambda number, call=call: call(table, number)))  # type: ignore[misc]
    except Exception as error:  # noqa: BLE001 - whoever runs the law must hear of it
        connection.send(f"{type(error).__name__}: {error}")
