"""Results as a picture: GB/s over bytes, a panel for each kind of case."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from kvconnect.errors import ConfigError

SUFFIXES = (".png", ".svg")


def check(path: Path) -> None:
    """Raise `ConfigError` if no plot can be written to ``path``: now rather than after minutes of measuring."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot must name a .png or .svg file, got {str(path)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib (pip install 'kvconnect[bench]')")


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return ``(bytes, GB/s)`` points, smallest first, by kind of case and by what was measured."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        kind, _, what = str(row["case"]).partition(" ")
        panel = f"{kind}, {what.partition(', ')[2]}".rstrip(", ")
        found[panel][row["backend"]].setdefault(row["bytes"], row["gb_per_s"])
    return {
        panel: {name: sorted(points.items()) for name, points in lines.items()}
        for panel, lines in found.items()
        if not panel.startswith("ping-pong")
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture of ``results``; the file's suffix says which kind."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]

    panels = curves(results["rows"])
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(4.5 * max(1, len(panels)), 4), squeeze=False)
    for axis, (panel, lines) in zip(axes[0], panels.items(), strict=False):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=panel, xlabel="bytes", ylabel="GB/s", xscale="log", yscale="log")
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
