"""Engines of different versions and shapes: who differs is told which field differs, on both sides."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from kvconnect import messages
from kvconnect.buffers.base import Claim, Want
from kvconnect.errors import LoadError
from tests.buffers.engines import Engine, engines, eventually, group, is_miss, key, layout

_FORK = multiprocessing.get_context("fork")


def lines(caplog, module):
    return [record.getMessage() for record in caplog.records if record.name == f"kvconnect.{module}"]


def _produce(connection: Connection, protocol: tuple[int, int]) -> None:
    """Be a producer of another release, in a process of its own, until told to end; answer with its log."""
    messages.PROTOCOL = protocol
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("kvconnect").addHandler(handler)
    p = Engine("P", produces=True, pipe="tcp", group=group())
    connection.send(p.offer())
    connection.recv()
    connection.send(log)
    connection.recv()
    p.close()


@contextmanager
def release(*protocol: int) -> Iterator[Connection]:
    """Run a producer that speaks this range of versions; what comes first is its ticket."""
    connection, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_produce, args=(theirs, protocol), daemon=True)
    process.start()
    try:
        yield connection
    finally:
        process.kill()
        process.join(10)


def received(connection: Connection):
    assert connection.poll(10), "the producer does not answer"
    return connection.recv()


@pytest.mark.parametrize(("ours", "theirs"), [((1, 1), (2, 3)), ((3, 4), (1, 2))], ids=["older", "newer"])
def test_releases_without_a_common_version_say_so_on_both_sides(ours, theirs, monkeypatch, caplog):
    monkeypatch.setattr(messages, "PROTOCOL", ours)
    with release(*theirs) as producer, caplog.at_level(logging.WARNING):
        d = Engine("D", consumes=True, pipe="tcp", group=group())
        ticket = received(producer)
        for number in range(2):
            miss = d.find(f"r{number}", Want(key(1), ticket=ticket))
            is_miss(miss, "mismatch")
        here = f"protocol versions differ: ours {ours[0]}..{ours[1]}, theirs {theirs[0]}..{theirs[1]}"
        there = f"protocol versions differ: ours {theirs[0]}..{theirs[1]}, theirs {ours[0]}..{ours[1]}"
        assert here in miss.detail
        assert len([line for line in lines(caplog, "buffers.peers") if here in line]) == 1
        producer.send("log")
        assert len([line for line in received(producer) if there in line]) == 1
        d.close()


def test_releases_whose_versions_overlap_hand_over(monkeypatch):
    monkeypatch.setattr(messages, "PROTOCOL", (2, 3))
    with release(1, 2) as producer:
        d = Engine("D", consumes=True, pipe="tcp", group=group())
        claim = d.find("r", Want(key(1), ticket=received(producer)))
        assert isinstance(claim, Claim)
        d.read(claim).wait(8)
        d.close()


def test_a_field_that_differs_is_told_by_each_side_in_its_own_words(caplog):
    with engines(consumer={"fingerprint": {"dtype": "float16"}}) as (p, d), caplog.at_level(logging.WARNING):
        is_miss(d.find("r", Want(key(1), ticket=p.offer())), "mismatch")
        (at_d,), (at_p,) = lines(caplog, "buffers.peers"), lines(caplog, "buffers.lender")
        assert "dtype differs: ours 'float16', theirs 'bfloat16' (engine P)" in at_d
        assert "dtype differs: ours 'bfloat16', theirs 'float16' (engine D)" in at_p


@pytest.mark.parametrize(
    ("consumer", "named"),
    [({"shape": layout(layers=4)}, "memory layout differs at layer 3"), ({"pipe": "tcp"}, "no pipe joins")],
    ids=["shape", "pipe"],
)
def test_what_only_the_taker_finds_out_is_told_to_the_owner(consumer, named, caplog):
    with engines(consumer=consumer) as (p, d), caplog.at_level(logging.WARNING):
        for number in range(2):
            is_miss(d.find(f"r{number}", Want(key(1), ticket=p.offer())), "mismatch")
        told = eventually(lambda: lines(caplog, "buffers.lender"))
        assert "engine D does not fit" in told[0]
        assert named in told[0]
        assert len(told) == 1
        assert p.end.stats()["refused"] == 1


def test_a_worker_that_differs_is_named_by_the_worker_that_refuses_it(caplog):
    with engines(marks={"blocks": "theirs"}, consumer={"marks": {"blocks": "ours"}}) as (p, d):
        claim = d.find("r", Want(key(1), ticket=p.offer()))
        with caplog.at_level(logging.WARNING), pytest.raises(LoadError, match="blocks differs"):
            d.read(claim).wait(8)
        (told,) = lines(caplog, "buffers.serving")
        assert "blocks differs: ours 'ours', theirs 'theirs'" in told
