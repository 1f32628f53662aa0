"""The page of planted bugs is what the suite plants."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="connectors are in the table, too")

from kvconnect.buffers.base import BufferTraits
from kvconnect.pipes.base import Traits
from tests import laws

PAGE = Path(__file__).parents[2] / "docs" / "planted-bugs.md"


def test_the_page_has_every_bug_with_the_law_that_catches_it():
    shown = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    assert shown == list(laws.table()), "write it anew: python -m tests.laws"


def test_the_page_says_of_every_trait_which_laws_hold_it():
    traits = [field.name for kind in (Traits, BufferTraits) for field in fields(kind)]
    assert sorted(re.findall(r"^- `(\w+)`:", PAGE.read_text("utf-8"), re.MULTILINE)) == sorted(traits)
