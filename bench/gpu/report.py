"""Tables and a plot of the GPU results: what a run prints at its end and what ``docs/benchmarks.md`` shows.

``python -m bench.gpu.report`` rewrites that part of the document. The run itself draws
the plot, if matplotlib is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.report import DOCUMENT, ROOT
from kvconnect.bench import tables
from kvconnect.bench.tables import Row

RESULTS = ROOT / "bench" / "results" / "h200x2.json"
PLOT = ROOT / "docs" / "img" / "h200x2.svg"
BEGIN = "<!-- begin: written by python -m bench.gpu.report -->"
END = "<!-- end: written by python -m bench.gpu.report -->"
_NUMBER = "---:"
_PLOTTED = "268 MB"


def render(results: dict[str, Any] | None, *, plotted: bool) -> str:
    """Return everything that a results file says, as Markdown."""
    if results is None:
        return "No run was recorded yet."
    rows: list[Row] = results["rows"]
    parts = [tables.machine(results), goals(rows)]
    if plotted:
        parts.append(f"![GB/s of every contender, by case](img/{PLOT.name})")
    parts += [_case(name, [row for row in rows if row["case"] == name]) for name in _names(rows)]
    left_out = results.get("left_out", {})
    if left_out:
        parts.append("### Not measured\n\n" + "\n".join(f"- {what}: {why}" for what, why in left_out.items()))
    return "\n\n".join(parts)


def goals(rows: Sequence[Row]) -> str:
    """Return a table of the goals and what was reached."""
    held = [row for row in rows if row["goal"] is not None]
    lines = ["### Goals on GPUs", "", f"{sum(bool(row['met']) for row in held)} of {len(held)} met.", ""]
    lines += [_line(["case", "contender", "goal", "reached", ""]), _line(["---", "---", "---", _NUMBER, "---"])]
    lines += [
        _line([row["case"], row["backend"], _wanted(row), _reached(row), "met" if row["met"] else "**missed**"])
        for row in held
    ]
    return "\n".join(lines)


def document(text: str, results: dict[str, Any] | None, *, plotted: bool) -> str:
    """Return ``text`` with `render`'s tables between the markers; raise `ValueError` if it lacks one."""
    return report.between(text, BEGIN, END, render(results, plotted=plotted))


def update() -> None:
    """Rewrite the document from the results file."""
    results = report.load(RESULTS)
    text = document(DOCUMENT.read_text(encoding="utf-8"), results, plotted=PLOT.exists())
    DOCUMENT.write_text(text, encoding="utf-8")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel of bars for each case of 268 MB, as SVG."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

    mpl.use("svg")
    # Text stays text, and the same numbers give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvconnect"})
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    names = [name for name in _names(rows) if _PLOTTED in name and bars(rows, name)]
    if not names:
        return
    heights = [2 + len(bars(rows, name)) for name in names]
    size = (8, 0.6 + 0.22 * sum(heights))
    figure, panels = plt.subplots(len(names), 1, figsize=size, squeeze=False, height_ratios=heights)
    for panel, name in zip(panels[:, 0], names, strict=True):
        found = bars(rows, name)
        panel.barh(list(found), list(found.values()), color=[_colour(label) for label in found])
        panel.invert_yaxis()
        panel.set_title(name, loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
        panel.bar_label(panel.containers[0], fmt="%.0f", fontsize=7, padding=2)
    panels[-1, 0].set_xlabel("GB/s")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def bars(rows: Sequence[Row], case: str) -> dict[str, float]:
    """Return GB/s by contender for one case, the fastest first."""
    found = {
        row["backend"]: float(row["gb_per_s"]) for row in rows if row["case"] == case and row["gb_per_s"] is not None
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _colour(label: str) -> str:
    if label.startswith(("cuda_ipc", "nccl", "nixl", "sum")):
        return "tab:blue"
    return "tab:gray" if label.startswith(("copy", "local", "raw")) else "tab:orange"


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def _case(name: str, rows: Sequence[Row]) -> str:
    if rows[0]["gb_per_s"] is None:
        lines = [_line(["contender", "MB", "moved, MB"]), _line(["---", _NUMBER, _NUMBER])]
        lines += [
            _line([row["backend"], f"{row['bytes'] / 1e6:.1f}", f"{row['piece_bytes'] / 1e6:.0f}"]) for row in rows
        ]
        return f"### {name}\n\n" + "\n".join(lines)
    references = list(dict.fromkeys(row["reference"] for row in rows if row["reference"]))
    head = ["contender", "piece", "GB/s", "p50 µs", "p99 µs", *(f"× {name}" for name in references)]
    lines = [_line(head), _line(["---", *[_NUMBER] * (len(head) - 1)])]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == backend]
        first = own[0]
        label = backend if first["sms"] is None else f"{backend} ({first['sms']} seen)"
        numbers = [f"{first['gb_per_s']:.1f}", _us(first["p50_us"]), _us(first["p99_us"])]
        ratios = {row["reference"]: f"{row['ratio']:.2f}" for row in own if row["ratio"] is not None}
        lines.append(_line([label, _size(first["piece_bytes"]), *numbers, *(ratios.get(r, "") for r in references)]))
    return f"### {name}\n\n" + "\n".join(lines)


def _wanted(row: Row) -> str:
    match row["limit"]:
        case "ratio":
            return f"≥ {row['goal']:g} × {row['reference']}"
        case "gb_per_s":
            return f"≥ {row['goal']:g} GB/s"
        case "bytes":
            return f"≤ {row['goal'] / 1e6:g} MB"
        case limit:
            return f"{str(limit).removesuffix('_us')} ≤ {row['goal']:g} µs"


def _reached(row: Row) -> str:
    match row["limit"]:
        case "ratio":
            return f"{row['ratio']:.2f}"
        case "gb_per_s":
            return f"{row['gb_per_s']:.1f} GB/s"
        case "bytes":
            return f"{row['bytes'] / 1e6:.1f} MB"
        case limit:
            return f"{_us(row[str(limit)])} µs"


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    update()
