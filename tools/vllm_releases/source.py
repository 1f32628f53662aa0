"""One release's source as syntax trees: looked up by name, never imported."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

#: Bodies of these belong to the module or class around them: ``if TYPE_CHECKING``, ``try: import``.
_TRANSPARENT = (ast.If, ast.Try, ast.With)


class Tree:
    """A release's modules, read when they are asked for.

    Args:
        read: path relative to the wheel's root (``vllm/config/model.py``) → text, or ``None`` if there is no such file.

    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self.module = functools.cache(self._module)
        self.members = functools.cache(self._members)

    @classmethod
    def folder(cls, root: Path) -> Tree:
        """Read an unpacked wheel, or a ``site-packages``."""
        return cls(lambda path: (root / path).read_text("utf-8") if (root / path).is_file() else None)

    def _module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        text = self._read(f"{path}.py")
        if text is None:
            text = self._read(f"{path}/__init__.py")
        return None if text is None else ast.parse(text)

    def find(self, module: str, name: str, depth: int = 8) -> tuple[str, ast.AST] | None:
        """Find what ``from module import name`` would give: the module that defines it, and its definition.

        Names that come from other distributions are found as the import that brings them.
        """
        body = self.module(module)
        if body is None or depth == 0:
            return None
        for node in statements(body):
            if name not in _bound(node):
                continue
            if isinstance(node, ast.ImportFrom):
                return self._follow(module, node, name, depth)
            return module, node
        submodule = self.module(f"{module}.{name}")
        return None if submodule is None else (f"{module}.{name}", submodule)

    def _follow(self, module: str, node: ast.ImportFrom, name: str, depth: int) -> tuple[str, ast.AST] | None:
        origin = self._origin(module, node)
        if origin.partition(".")[0] != module.partition(".")[0]:
            return module, node
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        return self.find(origin, original, depth - 1)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """Absolute name of the module that an import takes from."""
        if not node.level:
            return node.module or ""
        is_package = self._read(f"{module.replace('.', '/')}/__init__.py") is not None
        base = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _members(self, module: str, cls: str) -> dict[str, ast.AST] | None:
        """Return a class's methods and attributes, inherited ones too, or ``None`` if there is no such class."""
        home, node = self.find(module, cls) or ("", None)
        if not isinstance(node, ast.ClassDef):
            return None
        members: dict[str, ast.AST] = {}
        for base in reversed(node.bases):
            if isinstance(base, ast.Name):
                members |= self.members(home, base.id) or {}
        return members | own_members(node)


def own_members(node: ast.ClassDef) -> dict[str, ast.AST]:
    """Return what a class's body defines, and what its methods set on ``self``."""
    members: dict[str, ast.AST] = {}
    for child in ast.walk(node):
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.ctx, ast.Store)
            and isinstance(child.value, ast.Name)
            and child.value.id == "self"
        ):
            members[child.attr] = child
    for statement in statements(node):
        members |= dict.fromkeys(_bound(statement), statement)
    return members


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module's or class's body, those inside ``if``, ``try`` and ``with`` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            yield from statements(child)
        elif isinstance(child, ast.stmt):
            yield child
            if isinstance(child, _TRANSPARENT):
                yield from statements(child)


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return [node.name]
        case ast.Import() | ast.ImportFrom():
            return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        case ast.Assign():
            return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def signature(node: ast.AST) -> str:
    """Write a method's parameters without annotations; an attribute's is empty."""
    if not isinstance(node, Function):
        return ""
    return f"({', '.join(_parameters(node))})"


def _parameters(node: Function) -> Iterator[str]:
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    first_default = len(plain) - len(args.defaults)
    yield from (a.arg + ("=" if i >= first_default else "") for i, a in enumerate(plain))
    if args.vararg:
        yield f"*{args.vararg.arg}"
    elif args.kwonlyargs:
        yield "*"
    yield from (a.arg + ("" if d is None else "=") for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True))
    if args.kwarg:
        yield f"**{args.kwarg.arg}"


def decorators(node: ast.AST) -> set[str]:
    """Names of a method's decorators (``abstractmethod``, ``classmethod``, …)."""
    return {ast.unparse(d).rpartition(".")[2] for d in getattr(node, "decorator_list", [])}
