"""A write by NIXL, seen from the end that asked for it, and what it learns of the other one."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from kvconnect.config import Backend
from kvconnect.errors import BrokenError, HandshakeError
from kvconnect.pipes import nixl
from kvconnect.pipes.base import Message, PipeSpec
from kvconnect.pipes.chunks import LISTEN_S
from kvconnect.pipes.companion import Companion, join
from kvconnect.pipes.nixl import NixlPipe
from kvconnect.pipes.nixl_write import Write
from kvconnect.testing.layouts import noisy_memory, separate_layers
from kvconnect.testing.peers import LIMIT_S, open_pair
from kvconnect.testing.processes import ProcessPeer

GONE = BrokenError("the other end is gone")


class Asker:
    """The end of a pipe, and what it asked the other one."""

    timeout_s = 30.0

    def __init__(self) -> None:
        self.asked: list[tuple[str, Future[dict[str, Any]]]] = []
        self.writes = 1

    def tell(self, op: str, body: Message) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        self.asked.append((op, answer))
        return answer

    def forget_write(self, write: Write) -> None:
        self.writes -= 1

    @property
    def ops(self) -> list[str]:
        return [op for op, _ in self.asked]


def test_a_write_is_over_when_the_other_end_is_known_to_be_gone() -> None:
    end = Asker()
    write = Write(end, 1, 1 << 20)
    write.check_time(time.monotonic() + LISTEN_S / 2)
    assert not end.asked
    write.check_time(time.monotonic() + LISTEN_S * 1.1)
    assert end.ops == ["nixl.running"]
    end.asked[0][1].set_exception(GONE)
    assert not write.transfer.done  # it could have been the connection only
    assert end.ops == ["nixl.running", "nixl.stop"]
    end.asked[1][1].set_exception(GONE)
    with pytest.raises(BrokenError, match="gone"):
        write.transfer.wait(0)
    assert end.writes == 0


def test_a_write_that_goes_on_is_asked_for_once_at_a_time_and_has_no_deadline() -> None:
    end = Asker()
    write = Write(end, 1, 1 << 20)
    for number in range(1, 4):
        for seconds in (1.1, 5.0, 29.0):
            write.check_time(time.monotonic() + seconds)
        assert end.ops == ["nixl.running"] * number
        end.asked[-1][1].set_result({"running": True})
    assert not write.transfer.done
    write.over(None)
    write.transfer.wait(0)


def test_a_write_ends_soon_after_the_process_that_reads_for_it_was_killed() -> None:
    peer = ProcessPeer(NixlPipe, {"mode": "runs"})
    try:
        end = peer.open(timeout_s=LIMIT_S)
        layout = separate_layers(1, 4096, 1, 1 << 16)
        mine = noisy_memory(layout, 1)
        end.attach(mine, layout, 2)
        end.pipe.write_blocks([[7]], [[8]]).wait(LIMIT_S)
        accepted = threading.Event()
        tell = end.pipe._blocks.tell

        def telling(op: str, body: Message) -> Future[dict[str, Any]]:
            answer = tell(op, body)
            if op == "nixl.pull":
                answer.add_done_callback(lambda _: accepted.set())
            return answer

        end.pipe._blocks.tell = telling
        transfer = end.pipe.write_blocks([list(range(4096))], [list(range(4096))])
        assert accepted.wait(LIMIT_S)
        peer.kill()
        over = threading.Event()
        transfer.add_done_callback(lambda _: over.set())
        assert over.wait(LISTEN_S + 4), "the write did not end though its peer is known to be dead"
        assert transfer.error is not None
        end.pipe.abort()
    finally:
        peer.close()


def test_an_end_that_speaks_another_version_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(spec: PipeSpec, mine: Message, wanted: Backend) -> Companion:
        found = join(spec, mine, wanted)
        return dataclasses.replace(found, theirs={"nixl": 1}) if spec.side == "asks" else found

    monkeypatch.setattr(nixl, "join", joined)
    with pytest.raises(HandshakeError, match="ours is version 3 of the nixl pipe, theirs 1"):
        open_pair(NixlPipe)
