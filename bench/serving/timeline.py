"""Where the time of one hand-over goes, as spans and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.serving.goals import ENGINE_RATE
from kvconnect.bench.tables import Row

#: What each phase of a row is the end of, in order, and whose time it is.
_STEPS: Final = {
    "seen": ("request to D's scheduler (HTTP, frontend)", "vLLM"),
    "claimed": ("claim at P (control)", "control"),
    "planned": ("scheduler's step", "vLLM"),
    "begun": ("scheduler → worker", "vLLM"),
    "launched": ("placing ids, launch", "pipe"),
    "moved": ("copy, and hearing of its end", "wire"),
    "confirmed": ("P vouches for it (control)", "control"),
    "reported": ("until vLLM asks again", "vLLM"),
    "answered": ("scheduler, decode step, answer (HTTP)", "vLLM"),
}
_COLOURS: Final = {"vLLM": "tab:gray", "control": "tab:orange", "pipe": "tab:green", "wire": "tab:blue"}


@dataclass(frozen=True)
class Span:
    """One step: milliseconds since D's leg was sent."""

    what: str
    whose: str
    begin_ms: float
    end_ms: float

    @property
    def ms(self) -> float:
        """How long it took."""
        return self.end_ms - self.begin_ms


def spans(phases_ms: Mapping[str, float]) -> list[Span]:
    """Return the steps of a row's ``phases_ms``, each from the end of the one before it."""
    found, before = [], 0.0
    for name, (what, whose) in _STEPS.items():
        if name in phases_ms:
            end = max(before, phases_ms[name])
            found.append(Span(what, whose, before, end))
            before = end
    return found


def choose(rows: Iterable[Row]) -> list[Row]:
    """Return the rows to show: each contender's longest hand-over with phases, on a fresh pool of two devices."""
    found = [row for row in rows if row.get("phases_ms") and row["pool"] == "fresh" and row["place"] != "one GPU"]
    longest = max((row["prompt_tokens"] for row in found), default=0)
    newest = max((_release(row) for row in found), default=[])
    return [row for row in found if row["prompt_tokens"] == longest and _release(row) == newest]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel of spans for each row, with the wire's own time beneath, as SVG."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

    mpl.use("svg")
    # Text stays text, and the same numbers give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvconnect"})
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    drawn = [[*spans(row["phases_ms"]), _wire(row)] for row in rows]
    size = (9, 0.8 + sum(0.5 + 0.24 * len(each) for each in drawn))
    figure, panels = plt.subplots(
        len(rows), 1, figsize=size, squeeze=False, sharex=True, height_ratios=[2 + len(each) for each in drawn]
    )
    for panel, row, steps in zip(panels[:, 0], rows, drawn, strict=True):
        for place, span in enumerate(steps):
            panel.barh(
                place,
                span.ms,
                left=span.begin_ms,
                color=_COLOURS[span.whose],
                alpha=1 if place < len(steps) - 1 else 0.4,
            )
            panel.text(span.end_ms, place, f" {span.ms:.2f}", va="center", fontsize=7)
        panel.set_yticks(range(len(steps)), [span.what for span in steps], fontsize=7)
        panel.invert_yaxis()
        panel.tick_params(axis="x", labelsize=7)
        title = f"{row['backend']}, {row['mode']}: {row['prompt_tokens']:,} tokens, {row['bytes'] / 1e9:.2f} GB"
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xlim(0, 1.08 * max(span.end_ms for each in drawn for span in each))
    panels[-1, 0].set_xlabel("ms since D's leg was sent")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def _wire(row: Row) -> Span:
    """Return the least that the link needs, beginning when the read did."""
    begin = float(row["phases_ms"].get("launched", 0.0))
    return Span("the link's own time", "wire", begin, begin + row["bytes"] / ENGINE_RATE * 1e3)


def _release(row: Row) -> list[int]:
    return [int(part) for part in str(row["vllm"]).split("+")[0].split(".") if part.isdigit()]
