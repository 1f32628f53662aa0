"""Kinds of assumptions about vLLM's source, each able to say whether a release meets it."""

from __future__ import annotations

import ast
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.vllm_releases.source import Function, Tree, decorators, own_members, signature

ROOT = Path(__file__).resolve().parents[2]
FACADE = ROOT / "kvconnect" / "connectors" / "base.py"
CONNECTOR_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
#: Where vLLM calls connectors from; not all are in every release.
CALLERS = (
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.worker.kv_connector_model_runner_mixin",
    "vllm.v1.worker.gpu.kv_connector",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.distributed.kv_transfer.kv_transfer_state",
    "vllm.v1.attention.backends.utils",
    "vllm.distributed.kv_transfer.kv_connector.utils",
)
#: The classes that `KvConnector` derives from.
INTERFACE = ("KVConnectorBase_V1", "SupportsHMA")


@dataclass(frozen=True)
class Finding:
    """What a release says to an assumption.

    Args:
        state: ``absent`` is what kvconnect is written for, ``broken`` is not.
        detail: what differs; empty if nothing does.

    """

    state: Literal["holds", "absent", "broken"]
    detail: str = ""


HOLDS = Finding("holds")


@dataclass(frozen=True, kw_only=True)
class Assumption(ABC):
    """Something that kvconnect relies on.

    Args:
        used: the files below ``kvconnect/`` that rely on it.
        without: what these do in a release that lacks it; empty if they need it.

    """

    used: tuple[str, ...]
    without: str = ""

    @property
    @abstractmethod
    def title(self) -> str:
        """Name it, as Markdown."""

    @abstractmethod
    def check(self, tree: Tree) -> Finding:
        """Look at a release."""

    def lacking(self, what: str) -> Finding:
        """Return the finding for something that is not there."""
        return Finding("absent" if self.without else "broken", what)


@dataclass(frozen=True, kw_only=True)
class Name(Assumption):
    """``from module import name`` works."""

    module: str
    name: str

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return f"`{self.module}.{self.name}`"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        return HOLDS if tree.find(self.module, self.name) else self.lacking(f"{self.module} has no {self.name}")


@dataclass(frozen=True, kw_only=True)
class Members(Assumption):
    """A class has these methods or attributes, its own or inherited."""

    module: str
    cls: str
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return f"`{self.cls}`: " + ", ".join(f"`{name}`" for name in self.names)

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        members = tree.members(self.module, self.cls)
        if members is None:
            return self.lacking(f"{self.module} has no class {self.cls}")
        missing = [name for name in self.names if name not in members]
        return self.lacking(f"{self.cls} has no {', '.join(missing)}") if missing else HOLDS


@dataclass(frozen=True, kw_only=True)
class Call(Assumption):
    """A method takes the arguments that kvconnect gives it: so many by position, these by keyword."""

    module: str
    cls: str
    method: str
    arguments: int = 0
    keywords: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        given = ["…"] * self.arguments + [f"{name}=…" for name in self.keywords]
        return f"`{self.cls}.{self.method}({', '.join(given)})`"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        node = (tree.members(self.module, self.cls) or {}).get(self.method)
        if not isinstance(node, Function):
            return self.lacking(f"{self.cls} has no method {self.method}")
        args = node.args
        bound = "staticmethod" not in decorators(node)
        positional = [a.arg for a in (*args.posonlyargs, *args.args)][bound:]
        optional = {*positional[len(positional) - len(args.defaults) :]} if args.defaults else set()
        optional |= {a.arg for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None}
        given = {*positional[: self.arguments], *self.keywords}
        known = {*positional, *(a.arg for a in args.kwonlyargs)}
        fits = known - optional <= given <= known and self.arguments <= len(positional)
        return HOLDS if fits else Finding("broken", f"{self.cls}.{self.method} is called {signature(node)}")


@dataclass(frozen=True, kw_only=True)
class Hook(Assumption):
    """vLLM's interface has a method that `KvConnector` overrides, and calls that suit the one suit the other."""

    name: str
    used: tuple[str, ...] = ("connectors/base.py",)

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return f"`{self.name}`"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        theirs = interface(tree).get(self.name)
        if not isinstance(theirs, Function):
            return self.lacking(f"{' and '.join(INTERFACE)} have no {self.name}")
        why = unlike(facade()[self.name], theirs)
        return Finding("broken", f"{self.name}{signature(theirs)}: {why}") if why else HOLDS


@dataclass(frozen=True, kw_only=True)
class Called(Assumption):
    """vLLM's scheduler, engine or worker calls one of these methods: a hook that nobody calls is no hook."""

    names: tuple[str, ...]
    used: tuple[str, ...] = ("connectors/base.py",)

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return " or ".join(f"`{name}`" for name in self.names) + " is called"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        if any(not called(tree, module).isdisjoint(self.names) for module in CALLERS):
            return HOLDS
        return self.lacking(f"nobody calls {' or '.join(self.names)}")


