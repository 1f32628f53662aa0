"""The Grafana dashboard, and whether what it asks for is what a `/metrics` page has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from bench.report import ROOT

DASHBOARD = ROOT / "examples" / "grafana" / "kvconnect.json"
#: What Prometheus adds to what it scrapes, and histograms to their buckets.
_GIVEN = {"instance", "job", "le"}
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def queries() -> Iterator[str]:
    """Return every query, with values for Grafana's variables."""
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield re.sub(r"\$\w+", ".*", target["expr"].replace("$__rate_interval", "5m"))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            name, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]).groups()
            yield f"group by ({label}) ({name})"


def problems(page: str) -> list[str]:
    """Say what a query cannot be answered from ``page``, in Prometheus' text format, and why; labels that have no
    value yet may be any."""
    series: dict[str, set[str]] = {}
    bare: set[str] = set()
    for family in text_string_to_metric_families(page):
        for suffix in _SUFFIXES.get(family.type, ()):
            name = family.name + suffix
            series[name] = {label for sample in family.samples for label in sample.labels} | _GIVEN
            if not family.samples:
                bare.add(name)
    found = []
    for query in queries():
        for name, labels in asked(query):
            if name not in series:
                found.append(f"{query}: there is no {name}")
            elif name not in bare and (more := labels - series[name]):
                found.append(f"{query}: {name} has no {sorted(more)}")
    return found


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """Parse a query; return each metric that it selects, with the labels that it wants of it."""
    wanted: list[tuple[str, set[str]]] = []
    grouped: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            wanted.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    for name, labels in wanted:
        yield name, labels | grouped
