"""``python -m bench``: run every case and write the results; arguments go to pytest."""

from __future__ import annotations

import sys

import pytest

from bench.report import ROOT

# The order is shuffled with a seed of our own, so that two runs are comparable.
sys.exit(pytest.main([str(ROOT / "bench"), "-q", "-p", "no:randomly", *sys.argv[1:]]))
