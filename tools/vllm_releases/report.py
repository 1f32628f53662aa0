"""What was found in each release: as data, and as the tables of ``docs/vllm-versions.md``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tools.vllm_releases.assumptions import ASSUMPTIONS, SECTIONS, WATCHED
from tools.vllm_releases.source import Tree, signature

SCHEMA = 1
_WATCHED = (
    "Members that appeared (+), went (–) or take other arguments (→), in the classes that kvconnect deals with, "
    "whether it uses them or not."
)
_MARK = {"holds": "✓", "absent": "–", "broken": "**✗**"}

#: A release's entry in the results, as JSON has it.
Release = dict[str, Any]


def examine(version: str, uploaded: str, tree: Tree) -> Release:
    """Check every assumption in one release.

    ``differs`` has those that do not hold, by title; ``members`` the watched classes' members with their parameters.
    """
    findings = {assumption.title: assumption.check(tree) for assumption in ASSUMPTIONS}
    return {
        "release": version,
        "uploaded": uploaded,
        "differs": {
            title: {"state": finding.state, "detail": finding.detail}
            for title, finding in findings.items()
            if finding.state != "holds"
        },
        "members": {
            cls: {
                name: signature(node)
                for name, node in sorted((tree.members(module, cls) or {}).items())
                if not name.startswith("_") or name == "__init__"
            }
            for module, cls in WATCHED
        },
    }


def results(releases: Sequence[Release], supported: str) -> dict[str, Any]:
    """Return everything that is committed."""
    return {"schema": SCHEMA, "supported": supported, "assumptions": len(ASSUMPTIONS), "releases": list(releases)}


def broken(releases: Iterable[Release]) -> list[str]:
    """Return what kvconnect needs and some release lacks, one line each."""
    return [
        f"vLLM {release['release']}: {title}: {finding['detail']}"
        for release in releases
        for title, finding in release["differs"].items()
        if finding["state"] == "broken"
    ]


def changes(before: Release, after: Release) -> list[str]:
    """Return what became of the watched classes between two releases."""
    lines = []
    for cls, now in after["members"].items():
        then = before["members"].get(cls, {})
        parts = [f"+ `{name}{now[name]}`" for name in now if name not in then]
        parts += [f"– `{name}`" for name in then if name not in now]
        parts += [f"`{name}{then[name]}` → `{now[name]}`" for name in now if name in then and then[name] != now[name]]
        if parts:
            lines.append(f"`{cls}`: {', '.join(parts)}")
    return lines


def render(data: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    releases: list[Release] = data["releases"]
    names = [release["release"] for release in releases]
    bad = {title for release in releases for title, f in release["differs"].items() if f["state"] == "broken"}
    parts = [
        f"{len(names)} releases, {names[0]} to {names[-1]}, against {data['assumptions']} assumptions: "
        + (f"{len(bad)} of them broken somewhere." if bad else "none is broken."),
        "### Where releases differ",
        "✓ holds · – absent, and kvconnect is written for that · ✗ broken",
        _table(["kvconnect relies on", *names, "without it"], list(_rows(releases))),
        "### What changed from release to release",
        _WATCHED,
        _table(["release", "uploaded", "changes"], list(_history(releases))),
        "### Everything that is checked",
        *(_section(title) for title in SECTIONS),
    ]
    return "\n\n".join(parts)


def _rows(releases: Sequence[Release]) -> Iterable[list[str]]:
    for assumption in ASSUMPTIONS:
        found = [release["differs"].get(assumption.title, {"state": "holds"})["state"] for release in releases]
        if set(found) != {"holds"}:
            yield [assumption.title, *(_MARK[state] for state in found), assumption.without]


def _history(releases: Sequence[Release]) -> Iterable[list[str]]:
    yield [releases[0]["release"], releases[0]["uploaded"], "(the first)"]
    for before, after in pairwise(releases):
        yield [after["release"], after["uploaded"], "<br>".join(changes(before, after)) or "nothing"]


def _section(title: str) -> str:
    rows = [[a.title, ", ".join(f"`{path}`" for path in a.used)] for a in SECTIONS[title]]
    return f"#### {title}\n\n" + _table(["vLLM", "relied upon in `kvconnect/`"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
