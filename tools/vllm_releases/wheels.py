"""Releases on the package index, and single files of their wheels by HTTP range requests.

A CUDA wheel of vLLM has 300 MB; some thirty of its files are needed. What was read is
kept under ``.cache/vllm-releases``.
"""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from packaging.version import Version
from remotezip import RemoteZip

from tools.vllm_releases.kinds import ROOT
from tools.vllm_releases.source import Tree

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

CACHE = ROOT / ".cache" / "vllm-releases"
INDEX = "https://pypi.org"
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Wheel:
    """One release's wheel on the index."""

    version: str
    filename: str
    url: str
    uploaded: str


def releases(supported: SpecifierSet, index: str = INDEX) -> list[Wheel]:
    """Return the wheels of every final release that ``supported`` admits, oldest first.

    Raises:
        httpx.HTTPError: the index does not answer.

    """
    url = f"{index}/pypi/vllm/json"
    answer = httpx.get(url, timeout=_TIMEOUT_S, follow_redirects=True).raise_for_status().json()
    found = []
    for version in sorted((v for v in answer["releases"] if supported.contains(v, prereleases=False)), key=Version):
        wheels = [file for file in answer["releases"][version] if file["filename"].endswith("_x86_64.whl")]
        if wheels:  # of several builds the first; their Python is the same
            first = min(wheels, key=lambda file: str(file["upload_time"]))
            found.append(
                Wheel(version, first["filename"], urllib.parse.urljoin(url, first["url"]), first["upload_time"][:10])
            )
    return found


def tree(wheel: Wheel, cache: Path = CACHE) -> Tree:
    """Return a release's source; files are fetched when they are first asked for.

    Raises:
        remotezip.RemoteIOError: the index does not serve parts of files, or fails.

    """
    return Tree(_reader(wheel, cache / wheel.version))


def _reader(wheel: Wheel, folder: Path) -> Callable[[str], str | None]:
    @functools.cache
    def archive() -> RemoteZip:
        return RemoteZip(wheel.url, timeout=_TIMEOUT_S)

    @functools.cache
    def names() -> frozenset[str]:
        listing = folder / "names.json"
        if not listing.exists():
            _write(listing, json.dumps([name for name in archive().namelist() if name.endswith(".py")]))
        return frozenset(json.loads(listing.read_text("utf-8")))

    def read(path: str) -> str | None:
        if path not in names():
            return None
        kept = folder / path
        if not kept.exists():
            _write(kept, archive().read(path).decode())
        return kept.read_text("utf-8")

    return read


def _write(path: Path, text: str) -> None:
    """Write whole or not at all: a run that was stopped leaves no half file to be believed later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
