"""The command told to stop while an answer is on its way."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import httpx
import pytest

from tests.proxy.command import running
from tests.proxy.servers import WAIT_S, Call, FakeEngine, Served, gives_ticket


def streams_for(pieces):
    async def behave(call: Call) -> None:
        await call.start(200, (b"content-type", b"text/event-stream"))
        for number in range(pieces):
            await call.piece(b"data: %d\n\n" % number)
            await asyncio.sleep(0.1)
        await call.piece(b"", more=False)

    return behave


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("pieces", "stop_s", "whole"), [(70, 60, True), (300, 1, False)])
def test_an_answer_that_has_begun_gets_the_time_to_end_and_no_more(pieces, stop_s, whole):
    with (
        Served(FakeEngine(gives_ticket)) as prefill,
        Served(FakeEngine(streams_for(pieces))) as decode,
        running("--prefill", prefill.url, "--decode", decode.url, "--stop-timeout", str(stop_s)) as (process, url),
        httpx.Client(trust_env=False, timeout=WAIT_S) as client,
    ):
        got = []
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            client.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as answer,
        ):
            for piece in answer.iter_raw():
                if not got:
                    process.send_signal(signal.SIGTERM)
                got.append(piece)
        text = b"".join(got)
        assert text.endswith(b"data: %d\n\n" % (pieces - 1)) == whole
        process.wait(WAIT_S)
