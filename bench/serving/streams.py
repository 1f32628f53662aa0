"""Long completions, streamed, and when each of their tokens came.

Runs as a process of its own, so that the load's threads do not delay what it notes:
``python -m bench.serving.streams PORT COUNT`` reads the request's body from the first line
of standard input, writes ``ready`` when every stream runs, and at the end of its input writes
a JSON list of the tokens' times for each stream, in seconds of `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from bench.serving.contenders import HOST

#: Tokens of every stream before it counts as running.
_RUNNING = 8
_END_TIMEOUT_S = 15.0


class StreamsError(RuntimeError):
    """The streams did not run, or ended before they were told to."""


class Streams:
    """``count`` completions of a server at once, until `stop`.

    Raises:
        StreamsError: they do not run after ``timeout_s``.

    """

    def __init__(self, port: int, body: dict[str, Any], count: int, timeout_s: float) -> None:
        command = [sys.executable, "-m", "bench.serving.streams", str(port), str(count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        out = self._process.stdout
        if self._process.stdin is None or out is None:  # never: both are pipes
            raise StreamsError("the process has no pipes")
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()
        late = threading.Timer(timeout_s, self._process.kill)
        late.start()
        line = out.readline()
        late.cancel()
        late.join()
        if line.strip() != "ready":
            self.__exit__()
            raise StreamsError(f"the streams did not run within {timeout_s:g} s: {line!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        if self._process.stdout is not None and not self._process.stdout.closed:
            self._process.communicate()

    def stop(self) -> list[list[float]]:
        """End the streams; return the times of their tokens.

        Raises:
            StreamsError: one had ended by itself, or they do not end.

        """
        try:
            text, _ = self._process.communicate(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise StreamsError("the streams do not end") from error
        if self._process.returncode != 0:
            raise StreamsError("a stream ended by itself")
        times: list[list[float]] = json.loads(text)
        return times


def gaps_ms(streams: Sequence[Sequence[float]], begin_s: float, end_s: float) -> list[float]:
    """Return the milliseconds between neighbouring tokens of each stream, for tokens within a window."""
    found: list[float] = []
    for times in streams:
        moments = np.asarray(times)
        inside = moments[(moments >= begin_s) & (moments <= end_s)]
        found += (np.diff(inside) * 1e3).tolist()
    return found


async def _follow(port: int, body: bytes, times: list[float], running: asyncio.Event) -> None:
    """Send one request and note when each event of its stream arrives."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
                if len(times) == _RUNNING:
                    running.set()
            elif line.startswith((b"data: [DONE]", b"HTTP/1.1 4", b"HTTP/1.1 5")):
                break
    finally:
        writer.close()
    raise StreamsError(f"a stream ended after {len(times)} tokens: {line!r}")


async def _run(port: int, count: int) -> list[list[float]]:
    loop = asyncio.get_running_loop()
    told = asyncio.StreamReader(limit=1 << 22)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(told), sys.stdin)
    body = (await told.readline()).strip()
    times: list[list[float]] = [[] for _ in range(count)]
    running = [asyncio.Event() for _ in range(count)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_follow(port, body, *each)) for each in zip(times, running, strict=True)]
        for event in running:
            await event.wait()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await told.read()
        for task in tasks:
            task.cancel()
    return times


def main() -> int:
    """Run from the command line."""
    port, count = map(int, sys.argv[1:])
    try:
        times = asyncio.run(_run(port, count))
    except ExceptionGroup as errors:
        sys.stderr.write(f"{errors.exceptions[0]}\n")
        return 1
    sys.stdout.write(json.dumps(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
