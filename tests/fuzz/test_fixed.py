"""What the fuzzer found, one by one."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgpack
import pytest
import torch

from kvconnect import messages
from kvconnect.blocks import heap_memory
from kvconnect.buffers import arena
from kvconnect.buffers.hello import Hello, check_fit
from kvconnect.config import parse_backend
from kvconnect.control import split
from kvconnect.errors import BrokenError, ConfigError, HandshakeError, LoadError
from kvconnect.paging import PagedLayout
from kvconnect.pipes import companion, nccl_blocks, tcp_meeting, tcp_requests, wire
from kvconnect.pipes.base import PipeSpec
from kvconnect.pipes.inproc import InprocPipe
from kvconnect.pipes.nixl_blocks import NixlBlocks
from kvconnect.pipes.nixl_notes import Note, What
from kvconnect.pipes.peer_process import PeerProcess
from kvconnect.pipes.stream import BlockStream
from kvconnect.pipes.tcp_requests import BlockRequests
from kvconnect.pipes.wire import Kind
from tests.fuzz import of_blocks, of_bytes, of_control, of_pipes


def test_a_message_of_very_many_small_items_is_refused():
    body = b"\xdd" + struct.pack(">I", 200_000) + b"\x80" * 200_000
    with pytest.raises(messages.MalformedError, match="items"):
        messages.unpack(b"\x83" + msgpack.packb("p") + b"\x92\x01\x01" + msgpack.packb("id") + b"\x01\xa4body" + body)


def test_an_address_that_no_socket_takes_is_refused_before_there_is_one():
    with pytest.raises(ConfigError):
        split("\ud800:1")


def test_a_layout_of_more_pieces_than_any_memory_has_is_refused():
    for inner in ([[1 << 40, 0]] * 400, [[1 << 13, 1]]):
        with pytest.raises(HandshakeError, match="pieces"):
            PagedLayout.from_wire({"regions": [1 << 40], "layers": [["l", 0, 0, 0, 0, 1, 1, inner, ""]]})


def test_what_differs_is_told_in_a_short_line():
    theirs = Hello.from_wire({**of_control.plain(of_control.ME), "fingerprint": {"x" * 100_000: "y" * 100_000}})
    with pytest.raises(HandshakeError) as told:
        check_fit(Hello("E", "i", {}, 2, "both", 1.0), theirs)
    assert len(str(told.value)) < 2000


def test_a_process_number_beyond_the_systems_is_a_process_that_is_gone():
    with pytest.raises(BrokenError):
        PeerProcess({**PeerProcess.card(), "pid": 1 << 40})


@pytest.mark.timeout(20)
def test_an_entry_of_headers_only_is_refused_at_once():
    headers = wire.encode(torch.zeros(0))[0] * 50_000
    data = struct.pack("<II", 60_000, len(headers)) + headers
    with pytest.raises(LoadError):
        arena.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def test_a_read_is_not_done_because_the_sending_end_says_so():
    beside = of_blocks._Beside({"blocks.read": {"credit": 8}})
    stream = BlockStream(of_blocks._Sink(), heap_memory(of_blocks.LAYOUT), of_blocks.LAYOUT, beside, 5.0)
    read = stream.read([[1]], [[2]])
    with pytest.raises(HandshakeError):
        beside.handlers["blocks.done"]({**of_blocks._address(), "error": None})
    assert not read.done
    stream.close()


@pytest.fixture
def nixl():
    agent, beside = of_blocks._Agent(), of_blocks._Beside({"nixl.card": None})
    memory = heap_memory(of_blocks.LAYOUT)
    end = NixlBlocks(agent, memory, of_blocks.LAYOUT, beside, mode="staged", portion_bytes=256, timeout_s=5.0)
    yield end, agent, beside
    end.close(BrokenError("over"))
    agent.drain()


def test_a_nixl_read_is_not_confirmed_before_its_bytes_are_there(nixl):
    end, agent, beside = nixl
    read = end.read([[1], []], [[2], []])
    beside.handlers["nixl.card"](of_blocks._NIXL_CARD)
    of_blocks._settle(agent)
    beside.handlers["nixl.note"]({"note": Note(What.ENDED, 1).pack()})
    of_blocks._settle(agent)
    assert not read.done


def test_a_nixl_read_that_begins_twice_loses_no_slots(nixl):
    end, agent, beside = nixl
    for _ in range(2):
        beside.handlers["nixl.begin"](of_blocks._BEGIN)
    of_blocks._settle(agent)
    beside.handlers["nixl.end"]({"transfer": 5})
    of_blocks._settle(agent)
    assert not any(end.shared.slots._held.values())


def test_nixl_lends_no_more_blocks_than_there_are(nixl):
    with pytest.raises(HandshakeError, match="17 blocks"):
        nixl[2].handlers["nixl.begin"]({**of_blocks._BEGIN, "groups": [bytes(4 * 17)]})


def test_nccl_serves_only_so_many_reads_at_once(monkeypatch):
    monkeypatch.setattr(nccl_blocks, "MAX_READS", 1)
    beside = of_blocks._Beside({"nccl.meet": {"slot_bytes": 1 << 20}})
    memory = of_blocks.LAYOUT_MEMORY
    end = nccl_blocks.NcclBlocks(memory, of_blocks.LAYOUT, beside, of_blocks._wires(), slot_bytes=1 << 20, timeout_s=5)
    asks = [{**of_blocks._ASK, "number": number} for number in (1, 2)]
    beside.handlers["nccl.orders"]({"first": 0, "asks": asks, "rows": [], "drops": []})
    assert end._out.error is not None


def test_a_tcp_peer_that_takes_no_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(tcp_requests, "MAX_UNHEARD", 20)
    requests = BlockRequests(heap_memory(of_bytes.BLOCKS_LAYOUT), 4096)
    theirs, ours = of_bytes.unix_pair()
    with theirs, ours:
        ids = of_bytes._IDS
        given_up = [[Kind.READ, 0, 5, 0, 0, ids], [Kind.CANCEL, 0, 5, 0, 0, b""]]
        theirs.send(of_bytes.pack_frames(given_up * 40, checksum=False))
        with pytest.raises(BrokenError, match="takes no answers"):
            requests.reader.pump(ours.fileno(), 1 << 20)


def test_a_host_pipes_other_end_without_a_message_of_its_own_leaves_nothing_open():
    spec = PipeSpec("serves", lambda _: {**of_pipes._offer(), "own": 5}, "cpu", 2.0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(8):
        with pytest.raises(HandshakeError):
            companion.join(spec, {}, parse_backend("companion", "shm"))
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 8


def test_an_inproc_end_without_a_token_is_refused():
    with pytest.raises(HandshakeError):
        InprocPipe(PipeSpec("asks", lambda _: {"pid": os.getpid()}))


def test_a_tcp_end_does_not_take_no_host_for_this_host():
    with pytest.raises(HandshakeError, match="no address"):
        tcp_meeting._checked({**of_bytes._INVITATION, "host": ""})
