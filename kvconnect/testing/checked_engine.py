"""An engine without a model that judges its connector: what must never happen, it notices.

Computing a prompt writes bytes that tell the prompt, the block, the layer and the worker; blocks that
are free are overwritten at once, as the next request's prefill will. So a load that brings the wrong
bytes, one that writes after it was given up, and a request that decodes from a load that failed all
show in `CheckedEngine.wrong`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvconnect.testing.engine import BLOCK, SHAPES, Engine

#: No law waits longer for anything.
PATIENCE_S = 30.0
Visit = Callable[[torch.Tensor, int, int], object]


def content(prompt: Sequence[int], index: int, like: torch.Tensor, layer: int) -> torch.Tensor:
    """Return what computing a prompt leaves in its block ``index``, the same shape and dtype as ``like``."""
    first = float(prompt[0] * 4099 + index * 67 + layer * 13)
    return torch.arange(like.numel(), dtype=like.dtype).add_(first).view(like.shape)


class CheckedEngine(Engine):
    """An engine that fills blocks as if it computed, and spoils them when they are free."""

    def __init__(self, model: str, transfer: Mapping[str, Any], *, ranks: int = 1) -> None:
        super().__init__(model, transfer, SHAPES["blocks first"], seed=0, caches=False, ranks=ranks)
        #: What the engine saw that must never happen, a sentence each.
        self.wrong: list[str] = []
        #: What became of each request that ran: "loaded", "computed", "error" or "aborted".
        self.outcomes: dict[str, str] = {}
        #: Requests whose load is not over.
        self.loading: set[str] = set()
        #: Requests whose load is over, but whose turn in the scheduler's queue has not come: they still wait for it.
        self._over: set[str] = set()
        self._told: Counter[tuple[int, str]] = Counter()
        self._prompts: dict[str, list[int]] = {}
        self._failed: set[str] = set()
        self._spoilt: dict[int, float] = {}
        self._spoils = 0
        self.spoil()

    def add(self, name: str, tokens: Sequence[int], params: Any = None, max_tokens: int = 3, trace: Any = None) -> None:
        """Take a request in."""
        self._prompts[name] = list(tokens)
        super().add(name, tokens, params, max_tokens, trace)

    def abort(self, name: str) -> None:
        """Give a request up."""
        self.outcomes[name] = "aborted"
        super().abort(name)

    def preempt(self) -> None:
        """Preempt all running requests: each loads or computes anew."""
        for request in self.scheduler.running:
            self.outcomes.pop(request.request_id, None)
        super().preempt()
        self.spoil()

    def computed(self, planned: Any, moved: Any) -> None:
        """Check what was loaded, and write what was computed."""
        self._hear(planned, moved)
        self._check_spoilt()
        for name, tokens in planned.num_scheduled_tokens.items():
            prompt = self._prompts[name]
            begun = self.scheduler.requests[name].num_computed_tokens > tokens
            if begun and name not in self.outcomes:
                self._check_loaded(name, prompt)
            elif tokens > 1 or not begun:
                self.outcomes[name] = "computed"
                self._compute(name, prompt)

    def carry_out(self, planned: Any) -> Any:
        """Do what the scheduler has planned, and spoil what is free then."""
        super().carry_out(planned)
        for name, ended in self.ended.items():
            if str(ended.finish_reason) == "error":
                self.outcomes[name] = "error"
        self.spoil()
        return planned

    def until(self, done: Callable[[], object], what: str) -> None:
        """Take steps until ``done``; `AssertionError` if that takes longer than `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            states = {name: request.status.name for name, request in self.scheduler.requests.items()}
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S} s; requests are {states}"
            self.step()

    def started(self, planned: Any) -> set[str]:
        """Return the requests whose loads a step starts; by default those that have begun to wait for one."""
        waiting = {name for name in self.scheduler.requests if self.loads(name)}
        self._over &= waiting
        return waiting - self.loading - self._over

    def _hear(self, planned: Any, moved: Any) -> None:
        started = self.started(planned)
        if twice := started & self.loading:
            self.wrong.append(f"loads started again: {twice}")
        self.loading |= started
        over = set(moved.finished_recving or ()) if moved else set()
        if unknown := over - self.loading:
            self.wrong.append(f"completion of what does not load: {unknown}")
        self.loading -= over
        self._over |= over
        for told in [told for told in self._told if told[1] in over]:
            del self._told[told]
        self._failed |= set(moved.failed_recving or ()) if moved else set()

    def _moved(self, rank: int, planned: Any) -> Any:
        moved = super()._moved(rank, planned)
        for name in (moved.finished_recving or ()) if moved else ():
            self._told[rank, name] += 1
            if self._told[rank, name] > 1:
                self.wrong.append(f"worker {rank} told {self._told[rank, name]} times that {name} is loaded")
        return moved

    def _compute(self, name: str, prompt: list[int]) -> None:
        self._each(name, prompt, lambda block, index, layer: block.copy_(content(prompt, index, block, layer)))

    def _check_loaded(self, name: str, prompt: list[int]) -> None:
        self.outcomes[name] = "loaded"
        if name in self._failed:
            self.wrong.append(f"{name} decodes from a load that failed")

        def check(block: torch.Tensor, index: int, layer: int) -> None:
            if not block.equal(content(prompt, index, block, layer)):
                self.wrong.append(f"{name} decodes from wrong bytes in block {index}, layer {layer}")

        self._each(name, prompt, check)

    def _each(self, name: str, prompt: list[int], do: Visit) -> None:
        """Visit every block of a prompt; layers are counted through all workers, so that no two are alike."""
        (ids,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        for index, number in enumerate(ids[: -(-len(prompt) // BLOCK)]):
            for layer, cache in enumerate(self._caches()):
                do(cache[number], index, layer)

    def _caches(self) -> list[torch.Tensor]:
        return [cache for memory in self.memories for cache in memory.values()]

    def spoil(self) -> None:
        """Overwrite what is free, as the next request's prefill will."""
        free = {block.block_id for block in self._pool if block.ref_cnt == 0 and not block.is_null}
        for number in free - self._spoilt.keys():
            self._spoils += 1
            self._spoilt[number] = -float(self._spoils)
            for cache in self._caches():
                cache[number].fill_(-float(self._spoils))
        for number in self._spoilt.keys() - free:
            del self._spoilt[number]

    def _check_spoilt(self) -> None:
        """What is free must not be written by a load that was given up."""
        for number in [block.block_id for block in self._pool if block.ref_cnt]:
            self._spoilt.pop(number, None)
        for number, value in self._spoilt.items():
            if not all(bool((cache[number] == value).all()) for cache in self._caches()):
                self.wrong.append(f"block {number} was written while it was free")

    @property
    def _pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool.blocks
