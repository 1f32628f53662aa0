"""Makes vLLM's busy waiting sleep, in every process of an engine whose PYTHONPATH has this folder.

Its workers wait for each other by calling ``sched_yield`` in a loop. On Linux 6.18 two
such loops on two cores kept everything else off them, kernel threads included, for a minute.
"""

import os
import time


def _sleep() -> None:
    time.sleep(1e-4)


os.sched_yield = _sleep
