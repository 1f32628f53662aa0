"""The command line: ``python -m kvconnect list | doctor | bench | proxy | demo | keygen``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from kvconnect import __version__
from kvconnect.errors import KVConnectError

#: Commands whose options are their own: all arguments go through, --help too.
_OWN = {
    "doctor": "say what would work here, how fast, and the cure for what would not",
    "bench": "measure pipes beside memcpy and sockets",
    "proxy": "serve prefilling and decoding servers as one",
    "demo": "run a prefilling and a decoding engine and compare",
}
#: What argparse itself exits with when the command line is wrong.
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after a one-line error, or the command's own."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in _OWN:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    commands: dict[str, Callable[[], int]] = {
        "list": lambda: _list(as_json=options.json),
        **{name: partial(_own, name, rest) for name in _OWN},
        "keygen": lambda: _keygen(options.file),
    }
    try:
        return commands[options.command]()
    except KVConnectError as error:
        print(f"kvconnect {options.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # the reader of a pipe, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + 13  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        return 128 + 2  # as a shell reports SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvconnect", description="vLLM KV connectors over swappable pipes.")
    parser.add_argument("--version", action="version", version=f"kvconnect {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    listing = commands.add_parser("list", help="show the registered pipes, buffers and connectors")
    listing.add_argument("--json", action="store_true", help="as JSON, one object per backend")

    for name, text in _OWN.items():
        commands.add_parser(name, help=text, add_help=False)
    keygen = commands.add_parser("keygen", help="write a secret key to a new file and print its public key")
    keygen.add_argument("file", help="for the option secret_key_file; the public key is for the others' peer_keys")
    return parser


def _list(*, as_json: bool) -> int:
    from kvconnect import listing

    rows = listing.rows()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    table = [("KIND", "NAME", "AVAILABLE", "FROM", "TARGET")]
    table += [
        (row.kind, row.name, "yes" if row.available else "no", f"{row.distribution} {row.version}".strip(), row.target)
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    notes = ["", *(f"{row.reason}; {row.cure}".rstrip("; ") for row in rows)]
    for cells, note in zip(table, notes, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        if note:
            print(f"{'':{widths[0]}}  └ {note}")
    return 0


def _keygen(path: str) -> int:
    from kvconnect.keys import make_pair

    print(make_pair(path))
    return 0


def _own(command: str, arguments: Sequence[str]) -> int:
    status = importlib.import_module(f"kvconnect.{command}.main").main(list(arguments))
    return int(status or 0)