@dataclass(frozen=True, kw_only=True)
class NothingElseIsAbstract(Assumption):
    """`KvConnector` implements every abstract method, so that it can be built."""

    used: tuple[str, ...] = ("connectors/base.py",)

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return "no other method is abstract"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        abstract = [name for name, node in interface(tree).items() if "abstractmethod" in decorators(node)]
        missing = sorted(set(abstract) - set(facade()))
        return Finding("broken", f"abstract and not implemented: {', '.join(missing)}") if missing else HOLDS


@dataclass(frozen=True, kw_only=True)
class Says(Assumption):
    """A function's or class's source has one of these expressions or statements in it."""

    module: str
    within: str
    any_of: tuple[str, ...]
    meaning: str

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return f"{self.meaning} (`{self.within}`)"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        cls, _, method = self.within.rpartition(".")
        node = (
            (tree.members(self.module, cls) or {}).get(method) if cls else (tree.find(self.module, method) or (0, 0))[1]
        )
        if not isinstance(node, ast.AST):
            return self.lacking(f"{self.module} has no {self.within}")
        written = ast.unparse(node)
        if any(text in written for text in self.any_of):
            return HOLDS
        return self.lacking(f"{self.within} does not say `{'` or `'.join(self.any_of)}`")


@dataclass(frozen=True, kw_only=True)
class BlocksCounted(Assumption):
    """Shapes that a backend gives its KV cache begin with the number of blocks, or with 2 and that number."""

    module: str
    cls: str

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return f"`{self.cls}.get_kv_cache_shape`: `(blocks, …)` or `(2, blocks, …)`"

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        node = (tree.members(self.module, self.cls) or {}).get("get_kv_cache_shape")
        if node is None:
            return self.lacking(f"{self.cls} has no get_kv_cache_shape")
        shapes = [
            [ast.unparse(dim) for dim in child.value.elts]
            for child in ast.walk(node)
            if isinstance(child, ast.Return) and isinstance(child.value, ast.Tuple)
        ]
        odd = [s for s in shapes if s[:1] != ["num_blocks"] and s[:2] != ["2", "num_blocks"]]
        if odd or not shapes:
            return Finding("broken", f"{self.cls}'s shapes are {', '.join(map(_tuple, odd)) or 'not literal'}")
        return HOLDS


@dataclass(frozen=True, kw_only=True)
class OneOf(Assumption):
    """A release meets at least one of these; which one is `kvconnect.connectors.compat`'s business."""

    parts: tuple[Assumption, ...]

    @property
    def title(self) -> str:
        """Name it, as Markdown."""
        return ", or ".join(part.title for part in self.parts)

    def check(self, tree: Tree) -> Finding:
        """Look at a release."""
        findings = [part.check(tree) for part in self.parts]
        if any(finding.state == "holds" for finding in findings):
            return HOLDS
        return Finding("broken", "; ".join(finding.detail for finding in findings))


def interface(tree: Tree) -> dict[str, ast.AST]:
    """Return what `KvConnector` inherits from vLLM."""
    found: dict[str, ast.AST] = {}
    for cls in reversed(INTERFACE):
        found |= tree.members(CONNECTOR_BASE, cls) or {}
    return found


@functools.cache
def called(tree: Tree, module: str) -> set[str]:
    """Return the names of all methods that a module calls."""
    body = tree.module(module)
    return {
        node.func.attr
        for node in (ast.walk(body) if body is not None else ())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }


@functools.cache
def facade() -> dict[str, Function]:
    """Return the methods that `KvConnector` defines for vLLM to call: its public ones and its constructor."""
    body = ast.parse(FACADE.read_text("utf-8"))
    node = next(n for n in ast.walk(body) if isinstance(n, ast.ClassDef) and n.name == "KvConnector")
    members = own_members(node).items()
    return {
        name: member
        for name, member in members
        if isinstance(member, Function) and (name == "__init__" or not name.startswith("_"))
    }


def unlike(ours: Function, theirs: Function) -> str:
    """Say why a call that suits ``theirs`` may not suit ``ours``; empty if it always does."""
    kinds = {"classmethod", "staticmethod", "property"}
    if (decorators(ours) & kinds) != (decorators(theirs) & kinds):
        return "one of them is a class method, static method or property"
    mine = [a.arg for a in (*ours.args.posonlyargs, *ours.args.args)]
    yours = [a.arg for a in (*theirs.args.posonlyargs, *theirs.args.args)]
    if mine[: len(yours)] != yours and not ours.args.vararg:
        return f"ours takes ({', '.join(mine)})"
    required = mine[: len(mine) - len(ours.args.defaults)]
    if len(required) > len(yours):
        return f"ours needs {', '.join(required[len(yours) :])} besides"
    keywords = {a.arg for a in theirs.args.kwonlyargs} - {*mine, *(a.arg for a in ours.args.kwonlyargs)}
    if not ours.args.kwarg and (keywords or theirs.args.kwarg):
        return f"ours takes no keyword {', '.join(sorted(keywords)) or 'arguments'}"
    return ""


def _tuple(shape: list[str]) -> str:
    return f"({', '.join(shape)})"
