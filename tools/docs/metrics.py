"""``docs/observability.md``: every metric, from the code that registers them."""

from __future__ import annotations


def render() -> str:
    """Return the table of metrics as Markdown."""
    from kvconnect.connectors import metrics  # needs vLLM

    lines = ["| metric | type | own labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in metrics.METRICS:
        name = metrics.PREFIX + metric.name + ("_total" if metric.kind == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines)
