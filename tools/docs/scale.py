"""``docs/scale.md``: what engines were measured, and simulated, to cost each other."""

from __future__ import annotations

from typing import Any

from bench import report

RESULTS = report.ROOT / "bench" / "results" / "control.json"


def render() -> str:
    """Return the figures as Markdown: a table for each part, a column for each case of it."""
    results = report.load(RESULTS)
    if results is None:
        return "Nothing was recorded yet."
    machine = results["hardware"]
    text = (
        f"All engines on {machine['cores']} cores ({machine['cpu']}, {machine['memory_gib']} GiB); "
        f"load average before the run {machine['load_before']}."
    )
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    parts = [
        ("One producer among consumers", [case for case in cases if case.startswith("one producer")]),
        ("One consumer among producers", [case for case in cases if case.startswith("one consumer, ")]),
        ("What a consumer remembers", [case for case in cases if case.startswith("one consumer knows")]),
        ("All with all", [case for case in cases if case.endswith("simulated")]),
    ]
    return "\n\n".join([text, *(_table(title, found, results["rows"]) for title, found in parts if found)])


def _table(title: str, cases: list[str], rows: list[dict[str, Any]]) -> str:
    values = {(row["case"], row["measure"], row["unit"]): row["value"] for row in rows if row["case"] in cases}
    heads = [case.partition(", ")[2] if case.startswith("one ") and ", " in case else case for case in cases]
    lines = [f"### {title}", "", f"| | {' | '.join(heads)} |", f"| --- {'| --- ' * len(cases)}|"]
    for measure, unit in dict.fromkeys((measure, unit) for _, measure, unit in values):
        cells = [_cell(values.get((case, measure, unit))) for case in cases]
        lines.append(f"| {measure}{f', {unit}' if unit else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
