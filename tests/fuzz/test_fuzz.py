"""Whatever a peer sends: the declared errors, in time, within memory; in seconds here, in minutes by ``make fuzz``."""

from __future__ import annotations

import tracemalloc

import pytest

from tests.fuzz.catalogue import TARGETS
from tests.fuzz.harness import hunt, listening, replay

EXAMPLES = 25


@pytest.fixture(autouse=True)
def traced():
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_a_few_new_examples_are_refused_or_served(name):
    with listening():
        assert replay(TARGETS[name]), "its corpus is gone"
        hunt(TARGETS[name], 1, examples=EXAMPLES)
