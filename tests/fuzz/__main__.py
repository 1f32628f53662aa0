"""``python -m tests.fuzz --seconds N --seed S [--target NAME]``: search for as long as one likes."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
import traceback
from dataclasses import dataclass

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.harness import WAIT_S, Target, hunt, listening, peaks, replay

#: Examples of a target's first batch; some take a second each.
_FIRST = 20
#: How long the next ones may take.
_BATCH_S = 4.0


@dataclass
class _Search:
    """What became of one target."""

    name: str
    known: int = 0
    new: int = 0
    seconds: float = 0.0
    failed: bool = False

    def row(self) -> str:
        """Return its line of the summary."""
        peak_mib = peaks.get(self.name, 0) / (1 << 20)
        verdict = "FAILED" if self.failed else "ok"
        return f"{self.name:18}{self.known:7}{self.new:9}{self.seconds:10.1f}{peak_mib:12.2f}  {verdict}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz what reads bytes from peers.")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, shared evenly by the targets")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the search; what fails is printed whole, for the corpus"
    )
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one; may be repeated")
    wanted = parser.parse_args(arguments)
    names = wanted.target or list(TARGETS)
    gc.freeze()  # to look through torch's objects after each batch takes longer than the batch
    begun = time.monotonic()
    done: list[_Search] = []
    for place, name in enumerate(names):
        # What one took too long, the others lack: in all it takes what was asked for.
        left_s = wanted.seconds - (time.monotonic() - begun)
        done.append(_search(TARGETS[name], left_s / (len(names) - place), wanted.seed))
        sys.stdout.write(done[-1].row())
        sys.stdout.flush()
    sys.stdout.write(f"\n{'target':18}{'corpus':>7}{'new':>9}{'seconds':>10}{'peak, MiB':>12}\n")
    sys.stdout.writelines(search.row() for search in done)
    took_s, new = time.monotonic() - begun, sum(search.new for search in done)
    sys.stdout.write(f"{len(done)} targets, {new} new examples in {took_s:.0f} s, --seed {wanted.seed}\n")
    return 1 if any(search.failed for search in done) else 0


def _search(target: Target, seconds: float, number: int) -> _Search:
    """Replay the corpus, then hunt in batches until the time is over."""
    begun, search = time.monotonic(), _Search(target.name)
    try:
        with listening():
            search.known = replay(target)
            examples, now = _FIRST, time.monotonic()
            while search.new == 0 or now - begun < seconds:
                # A wait that never ends cannot be interrupted from within: say where it is, and exit.
                faulthandler.dump_traceback_later(_FIRST * WAIT_S, exit=True)
                hunt(target, number + search.new, examples=examples)
                gc.collect()
                search.new += examples
                took, now = time.monotonic() - now, time.monotonic()
                examples = max(1, int(examples / took * min(_BATCH_S, seconds - (now - begun))))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other targets are searched, too
        sys.stdout.write(f"{target.name}:\n{''.join(traceback.format_exception(error, limit=-4))}\n")
        search.failed = True
    finally:
        faulthandler.cancel_dump_traceback_later()
    search.seconds = time.monotonic() - begun
    return search


if __name__ == "__main__":
    sys.exit(main())
