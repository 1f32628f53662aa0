"""``docs/write-a-pipe.md``: the module of the package that is the example of a pipe."""

from __future__ import annotations

from bench.report import ROOT

SOURCE = ROOT / "examples" / "third_party_pipe" / "unix_pipe.py"


def render() -> str:
    """Return the module as a block of Markdown, under its name."""
    return f"```python\n# {SOURCE.name}\n{SOURCE.read_text('utf-8')}```"
