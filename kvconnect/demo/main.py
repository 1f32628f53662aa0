"""``python -m kvconnect demo``: start P, D and the proxy, hand KV over, compare every output."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import httpx

from kvconnect.demo import client as api
from kvconnect.demo import model as local_model
from kvconnect.demo import report
from kvconnect.demo.client import Prompt
from kvconnect.demo.deployment import Deployment, deploy, say
from kvconnect.demo.engines import ServerError
from kvconnect.demo.scenario import Control, Scenario

_FAILED, _NOT_RUN = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument("--connector", default="KvConnect", help="registered connector name (default: %(default)s)")
    parser.add_argument("--pipe", help="registered pipe name; default: what the connector takes")
    parser.add_argument("--model", help="model folder; default: a small one that is made on this machine")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs; default: a temporary one")
    parser.add_argument("--start-timeout-s", type=float, default=420.0, help="for the engines (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command-line arguments; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvconnect demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if KV moved and every check held, 1 if one did not, 2 if a server failed."""
    signal.signal(signal.SIGTERM, _interrupt)
    folder = args.logs or Path(tempfile.mkdtemp(prefix="kvconnect-demo-"))
    began = time.monotonic()
    model = args.model or str(local_model.ensure())
    say(f"model: {model}")
    deployment = deploy(model, args.connector, folder, args.pipe)
    try:
        deployment.start(args.start_timeout_s, say)
        problems = _requests(deployment, model)
    except (ServerError, httpx.HTTPError, RuntimeError) as error:
        say(f"\nthe demo could not run: {error}\nlogs: {folder}")
        return _NOT_RUN
    except KeyboardInterrupt:
        say(f"\ninterrupted; logs: {folder}")
        return _NOT_RUN
    finally:
        deployment.stop()
    for problem in problems:
        say(f"FAILED: {problem}")
    if problems:
        say(f"logs: {folder}")
        return _FAILED
    if args.logs is None:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"done in {time.monotonic() - began:.0f} s: every output equals that of one engine")
    return 0


def _requests(deployment: Deployment, model: str) -> list[str]:
    """Send everything, print the table, and return what is wrong."""
    prompts = _prompts(model)
    with api.open_client() as client:
        scenario = Scenario(deployment, client)
        scenario.warm_up(Prompt("A prompt that is sent once before anything is timed."))
        before = scenario.external_tokens()
        rows = []
        for number, (name, prompt) in enumerate(prompts, 1):
            say(f"request {number} of {len(prompts)}: {name}")
            rows.append(scenario.row(name, prompt))
        moved = scenario.external_tokens() - before
        say("negative control: one block zeroed on its way")
        control = scenario.negative_control(Prompt(_text(model, 200, 40)))
    say("\n" + report.table(rows) + "\n")
    say("with/without: D's own vllm:time_to_first_token_seconds. client: through the proxy, P's prefill included.")
    say(f"D's {api.EXTERNAL_TOKENS}: +{moved} over these requests")
    say(
        f"negative control: block {control.block}, one of {control.blocks}, zeroed in P's memory after prefill; "
        f"D fetched {control.fetched_tokens} tokens and its output {'changed' if control.changed else 'DID NOT CHANGE'}"
    )
    return _problems(rows, moved, control)


def _problems(rows: Sequence[report.Row], moved: int, control: Control) -> list[str]:
    found = [f"{row.name}: the output differs from that of one engine" for row in rows if not row.equal]
    found += [f"{row.name}: D fetched no KV from P" for row in rows if row.load is None]
    recorded = sum(row.load.tokens for row in rows if row.load is not None)
    if moved <= 0 or moved < recorded - len(rows):
        found.append(f"D's own metric counts {moved} tokens from elsewhere, its log {recorded}")
    if not control.intact_equal:
        found.append("negative control: the output differs although nothing was zeroed")
    if not control.fetched_tokens:
        found.append("negative control: D fetched no KV from P")
    if not control.changed:
        found.append("negative control: a zeroed block did not change the output, so equality proves nothing")
    return found


def _prompts(model: str) -> list[tuple[str, Prompt]]:
    """Prompts from shorter than a block (32 tokens on the CPU) to several prefill chunks (512 tokens)."""

    def chat(tokens: int, skip: int) -> Prompt:
        messages = [{"role": "system", "content": "Answer briefly."}]
        return Prompt([*messages, {"role": "user", "content": _text(model, tokens, skip)}], chat=True)

    return [
        ("shorter than a block", Prompt("Hello, my name is")),
        ("four blocks", Prompt(_text(model, 128, 0))),
        ("blocks and a rest", Prompt(_text(model, 300, 5))),
        ("two chunks", Prompt(_text(model, 800, 10))),
        ("four chunks", Prompt(_text(model, 1900, 15))),
        ("chat, short", chat(20, 20)),
        ("chat, two chunks", chat(700, 25)),
    ]


def _text(model: str, tokens: int, skip: int) -> str:
    """Return a text of about ``tokens`` tokens, another one for each ``skip``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    # More characters than these tokens can have, and not so many that the tokenizer warns.
    text = "\n".join(local_model.training_text()[skip : skip + 20])[: 8 * tokens]
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
