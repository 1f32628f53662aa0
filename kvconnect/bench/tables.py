"""Tables of a results file, and the file itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def save(results: dict[str, Any], path: Path) -> None:
    """Write a results file, one row a line."""
    head = {key: value for key, value in results.items() if key != "rows"}
    rows = ",\n".join("    " + json.dumps(row) for row in results["rows"])
    text = json.dumps(head, indent=2)[:-2] + ',\n  "rows": [\n' + rows + "\n  ]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def render(results: dict[str, Any] | None) -> str:
    """Return everything that a results file says, as Markdown."""
    if results is None:
        return "No run was recorded yet."
    rows: list[Row] = results["rows"]
    parts = [machine(results)]
    parts += [_section(title, [row for row in rows if _kind(row) == title]) for title in _titles(rows)]
    parts.append(_goals(rows))
    return "\n\n".join(parts)


def machine(results: dict[str, Any]) -> str:
    """Return what was run, where, and with which versions."""
    hardware = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in results["hardware"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"`{results['command']}` at commit `{results['commit']}`.  \nMachine: {hardware}.  \nVersions: {versions}."


def _kind(row: Row) -> str:
    return str(row["case"]).split(" ", 1)[0]


def _titles(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(_kind(row) for row in rows))


def _section(title: str, rows: Sequence[Row]) -> str:
    references = list(dict.fromkeys(row["reference"] for row in rows if row["reference"]))
    head = ["case", "pipe", "GB/s", "p50 µs", "p99 µs", *(f"× {name}" for name in references)]
    lines = [_line(head), _line(["---", "---", *("---:" for _ in head[2:])])]
    measured = dict.fromkeys((row["case"], row["backend"]) for row in rows if row["backend"] not in references)
    for case, backend in measured:
        mine = {row["reference"]: row for row in rows if (row["case"], row["backend"]) == (case, backend)}
        first = next(iter(mine.values()))
        speeds = [f"{first['gb_per_s']:.2f}", _us(first["p50_us"]), _us(first["p99_us"])]
        lines.append(_line([case, backend, *speeds, *(_ratio(mine.get(name)) for name in references)]))
    return f"### {title}\n\n" + "\n".join(lines) + "\n\n" + _references(rows, references)


def _references(rows: Sequence[Row], references: Sequence[str]) -> str:
    lines = [_line(["the references, GB/s (p50 µs)", *references]), _line(["---", *("---:" for _ in references)])]
    for case in dict.fromkeys(row["case"] for row in rows):
        own = {row["backend"]: row for row in rows if row["case"] == case and row["reference"] is None}
        cells = [
            f"{own[name]['gb_per_s']:.2f} ({_us(own[name]['p50_us'])})" if name in own else "" for name in references
        ]
        lines.append(_line([case, *cells]))
    return "\n".join(lines)


def _goals(rows: Sequence[Row]) -> str:
    held = [row for row in rows if row["goal"] is not None]
    missed = [row for row in held if not row["met"]]
    lines = ["### Goals", "", f"{len(held) - len(missed)} of {len(held)} met."]
    if missed:
        lines += ["", "Missed:", ""]
        lines += [f"- {row['backend']}, {row['case']}: {_shortfall(row)}" for row in missed]
    return "\n".join(lines)


def _shortfall(row: Row) -> str:
    if row["reference"] is None:
        return f"p50 {_us(row['p50_us'])} µs, goal at most {row['goal']:g} µs"
    return f"{row['ratio']:.2f} × {row['reference']}, goal at least {row['goal']:g}"


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    if row["goal"] is None:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} ({'met' if row['met'] else 'missed'}: {row['goal']:g})"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
