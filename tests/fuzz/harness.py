"""What a fuzz target is, and what must hold for each of its examples."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import logging
import signal
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from kvconnect.errors import KVConnectError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CORPUS = Path(__file__).parent / "corpus"
#: Processor time of one example; none takes a twentieth of it.
BUSY_S = 2.0
#: Time of one example on a machine that others use, too.
WAIT_S = 10.0
#: What any example may allocate beside its target's share: errors' texts and log records; a packer has 256 KiB.
SLACK_BYTES = 1 << 20

#: The declared answer to nonsense. Whatever else escapes a target is a bug.
refused = contextlib.suppress(KVConnectError)


@dataclass(frozen=True)
class Target:
    """One decoder.

    Args:
        name: of the target and of its folder in the corpus.
        examples: what a peer may send, as plain data (a Python literal).
        run: decodes an example and acts on it as the product would; asserts that the object still serves.
        per_byte: bytes that may be allocated for each byte of an example: the declared limit.
        fixed_bytes: likewise, for the example as a whole.

    """

    name: str
    examples: SearchStrategy[Any]
    run: Callable[[Any], None]
    per_byte: int = 64
    fixed_bytes: int = 0

    def limit_bytes(self, example: Any) -> int:
        """Most bytes that this example may have allocated at once."""
        return SLACK_BYTES + self.fixed_bytes + self.per_byte * weigh(example)

    def corpus(self) -> list[Path]:
        """Return the committed examples."""
        return sorted((CORPUS / self.name).glob("*.txt"))


class _Confessions(logging.Handler):
    """Hears what a catch-all of the product has caught: an error that nobody declared, on whatever thread."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []
        logger = logging.getLogger("kvconnect")
        logger.addHandler(self)
        logger.propagate = False  # thousands of refusals are no news
        self._hook, sys.unraisablehook = sys.unraisablehook, self._forgotten

    def _forgotten(self, what: sys.UnraisableHookArgs) -> None:
        """A socket or file was found that nobody had closed (or a finalizer failed)."""
        self.heard.append(f"{what.exc_value!r} from {what.object!r}")

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not isinstance(record.exc_info[1], KVConnectError):
            self.heard.append(self.format(record))

    def end(self) -> None:
        logger = logging.getLogger("kvconnect")
        logger.removeHandler(self)
        logger.propagate = True
        sys.unraisablehook = self._hook


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Fail examples, too, whose mistakes something caught, or which left something open."""
    confessions = _Confessions()
    _confessions.append(confessions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="ComplexHalf")  # torch's, at the first tensor of that dtype
        try:
            yield
            gc.collect()
            assert not confessions.heard, f"found too late to say after which example: {confessions.heard[0]}"
        finally:
            _confessions.remove(confessions)
            confessions.end()


_confessions: list[_Confessions] = []
_warm: set[str] = set()


#: Most bytes that an example allocated, by target.
peaks: dict[str, int] = {}


class HangError(AssertionError):
    """An example keeps the processor busy for too long."""


def weigh(example: Any) -> int:
    """Return about how many bytes an example has on the wire."""
    if isinstance(example, (bytes, str)):
        return 2 + len(example)
    if isinstance(example, Mapping):
        return 2 + sum(weigh(key) + weigh(value) for key, value in example.items())
    if isinstance(example, (list, tuple)):
        return 2 + sum(map(weigh, example))
    return 9


def check(target: Target, example: Any) -> None:
    """Run one example: no undeclared exception, no hang, no more memory than declared."""
    limit = target.limit_bytes(example)
    if target.name not in _warm:
        _warm.add(target.name)
        target.run(example)  # caches and late imports are nobody's allocation
    if not tracemalloc.is_tracing():
        tracemalloc.start(1)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    begun = time.monotonic()
    with _busy_at_most(BUSY_S):
        target.run(example)
    took = time.monotonic() - begun
    peak = tracemalloc.get_traced_memory()[1] - before
    peaks[target.name] = max(peak, peaks.get(target.name, 0))
    for confessions in _confessions:
        heard, confessions.heard = confessions.heard, []
        assert not heard, f"{target.name}: caught somewhere, but undeclared: {heard[0]}"
    assert took < WAIT_S, f"{target.name}: it took {took:.1f} s"
    assert peak <= limit, f"{target.name}: {peak} bytes were allocated, the limit for this example is {limit}"


def read_corpus(path: Path) -> Any:
    """Return a committed example."""
    return ast.literal_eval(path.read_text(encoding="utf-8"))


@functools.cache
def _warm_up() -> None:
    """Have Hypothesis do what it does once: read the sources of all loaded modules for constants, and Unicode's tables.

    While allocations are traced, as they are from the first example on, that takes ten times as long: a minute or two.
    """

    @settings(max_examples=200, database=None, deadline=None)  # it draws a constant now and then
    @given(st.integers(), st.text(), st.binary())
    def one(_number, _text, _bytes):
        pass

    one()


def replay(target: Target) -> int:
    """Check every committed example; return how many there are."""
    _warm_up()
    for path in target.corpus():
        check(target, read_corpus(path))
    return len(target.corpus())


def hunt(target: Target, number: int, *, examples: int, shrink: bool = True) -> None:
    """Check so many new examples, the same ones for the same ``number``."""
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    limits = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )

    @seed(number)
    @limits
    @given(target.examples)
    def one(example):
        check(target, example)

    one()


@contextlib.contextmanager
def _busy_at_most(limit_s: float) -> Iterator[None]:
    """Interrupt code that runs for too long. By processor time: other processes must not fail it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number, _frame):
        raise HangError(f"an example was still busy after {limit_s} s")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
