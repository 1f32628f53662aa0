"""``python -m tests.fuzz --seconds N --seed S [--target NAME]``: search for as long as one likes."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
import traceback

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.harness import WAIT_S, Target, hunt, listening, replay

_BATCH = 50


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz what reads bytes from peers.")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all, shared evenly by the targets")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same examples")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one; may be repeated")
    wanted = parser.parse_args(arguments)
    names = wanted.target or list(TARGETS)
    failed = [name for name in names if not _search(TARGETS[name], wanted.seconds / len(names), wanted.seed)]
    if failed:
        sys.stdout.write(f"failed with --seed {wanted.seed}: {', '.join(failed)}\n")
    return 1 if failed else 0


def _search(target: Target, seconds: float, number: int) -> bool:
    """Replay the corpus, then hunt in batches until the time is over."""
    begun, batches = time.monotonic(), 0
    try:
        with listening():
            known = replay(target)
            while batches == 0 or time.monotonic() - begun < seconds:
                # A wait that never ends cannot be interrupted from within: say where it is, and exit.
                faulthandler.dump_traceback_later(_BATCH * WAIT_S, exit=True)
                hunt(target, number + batches, examples=_BATCH)
                gc.collect()
                batches += 1
    except Exception as error:  # noqa: BLE001 - whatever it is, the other targets are searched, too
        sys.stdout.write(f"{target.name}:\n{''.join(traceback.format_exception(error, limit=-4))}\n")
        return False
    finally:
        faulthandler.cancel_dump_traceback_later()
    took = time.monotonic() - begun
    sys.stdout.write(f"{target.name}: {known} known and {batches * _BATCH} new examples, {took:.1f} s\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
