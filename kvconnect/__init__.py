"""kvconnect: vLLM KV connectors over swappable buffers and pipes.

Importing this package loads neither torch nor vllm: public names are resolved
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvconnect.buffers.base import Grant as Grant
    from kvconnect.buffers.base import LookupBuffer as LookupBuffer
    from kvconnect.buffers.base import LookupKey as LookupKey
    from kvconnect.config import Config as Config
    from kvconnect.errors import KVConnectError as KVConnectError
    from kvconnect.pipes.base import Pipe as Pipe
    from kvconnect.pipes.base import PipeSpec as PipeSpec
    from kvconnect.pipes.base import Traits as Traits
    from kvconnect.pipes.base import Transfer as Transfer

__version__ = "0.1.0"

_HOME = {
    "Config": "kvconnect.config",
    "Grant": "kvconnect.buffers.base",
    "KVConnectError": "kvconnect.errors",
    "LookupBuffer": "kvconnect.buffers.base",
    "LookupKey": "kvconnect.buffers.base",
    "Pipe": "kvconnect.pipes.base",
    "PipeSpec": "kvconnect.pipes.base",
    "Traits": "kvconnect.pipes.base",
    "Transfer": "kvconnect.pipes.base",
}
__all__ = [
    "Config",
    "Grant",
    "KVConnectError",
    "LookupBuffer",
    "LookupKey",
    "Pipe",
    "PipeSpec",
    "Traits",
    "Transfer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
