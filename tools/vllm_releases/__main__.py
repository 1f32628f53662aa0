"""``python -m tools.vllm_releases``: which vLLM releases have what kvconnect relies on.

Reads the source inside the wheels on the package index, imports nothing of it, and
writes ``docs/vllm-versions.md`` and ``docs/vllm-versions.json``. Exits with 1 if a
release that ``pyproject.toml`` says is supported lacks something that is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bench.report import between
from tools.vllm_releases import report
from tools.vllm_releases.kinds import ROOT
from tools.vllm_releases.source import Tree

DOCUMENT = ROOT / "docs" / "vllm-versions.md"
RESULTS = ROOT / "docs" / "vllm-versions.json"
BEGIN = "<!-- begin: written by python -m tools.vllm_releases -->"
END = "<!-- end: written by python -m tools.vllm_releases -->"


def supported(pyproject: Path = ROOT / "pyproject.toml") -> SpecifierSet:
    """Return the releases of vLLM that the extra ``vllm`` admits."""
    extras = tomllib.loads(pyproject.read_text("utf-8"))["project"]["optional-dependencies"]
    return Requirement(extras["vllm"][0]).specifier


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.vllm_releases", description=__doc__)
    parser.add_argument("--index", help="package index with PyPI's JSON interface (default: https://pypi.org)")
    parser.add_argument(
        "--tree",
        type=Path,
        help="check an unpacked wheel or site-packages instead, and write nothing",
        metavar="FOLDER",
    )
    parser.add_argument("--only", help="print what is found in this release, and write nothing", metavar="VERSION")
    options = parser.parse_args(arguments)
    if options.tree is not None:
        found = [report.examine(str(options.tree), "", Tree.folder(options.tree))]
    else:
        found = list(_fetch(options.index, options.only))
    for release in found:
        for title, finding in release["differs"].items():
            print(f"{release['release']}: {finding['state']}: {title}: {finding['detail']}")
    if options.tree is None and options.only is None:
        write(found)
    bad = report.broken(found)
    print(f"{len(found)} checked, {len(bad)} assumptions broken")
    return 1 if bad or not found else 0


def _fetch(index: str | None, only: str | None) -> Sequence[report.Release]:
    # Here, since reading a folder needs neither a network nor its libraries.
    from tools.vllm_releases import wheels

    admitted = SpecifierSet(f"=={only}") if only else supported()
    found = []
    for wheel in wheels.releases(admitted, index or wheels.INDEX):
        print(f"{wheel.version} ({wheel.filename}) …", file=sys.stderr)
        found.append(report.examine(wheel.version, wheel.uploaded, wheels.tree(wheel)))
    return found


def write(releases: Sequence[report.Release]) -> None:
    """Write the results and the document's tables."""
    data = report.results(releases, str(supported()))
    RESULTS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
    DOCUMENT.write_text(between(DOCUMENT.read_text("utf-8"), BEGIN, END, report.render(data)), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
