"""Random schedules for two real engines that meet through wires: hand-overs, clients that leave, and one fault each."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from kvconnect.demo import engines
from kvconnect.demo.client import ASK, Prompt
from tests.vllm import wired
from tests.vllm.clients import leave
from tests.vllm.fleet import BLOCK, CHUNK, unique
from tests.vllm.wired import Wired

Strike = Callable[[Wired, np.random.Generator], None]

#: Around a block and a chunk, and long enough to be struck in the middle.
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 100, 10 * BLOCK, CHUNK + 5, 900, 1500)
#: In one schedule in so many P ends, whose restart takes a minute.
ENDS_ONE_IN = 40


def nothing(_: Wired, __: np.random.Generator) -> None:
    """All is well."""


def cut(w: Wired, _: np.random.Generator) -> None:
    """Every connection is reset."""
    w.cut()


def stall(w: Wired, rng: np.random.Generator) -> None:
    """Nothing comes through for a while, shorter or longer than some deadlines."""
    w.stall()
    _wait(rng.choice([0.2, 1.0, 3.0]))


def cut_later(w: Wired, rng: np.random.Generator) -> None:
    """P's bytes end in the middle."""
    w.data.after(_bytes(rng), "cut")
    _wait(0.5)


def hold(w: Wired, rng: np.random.Generator) -> None:
    """P's bytes stop in the middle."""
    w.data.after(_bytes(rng), "hold")
    _wait(rng.choice([0.3, 2.0, 6.0]))


def corrupt(w: Wired, rng: np.random.Generator) -> None:
    """One of P's bytes is another one."""
    w.data.after(_bytes(rng), "corrupt")
    _wait(0.5)


def lose(w: Wired, rng: np.random.Generator) -> None:
    """A few control messages are lost."""
    w.ask.rule(
        "hello claim release renew abandon", "lose", replies=bool(rng.integers(2)), times=int(rng.integers(1, 4))
    )
    _wait(0.5)


def repeat(w: Wired, _: np.random.Generator) -> None:
    """Control messages come twice."""
    for replies in (False, True):
        w.ask.rule("hello claim release renew abandon", "repeat", replies=replies, times=99)
    _wait(0.5)


def swap(w: Wired, rng: np.random.Generator) -> None:
    """Control messages overtake each other."""
    w.ask.rule("claim release renew abandon", "swap", replies=bool(rng.integers(2)), times=3)
    _wait(0.5)


def stop_p(w: Wired, rng: np.random.Generator) -> None:
    """P hangs for a while, shorter or longer than its leases."""
    _stop(w, "p", rng)


def stop_d(w: Wired, rng: np.random.Generator) -> None:
    """D hangs for a while; P may reuse what it lent."""
    _stop(w, "d", rng)


def kill_p(w: Wired, _: np.random.Generator) -> None:
    """P dies. `run` starts it again."""
    wired.kill(w.p)


def shut_p(w: Wired, _: np.random.Generator) -> None:
    """P is shut down in good order. `run` starts it again."""
    engines.stop([w.p])


#: P ends.
ENDS: tuple[Strike, ...] = (kill_p, shut_p)
#: Each as often as it is named here.
STRIKES: tuple[Strike, ...] = (nothing, cut, cut, stall, stall, lose, repeat, swap, stop_p, stop_d)
#: `shm` has none of these: no wire carries its bytes.
OF_DATA: tuple[Strike, ...] = (cut_later, cut_later, hold, corrupt, corrupt)


class Schedules:
    """Draws schedules from seeds and runs them against one pair of engines."""

    def __init__(self, w: Wired) -> None:
        self._w = w
        self._strikes = STRIKES + (OF_DATA if w.carries_data else ())
        self._contents = [w.fleet.prompt(tokens, seed, max_tokens=12) for seed, tokens in enumerate(LENGTHS)]
        self._right = [w.fleet.reference(prompt).texts for prompt in self._contents]

    def run(self, seed: int) -> str:
        """Run one schedule and return its name; asserts that whoever waited for an answer has the right one.

        Everything that lasts is healed at the end.
        """
        w, rng = self._w, np.random.default_rng(seed)
        strikes = ENDS if rng.integers(ENDS_ONE_IN) == 0 else self._strikes
        strike = strikes[rng.integers(len(strikes))]
        calls = [self._hand_over(rng) for _ in range(rng.integers(1, 5))]
        calls.append(functools.partial(self._strike, strike, rng))
        try:
            w.fleet.together(calls, limit_s=90.0)
        finally:
            w.heal()
            if strike in ENDS:
                w.restart(w.p)
        return strike.__name__

    def _hand_over(self, rng: np.random.Generator) -> Callable[[], None]:
        """Have P prefill, and return what is to be done at D."""
        number = int(rng.integers(len(self._contents)))
        prompt = replace(self._contents[number], salt=unique("schedule"))
        at_p, at_d = rng.choice(["stays", "leaves"], 2, p=[0.8, 0.2])
        params: Mapping[str, Any] | None = None
        if at_p == "leaves":
            leave(self._w.p, prompt, rng.uniform(0, 0.1), kv_transfer_params=ASK, max_tokens=1)
        else:
            params = self._w.fleet.ticket(self._w.p, prompt)
        first_s, later_s = rng.uniform(0, 0.2), rng.uniform(0, 0.2)
        return functools.partial(self._at_d, number, prompt, params, first_s, later_s if at_d == "leaves" else None)

    def _at_d(
        self, number: int, prompt: Prompt, params: Mapping[str, Any] | None, first_s: float, leaves_s: float | None
    ) -> None:
        w = self._w
        _wait(first_s)
        if leaves_s is not None:
            leave(w.d, prompt, leaves_s, kv_transfer_params=params, max_tokens=200)
            return
        try:
            answer = w.fleet.ask(w.d, prompt, kv_transfer_params=params)
        except httpx.HTTPError as error:
            raise AssertionError(f"D did not answer a prompt of {LENGTHS[number]} tokens: {error}") from error
        assert answer.texts == self._right[number], f"another answer to a prompt of {LENGTHS[number]} tokens"

    def _strike(self, strike: Strike, rng: np.random.Generator) -> None:
        _wait(rng.uniform(0, 0.25))
        strike(self._w, rng)
        self._w.heal()


def _stop(w: Wired, which: str, rng: np.random.Generator) -> None:
    server = w.p if which == "p" else w.d
    wired.signalled([server], signal.SIGSTOP)
    try:
        _wait(rng.choice([0.3, 1.5, w.fleet.plan.lease_s + 1]))
        if which == "d":
            w.fleet.ticket(w.p, Prompt("What takes the blocks that are free by now.", salt=unique("other")))
    finally:
        wired.signalled([server], signal.SIGCONT)


def _bytes(rng: np.random.Generator) -> int:
    return int(rng.integers(10_000, 4_000_000))


def _wait(seconds: float) -> None:
    threading.Event().wait(float(seconds))
