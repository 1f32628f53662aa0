"""The fuzzer's table of decoders is complete: the search that made it finds nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import catalogue
from tests.fuzz.catalogue import TARGETS

ROOT = Path(__file__).parent.parent.parent / "kvconnect"
ELSEWHERE = {
    "testing",
    "bench",
    "demo",
    "proxy",
    "connectors",
    "cli.py",
    "listing.py",
    "config.py",
    "_plugin.py",
}
TAKES_APART = {
    "unpack", "unpackb", "unpack_from", "frombuffer", "loads", "from_wire", "recv_fds", "recv_multipart", "fromhex",
    "read_key", "unpack_ids",
}  # fmt: skip
#: In the table although nothing of the above is in them: they read bytes or fields in a way of their own.
BY_HAND = {
    "control:split", "paging:PagedLayout.from_wire", "pipes.tcp_listener:Listener._admit",
    "pipes.tcp_listener:_Newcomer._read", "pipes.tcp_meeting:Serving.__init__", "pipes.peer_memory:PeerMemory.__init__",
    "pipes.shm_messages:Sender._send_large", "pipes.ring:adopt", "pipes.nccl_plan:read_row",
}  # fmt: skip
OPERATION = re.compile(r"^(pipe|blocks|nixl|nccl|shm|cuda_ipc)\.[a-z]+$")


def table():
    lines = catalogue.__doc__.split("======\n")[2].splitlines()[:-1]
    rows = [line.split(maxsplit=2) for line in lines]
    return {f"{module}:{name}": target for target, module, names in rows for name in names.split()}


def takes_apart(call):
    function = call.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    if name in TAKES_APART:
        return True
    if not isinstance(function, ast.Attribute):
        return False
    if isinstance(function.value, ast.Name) and function.value.id == "fields":
        return True
    constant = call.args[0] if call.args else None
    return name == "get" and isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def decoders(node, module, name=""):
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{name}.{child.name}" if name else child.name
        if isinstance(child, ast.Call) and takes_apart(child):
            yield f"{module}:{inner}"
        yield from decoders(child, module, inner)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if inside.parts[0] not in ELSEWHERE:
            yield ".".join(inside.with_suffix("").parts), ast.parse(path.read_bytes())


def test_every_function_that_takes_messages_apart_is_in_the_table():
    found = {place for module, tree in modules() for place in decoders(tree, module)}
    assert len(found) > 90
    assert found - table().keys() == set(), "tell which target fuzzes these"
    assert table().keys() - found == BY_HAND, "these are in the table, but take nothing apart any more"


def test_every_target_is_in_the_table_and_the_other_way_round():
    assert set(table().values()) - {"plain", "own"} == TARGETS.keys()


def test_every_operation_that_is_handled_is_among_the_examples():
    constants = {
        node.value
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OPERATION.match(node.value)
    }
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("of_*.py"))
    missing = {op for op in constants if op not in sources and f'"{op.partition(".")[2]}"' not in sources}
    assert missing <= {"cuda_ipc.end", "cuda_ipc.memory"}, missing
