"""``docs/contracts.md``: the two contracts, from the docstrings of the modules that define them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

from bench.report import ROOT

#: Heading, module, and which of its classes belong to the contract.
CONTRACTS = (
    ("Pipes", "kvconnect/pipes/base.py", ("Pipe", "PipeSpec", "Transfer", "Traits", "Channel", "Reach", "Verdict")),
    (
        "Lookup buffers",
        "kvconnect/buffers/base.py",
        ("LookupBuffer", "Grant", "LookupKey", "SchedulerEnd", "WorkerEnd", "EndSettings", "Want", "Claim", "Miss"),
    ),
)


def render() -> str:
    """Return the contracts as Markdown."""
    parts = []
    for title, path, names in CONTRACTS:
        module = ast.parse((ROOT / path).read_text("utf-8"))
        parts.append(f"## {title}\n\n`{path}`\n\n{_text(module)}")
        classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
        for name in names:
            parts += _class(classes[name])
    return "\n\n".join(parts)


def _class(node: ast.ClassDef) -> Iterator[str]:
    yield f"### {node.name}\n\n{_text(node)}"
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            marks = {ast.unparse(mark) for mark in child.decorator_list}
            label = "abstract " if "abstractmethod" in marks else "class method " if "classmethod" in marks else ""
            if "property" in marks:
                yield f"#### {node.name}.{child.name}\n\n{_text(child)}"
            else:
                head = f"{child.name}({ast.unparse(child.args)})"
                head += f" -> {ast.unparse(child.returns)}" if child.returns is not None else ""
                yield f"#### {node.name}.{child.name}\n\n{label}`{head}`\n\n{_text(child)}"


def _text(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """Return a docstring as Markdown: its sections in bold, entries of ``Args`` and ``Raises`` as lists."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    lines, in_section = [], False
    for line in text.splitlines():
        if line in {"Args:", "Raises:", "Returns:"}:
            lines += [f"**{line[:-1]}**", ""]
            in_section = True
        elif in_section and re.match(r"    \w[\w, ]*: ", line):
            names, _, rest = line.strip().partition(": ")
            lines.append(f"- `{names}`: {rest}")
        else:
            in_section = in_section and (line.startswith(" ") or not line)
            lines.append(line.strip() if in_section else line)
    return "\n".join(lines)
