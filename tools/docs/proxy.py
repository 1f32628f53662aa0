"""``docs/proxy.md``: the proxy's options, and what it was measured to add to a request."""

from __future__ import annotations

from typing import Any

from bench import report
from kvconnect.proxy.settings import Settings
from tools.docs import options

RESULTS = report.ROOT / "bench" / "results" / "proxy.json"


def render() -> str:
    """Return both parts as Markdown."""
    return f"## Options\n\n{options.table(Settings)}\n\n## What it adds\n\n{_measured(report.load(RESULTS))}"


def _measured(results: dict[str, Any] | None) -> str:
    if results is None:
        return "Nothing was recorded yet."
    machine = results["hardware"]
    (rate,) = {row["requests_per_s"] for row in results["rows"]}
    text = (
        f"{rate:g} requests a second; {machine['cores']} cores ({machine['cpu']}) for the proxy, both servers and the "
        f"client; load average before the run {machine['load_before']}. Times in ms.\n"
    )
    if machine["load_before"] > machine["cores"] / 4:
        text += "\nOther work kept these cores busy: all times are mostly waits for a core, not what the proxy costs.\n"
    lines = [
        text,
        "| answer | way | more than | p50 | p99 | more, p50 | more, p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        over = ("over_p50_us", "over_p99_us") if row["reference"] else ()
        times = [f"{row[name] / 1000:.1f}" for name in ("p50_us", "p99_us", *over)] + ["", ""]
        lines.append(f"| {row['case']} | {row['backend']} | {row['reference'] or ''} | {' | '.join(times[:4])} |")
    return "\n".join(lines)
