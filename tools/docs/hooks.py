"""For ``mkdocs``: links that leave ``docs/`` name a file of the repository, since there is no page to go to."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write ``[text](../file)`` as *text (`file`)*."""
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)
