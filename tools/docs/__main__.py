"""``python -m tools.docs``: rewrite the generated parts of ``docs/``."""

from __future__ import annotations

from bench.report import ROOT, between
from tools.docs import contracts, examples, metrics, options, proxy, ray, scale

BEGIN = "<!-- begin: written by python -m tools.docs -->"
END = "<!-- end: written by python -m tools.docs -->"
PAGES = {
    ROOT / "docs" / "config.md": options.render,
    ROOT / "docs" / "contracts.md": contracts.render,
    ROOT / "docs" / "observability.md": metrics.render,
    ROOT / "docs" / "proxy.md": proxy.render,
    ROOT / "docs" / "ray.md": ray.render,
    ROOT / "docs" / "scale.md": scale.render,
    ROOT / "docs" / "write-a-pipe.md": examples.render,
}


def main() -> None:
    """Rewrite them all."""
    for page, render in PAGES.items():
        page.write_text(between(page.read_text("utf-8"), BEGIN, END, render()), "utf-8")


if __name__ == "__main__":
    main()
