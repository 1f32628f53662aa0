"""Run a module as a program that ends when its parent does.

``python -m kvconnect.demo.child <pid of the parent> <module> [arguments]``

Two reasons for a program of its own. The kernel is asked to send SIGTERM when
the parent dies in whatever way, so no engine outlives a killed demo. And vLLM
starts its engine and worker processes by *spawn*, which imports the main module
again in each of them: this one is small, while the API server takes seconds.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Run module ``argv[1]`` as ``__main__`` with the rest as its arguments, as a child of ``argv[0]``."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(argv[0]):
        sys.exit("the parent process is gone")
    sys.argv = argv[1:]
    # Not `alter_sys`: sys.modules["__main__"] stays this module, see above.
    runpy.run_module(argv[1], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
