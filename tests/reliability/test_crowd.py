"""Many to many: four producers and four consumers, of which some come and some go while requests run."""

from __future__ import annotations

from contextlib import closing

import pytest

pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")

from tests.reliability.crowd import Crowd

REQUESTS = 100


@pytest.mark.timeout(180)
@pytest.mark.parametrize("pipe", ["tcp", "shm"])
def test_engines_come_and_go_while_requests_run(pipe: str) -> None:
    with closing(Crowd(pipe, producers=4, consumers=4)) as crowd:
        crowd.serve(REQUESTS)
        assert crowd.how == {("loaded", True): REQUESTS}
        before = crowd.holdings()

        # Who comes is used at once, by those who were there before and who come with it.
        new = crowd.join("P")
        crowd.join("D")
        crowd.serve(20, producer=new)
        crowd.serve(REQUESTS)
        assert crowd.how == {("loaded", True): 2 * REQUESTS + 20}

        # Who goes takes only its own along: what was under way from it is computed.
        crowd.send(30)
        crowd.leave(crowd.of("P")[0])
        crowd.send(30)
        crowd.die(crowd.of("P")[0])
        crowd.send(30)
        crowd.leave(crowd.of("D")[0])
        crowd.send(30)
        crowd.die(crowd.of("D")[0])
        crowd.serve(REQUESTS)
        assert {how for (how, there) in crowd.how if there} == {"loaded"}
        assert {how for (how, there) in crowd.how if not there} <= {"loaded", "computed"}
        crowd.settle()
        assert crowd.new_threads(before) == [], "threads for each peer"
