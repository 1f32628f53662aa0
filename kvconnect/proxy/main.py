"""``python -m kvconnect proxy``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields

from kvconnect.errors import ConfigError
from kvconnect.proxy.policies import POLICIES
from kvconnect.proxy.settings import Settings


def parser() -> argparse.ArgumentParser:
    """Return the command line: each of `Settings` under its name, without the ``_s`` of seconds."""
    found = argparse.ArgumentParser(
        prog="python -m kvconnect proxy", description="Serve prefilling and decoding servers as one."
    )
    found.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    found.add_argument("--port", type=_port, default=8000, help="port to listen on (default: %(default)s)")
    for field in fields(Settings):
        _add(found, field.name, field.default)
    return found


_HELP = {
    "prefill": "prefill servers; dns+http://NAME:PORT stands for one at each address of the name",
    "decode": "decode servers, likewise",
    "prefill_policy": "which of several prefill servers gets a request",
    "decode_policy": "which of several decode servers gets it",
    "prefix_characters": "how much of a prompt's beginning prefix_aware looks at",
    "retries": "how often a request that no server has begun to answer is given to another one",
    "connect_timeout_s": "for opening a connection",
    "prefill_timeout_s": "for a whole prefill; afterwards the decode server computes alone",
    "decode_timeout_s": "for the decode server's headers, and between pieces of its answer",
    "client_timeout_s": "for a client that takes nothing of its answer; afterwards it is cut off",
    "stop_timeout_s": "for open requests to end, once it is told to stop; the rest is cut",
    "health_timeout_s": "for a server's answer to a check of its health",
    "health_interval_s": "between two checks of a server's health",
    "health_failures": "checks in a row after which a server is left out",
    "max_in_flight": "requests at a time; more are answered 503",
    "max_body_bytes": "largest request body that is accepted",
}


def _add(found: argparse.ArgumentParser, name: str, default: object) -> None:
    flag, text = f"--{name.removesuffix('_s').replace('_', '-')}", _HELP[name]
    if isinstance(default, tuple):
        shown = f"{text} (default: {default[0]})"
        found.add_argument(flag, nargs="+", action="extend", metavar="URL", help=shown)
    elif isinstance(default, str):
        found.add_argument(flag, choices=list(POLICIES), default=default, help=f"{text} (default: %(default)s)")
    else:
        unit = "SECONDS" if name.endswith("_s") else "BYTES" if name.endswith("_bytes") else "NUMBER"
        kind, shown = type(default), f"{text} (default: %(default)s)"
        found.add_argument(flag, dest=name, type=kind, default=default, metavar=unit, help=shown)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a TCP port (0 to 65535)")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Serve until interrupted."""
    options = vars(parser().parse_args(argv))
    host, port = options.pop("host"), options.pop("port")
    try:
        from kvconnect.proxy.serve import serve
    except ModuleNotFoundError as error:
        cure = "pip install 'kvconnect[proxy]'"
        raise ConfigError(f"the proxy needs the module {error.name!r} ({cure})") from error
    settings = Settings(**{name: value for name, value in options.items() if value is not None})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve(settings, host, port)
    return 0
