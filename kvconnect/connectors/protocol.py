"""The request of the hand-over protocol that vLLM's NixlConnector and its routers speak.

Whoever routes requests needs these fields and nothing else of this room, so this
module imports neither vllm nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: ``kv_transfer_params`` that ask a prefill engine to compute a prompt and answer with a
#: ticket. The null fields are what vLLM's own routers send.
ASK_FOR_TICKET: Final[Mapping[str, Any]] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
