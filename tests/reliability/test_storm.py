"""Producers that are killed and restarted while requests keep coming: nothing wrong, nothing hangs, nothing stays."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from tests.reliability.storm import Storm, run_all

#: For a longer storm, or a shorter one.
SECONDS = float(os.environ.get("KVCONNECT_STORM_SECONDS", "70"))
KILL_EVERY_S = 20.0
#: Policy, pipe, requests and the first kill, so that not all restart at once.
STORMS = (
    ("recompute", "tcp", 1000, 0.5),
    ("recompute", "shm", 1000, 1.0),
    ("fail", "tcp", 200, 0.75),
    ("fail", "shm", 200, 0.25),
)


@pytest.mark.timeout(SECONDS + 200)
def test_a_thousand_requests_while_their_producer_dies_every_twenty_seconds(request: pytest.FixtureRequest) -> None:
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    with ExitStack() as stack:
        storms = [
            stack.enter_context(closing(Storm(pipe, policy, count, SECONDS, (first * KILL_EVERY_S, KILL_EVERY_S))))
            for policy, pipe, count, first in STORMS
        ]
        run_all(storms, lambda line: reporter.write_line(line) if reporter else None, SECONDS + 150)
        for storm in storms:
            assert storm.tally.kills >= SECONDS // KILL_EVERY_S, storm.tally.line()
