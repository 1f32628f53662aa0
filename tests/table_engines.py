"""``python table_engines.py FOLDER``: two real vLLM engines that have nothing in common but an SQLite table.

Run by `tests/test_third_parties.py` in an environment that knows kvconnect by its wheel, so it imports
nothing of this tree.
"""

from __future__ import annotations

import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvconnect.demo import client as api
from kvconnect.demo import engines, model
from kvconnect.demo.client import Prompt
from kvconnect.demo.engines import EngineOptions, Server

if TYPE_CHECKING:
    import httpx

START_S = 420.0


def say(text: str) -> None:
    """Show progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def launch(folder: Path, table: Path) -> list[Server]:
    """Describe a producer and a consumer."""
    buffer = {"name": "sqlite", "path": str(table), "chunk_bytes": 1 << 16}
    options = EngineOptions(str(model.ensure()))
    found = []
    for name, role in (("P", "kv_producer"), ("D", "kv_consumer")):
        # Cores that others use, too: what is still on its way is waited for.
        extra = {"buffer": buffer, "group": f"alone-{secrets.token_hex(8)}", "lookup_timeout_s": 30.0}
        transfer = {
            "kv_connector": "KvConnect",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        found.append(engines.engine(name, options, folder, kv_transfer=transfer))
    return found


def check(http: httpx.Client, pair: list[Server], prompt: Prompt, *, comes: bool) -> None:
    """Hand one prompt over, or fail to, and have D compute it alone: both answers are the same."""
    producer, consumer = (server.url for server in pair)
    before = api.metrics(http, consumer).get(api.EXTERNAL_TOKENS, 0)
    answer = api.hand_over(http, producer, consumer, prompt)
    fetched = api.metrics(http, consumer).get(api.EXTERNAL_TOKENS, 0) - before
    reference = api.send(http, consumer, replace(prompt, salt=secrets.token_hex(8)))
    say(f"{answer.prompt_tokens} tokens, {fetched:.0f} of them from the table")
    if fetched < answer.prompt_tokens - 1 if comes else fetched:
        raise SystemExit(f"D fetched {fetched:.0f} of {answer.prompt_tokens} tokens")
    if answer.text != reference.text:
        raise SystemExit(f"D answered {answer.text!r}, alone it answers {reference.text!r}")


def main(folder: Path) -> None:
    """Hand over prompts of several lengths, then one with the table damaged under running engines."""
    table, text = folder / "table.db", "\n".join(model.training_text())
    pair = launch(folder, table)
    try:
        engines.start(pair, say)
        engines.wait_ready(pair, START_S, say)
        with api.open_client(120.0) as http:
            for number, length in enumerate((30, 600, 4000)):
                check(http, pair, Prompt(text[number * 9000 :][:length]), comes=True)
            with table.open("r+b") as file:
                file.write(b"no table" * (table.stat().st_size // 8))
            check(http, pair, Prompt(text[50_000:][:600]), comes=False)
    finally:
        engines.stop(pair)
    say("every output equals that of one engine")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
