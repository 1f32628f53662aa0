"""Structure-aware mutation: valid messages with something wrong in them, and plain noise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

#: Where counters, sizes and types end.
EDGES = [0, 1, 2, 3, 7, 8, 15, 16, 63, 64, 255, 256, 1023, 1024, 4095, 4096, 65535, 65536]
EDGES += [n + d for n in (1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 48, 1 << 62, 1 << 63) for d in (-1, 0)]
EDGES += [(1 << 64) - 1, -1, -2, -(1 << 31), -(1 << 63)]

_TEXTS = ["", "a", "x" * 1025, "127.0.0.1:1", "host:99999", "a\0b", "é", "0", "1e9", "__class__", "\u0663:\u0663"]
_TEXTS += ["\x1b[2J\nok  all is well", "\x1b" * 9999]
_SCALARS = [None, True, False, 0.0, -1.5, 1e308, b"", b"\0", b"\xff" * 3, b"\0" * 4, b"\0" * 16, b"\0" * 4097]
_NESTS = [
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [[[[[[]]]]]],
    [0] * 300,
    ["a"] * 300,
    [[0]] * 300,
    {str(i): i for i in range(99)},
]


def values() -> st.SearchStrategy[Any]:
    """Anything that msgpack carries."""
    leaf = (
        st.sampled_from(EDGES)
        | st.sampled_from(_TEXTS)
        | st.sampled_from(_SCALARS)
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.binary(max_size=40)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    )
    nested = st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=8,
    )
    return leaf | st.sampled_from(_NESTS).map(copy.deepcopy) | nested


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where the parts of plain data are."""
    found = [at]
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return found
    for key, part in items:
        found += paths(part, (*at, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, samples: Sequence[Any], most: int = 3) -> Any:
    """One of the samples, with up to ``most`` parts of it replaced, removed, repeated or bent."""
    value = copy.deepcopy(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(0, most))):
        where = paths(value)
        path = where[draw(st.integers(0, len(where) - 1))]
        if not path:
            if draw(st.integers(0, 30)) == 0:
                return draw(values())
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        _bend(draw, parent, path[-1])
    return value


def _bend(draw: st.DrawFn, parent: Any, key: Any) -> None:
    how = draw(st.sampled_from(["replace", "bend", "bend", "remove", "repeat"]))
    part = parent[key]
    if how == "remove":
        del parent[key]
    elif how == "repeat" and isinstance(parent, list):
        parent[key:key] = [copy.deepcopy(part) for _ in range(draw(st.sampled_from([1, 2, 70, 500])))]
    elif how == "replace" or isinstance(part, (dict, list)) or part is None:
        parent[key] = draw(values())
    else:
        parent[key] = _bent(draw, part)


def _bent(draw: st.DrawFn, part: Any) -> Any:
    """Return something like ``part``, of its own type."""
    if isinstance(part, bool):
        return not part
    if isinstance(part, int):
        return min(max(part + draw(st.sampled_from([1, -1, 0, *EDGES])), -(1 << 63)), (1 << 64) - 1)
    if isinstance(part, bytes):
        return draw(damaged([part]))
    if isinstance(part, str):
        cut = draw(st.integers(0, len(part)))
        return part[:cut] + draw(st.sampled_from(_TEXTS)) + part[cut + draw(st.integers(0, 3)) :]
    return draw(values())


@st.composite
def damaged(draw: st.DrawFn, samples: Sequence[bytes], most: int = 4) -> bytes:
    """One of the samples, with up to ``most`` cuts, flips, numbers at the edge, and repetitions."""
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 6)):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + draw(st.integers(1, 9))]
            case 2:
                data[at:at] = draw(st.binary(max_size=24))
            case 3 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 4:
                size = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.sampled_from(EDGES)) & ((1 << 8 * size) - 1)
                data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(["little", "big"])))
            case 5:
                data[at:at] = data[at : at + draw(st.sampled_from([1, 4, 8, 28, 64]))] * draw(
                    st.sampled_from([1, 3, 50])
                )
            case _:
                other = draw(st.sampled_from(samples))
                data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


def noise(samples: Sequence[bytes], most: int = 4) -> st.SearchStrategy[bytes]:
    """Damaged samples, and now and then bytes that never were one."""
    return st.one_of(damaged(samples, most), damaged(samples, most), damaged(samples, most), st.binary(max_size=120))
