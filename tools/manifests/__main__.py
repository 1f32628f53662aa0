"""``python -m tools.manifests``: write ``deploy/kubernetes/kvconnect-pd.yaml``, what the chart renders by default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helm_python import Chart

from bench.report import ROOT

CHART = ROOT / "deploy" / "helm" / "kvconnect-pd"
PLAIN = ROOT / "deploy" / "kubernetes" / "kvconnect-pd.yaml"
_HEAD = """\
# Prefill engines, decode engines and a proxy: deploy/helm/kvconnect-pd as it renders by default, for those without
# Helm. Written by python -m tools.manifests; docs/kubernetes.md says what to change.
"""


def render(values: Mapping[str, Any], name: str, chart: Path = CHART) -> str:
    """Return the manifests of a release called ``name``, as one YAML stream.

    Raises:
        helm_python.HelmError: the chart's schema does not allow ``values``, or a template fails.

    """
    with Chart.load(chart) as loaded:
        loaded.validate_schema(dict(values))
        rendered = loaded.render(dict(values), name=name)
    parts = (text.strip().removeprefix("---\n") for _, text in sorted(rendered.items()))
    return "---\n".join(f"{part}\n" for part in parts if part)


def plain() -> str:
    """Return the default manifests, with a word of where they come from."""
    return _HEAD + render({}, "pd")


def main() -> None:
    """Write them."""
    PLAIN.write_text(plain(), "utf-8")


if __name__ == "__main__":
    main()
