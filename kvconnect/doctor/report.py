"""A report, as JSON and as text.

``{"schema": 1, "kvconnect", "verdict", "host", "peer", "findings": [Finding], "paths": [Path]}``;
``peer`` is ``null`` or ``{"address", "kind": "doctor" | "engine", "engine"}``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvconnect import __version__
from kvconnect.doctor.findings import Finding, Path, worst

SCHEMA = 1
_SAYS = {
    "ok": "all is well",
    "note": "all is well",
    "slow": "it works, and is slower than it could be",
    "bad": "something does not work",
}


@dataclass
class Report:
    """What one examination has found."""

    host: dict[str, Any]
    peer: dict[str, str] | None = None
    findings: list[Finding] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst of all findings."""
        return worst(self.findings)

    @property
    def status(self) -> int:
        """The exit status: 1 if something does not work, or is slow."""
        return int(self.verdict in ("slow", "bad"))

    def to_json(self) -> str:
        """Return it as JSON."""
        head = {
            "schema": SCHEMA,
            "kvconnect": __version__,
            "verdict": self.verdict,
            "host": self.host,
            "peer": self.peer,
        }
        findings, paths = map(dataclasses.asdict, self.findings), map(dataclasses.asdict, self.paths)
        return json.dumps({**head, "findings": list(findings), "paths": list(paths)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` of this very version wrote."""
        data = json.loads(text)
        findings = [Finding(**row) for row in data["findings"]]
        return cls(data["host"], data["peer"], findings, [Path(**row) for row in data["paths"]])

    def to_text(self) -> str:
        """Return it for people."""
        lines = [*self._findings(), *self._table()]
        lines.append(f"{self.host.get('name')}: {_SAYS[self.verdict]}")
        return "\n".join(lines)

    def _findings(self) -> Iterator[str]:
        width = max((len(finding.name) for finding in self.findings), default=0)
        for finding in self.findings:
            yield f"{finding.verdict:4}  {finding.name:{width}}  {finding.what}"
            if finding.cure:
                yield f"{'':{width + 6}}  → {finding.cure}"

    def _table(self) -> Iterator[str]:
        if not self.paths:
            return
        first = self.paths[0]
        yield ""
        yield f"paged blocks of {first.block_bytes} bytes in scattered pieces of {first.piece_bytes}"
        rows: list[Sequence[str]] = [("PIPE", "TAKEN", "MB", "GB/s", "OF", "RATIO", "p50 µs", "p99 µs")]
        for path in self.paths:
            ratio = "" if path.ratio is None else f"{path.ratio:.2g}"
            figures = (f"{path.gb_per_s:.3g}", path.ceiling, ratio, f"{path.p50_us:.0f}", f"{path.p99_us:.0f}")
            rows.append((path.pipe, "yes" if path.taken else "", f"{path.bytes / 1e6:.3g}", *figures))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield ""
