"""What is measured on two GPUs: the contenders, the cases they meet in, and the goals. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.gpu.memory import BLOCK_BYTES, BLOCKWISE, LAYERWISE, PIECE_BYTES
from bench.gpu.rows import Goal

#: Registered pipes that carry CUDA memory.
PIPES = ("cuda_ipc", "nccl", "nixl")
TWO = ("cuda:0", "cuda:1")
#: D's and P's GPU of each pair of processes.
PAIRS: Mapping[str, tuple[str, str]] = {
    "copies": TWO,
    "raw nccl": TWO,
    "raw nixl": TWO,
    "mooncake": TWO,
    **dict.fromkeys(PIPES, TWO),
    # Apart, so that what goes wrong there costs nothing else.
    **{f"{name} hand-over": TWO for name in PIPES},
    "same GPU": ("cuda:0", "cuda:0"),
}
MEMORY_CASE = "GPU memory"
MEMORY_LIMIT_BYTES = 64e6
#: The selection that a contender's first transfer moves before its memory is looked at.
MEMORY_BLOCKS = 128


@dataclass(frozen=True)
class Entrant:
    """One way of moving blocks, as it takes part in cases.

    Args:
        label: what rows call it.
        pair: of processes.
        kind: of contender (`bench.gpu.side.KINDS`).
        options: of the contender.
        way: what the contender is to do.
        layout: which pool.
        near: whether D begins and times it; else P.
        assisted: the other process has to take part.
        contiguous: it moves the first blocks of the block-outermost pool, in one run.
        local: it copies within D's own pool.
        piece_bytes: length of its pieces; 0 if it has only one.
        moves: it moves blocks, to be compared; else it reads D's own and checks itself when it is connected.

    """

    label: str
    pair: str
    kind: str
    way: str = "read"
    layout: str = LAYERWISE
    options: Mapping[str, Any] = field(default_factory=dict)
    near: bool = True
    assisted: bool = False
    contiguous: bool = False
    local: bool = False
    piece_bytes: int = PIECE_BYTES
    moves: bool = True

    @property
    def contender(self) -> str:
        """The name of the contender that does it, within its pair."""
        return " ".join([self.kind, *(str(value) for value in self.options.values())])


@dataclass(frozen=True)
class Case:
    """Contenders that are compared: ``repeats`` moves of ``blocks`` blocks for each of them in every round."""

    name: str
    blocks: int
    entrants: tuple[Entrant, ...]
    goals: tuple[Goal, ...] = ()
    compared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rounds: int = 7
    repeats: int = 3

    @property
    def nbytes(self) -> int:
        """Bytes of one move."""
        return self.blocks * BLOCK_BYTES


CHECKED = "cuda_ipc, checksum"
FEW, WIDE, ENGINE, LOCAL = "cuda_ipc kernel, 16 SMs", "cuda_ipc kernel, all SMs", "copy engine", "local copy"
RAW_NCCL, ASKED_NCCL = "raw NCCL", "raw NCCL, one asked for"
NIXL = ("NIXL READ", "NIXL WRITE")
NIXL_BLOCKWISE = ("NIXL READ, BLHNC", "NIXL WRITE, BLHNC")
MOONCAKE = ("Mooncake READ", "Mooncake WRITE")


def title(blocks: int) -> str:
    """Return what a selection of blocks is called."""
    nbytes = blocks * BLOCK_BYTES
    if blocks == 1:
        return "1 block"
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def kernel(label: str, way: str, layout: str, pair: str = "copies") -> Entrant:
    """Our kernel by itself."""
    return Entrant(label, pair, "copies", way, layout, piece_bytes=PIECE_BYTES if layout == LAYERWISE else BLOCK_BYTES)


def engine(label: str = ENGINE, way: str = "engine", pair: str = "copies", *, local: bool = False) -> Entrant:
    """One contiguous copy by a copy engine."""
    return Entrant(label, pair, "copies", way, BLOCKWISE, contiguous=True, local=local, piece_bytes=0)


def pipe(name: str, layout: str, way: str = "read", pair: str = "") -> Entrant:
    """A registered pipe."""
    options = {"pipe": name, "layout": layout}
    size = PIECE_BYTES if layout == LAYERWISE else BLOCK_BYTES
    return Entrant(name, pair or name, "pipe", way, layout, options, near=way == "read", piece_bytes=size)


def raw_nccl() -> tuple[Entrant, ...]:
    """NCCL by itself."""
    return tuple(
        Entrant(label, "raw nccl", "raw nccl", way, BLOCKWISE, assisted=True, contiguous=True, piece_bytes=0)
        for label, way in ((RAW_NCCL, "stream"), (ASKED_NCCL, "asked"))
    )


def raw_nixl(labels: tuple[str, str], layout: str, by: str, size: int) -> tuple[Entrant, ...]:
    """NIXL's agents by themselves."""
    return tuple(
        Entrant(label, "raw nixl", "raw nixl", f"{way} {by}", layout, near=way == "read", piece_bytes=size)
        for label, way in zip(labels, ("read", "write"), strict=True)
    )


def mooncake(layout: str) -> tuple[Entrant, ...]:
    """Mooncake's engine by itself."""
    size = PIECE_BYTES if layout == LAYERWISE else BLOCK_BYTES
    return tuple(
        Entrant(label, "mooncake", "mooncake", way, layout, near=way == "read", piece_bytes=size)
        for label, way in zip(MOONCAKE, ("read", "write"), strict=True)
    )


def kernels(blocks: int, layout: str) -> Case:
    """Device times: our kernel against the copy engine's contiguous rate."""
    goals: dict[tuple[int, str], tuple[Goal, ...]] = {
        (1, LAYERWISE): (Goal(FEW, "p50_us", 30.0),),
        (8, LAYERWISE): (Goal(FEW, "p50_us", 70.0),),
        (128, LAYERWISE): (Goal(FEW, "ratio", 0.90, ENGINE), Goal(WIDE, "ratio", 0.93, ENGINE)),
        (512, LAYERWISE): (Goal(WIDE, "ratio", 0.95, ENGINE),),
    }
    entrants = (kernel(FEW, "few", layout), kernel(WIDE, "all", layout), engine())
    compared = {FEW: (ENGINE,), WIDE: (ENGINE,)}
    name = f"kernel {title(blocks)}, {layout}"
    return Case(name, blocks, entrants, goals.get((blocks, layout), ()), compared, repeats=10)


def reads(blocks: int, layout: str) -> Case:
    """Through the public API, from ids to done, against NIXL, Mooncake and the ceilings."""
    large = blocks >= 128
    if layout == LAYERWISE:
        pieces = raw_nixl(NIXL, LAYERWISE, "pieces", PIECE_BYTES)
    else:
        pieces = raw_nixl(NIXL, BLOCKWISE, "pieces", PIECE_BYTES)
    whole = raw_nixl(NIXL_BLOCKWISE, BLOCKWISE, "whole", BLOCK_BYTES)
    ours = tuple(pipe(name, layout) for name in PIPES)
    goals = [Goal("cuda_ipc", "ratio", 60.0 if large else 1.0, name) for name in NIXL]
    goals += [Goal("cuda_ipc", "ratio", 1.0, name) for name in (*NIXL_BLOCKWISE, *MOONCAKE)]
    if large:
        least = 0.80 if blocks == 128 else 0.90
        goals += [Goal("nccl", "ratio", least, name) for name in (RAW_NCCL, ASKED_NCCL)]
    if blocks == 128:
        goals += [Goal("nixl", "gb_per_s", 150.0), Goal("nixl", "ratio", 20.0, NIXL[0])]
    compared = dict.fromkeys(PIPES, (ENGINE, RAW_NCCL, *NIXL, *NIXL_BLOCKWISE, *MOONCAKE))
    entrants = (*ours, *pieces, *whole, *mooncake(layout), engine(), *raw_nccl())
    name = f"read {title(blocks)}, {layout}"
    return Case(
        name, blocks, entrants, tuple(goals), compared, rounds=7 if blocks < 512 else 5, repeats=2 if large else 12
    )


def writes(blocks: int) -> Case:
    """The same bytes the same way, but begun by P."""
    entrants = (
        *(pipe(name, LAYERWISE, "write") for name in PIPES),
        raw_nixl(NIXL, LAYERWISE, "pieces", PIECE_BYTES)[1],
    )
    compared = dict.fromkeys(PIPES, (NIXL[1], ENGINE))
    return Case(f"write {title(blocks)}, default", blocks, (*entrants, engine()), (), compared, rounds=5, repeats=2)


def hand_over(blocks: int) -> Case:
    """A hand-over with its control messages: from the granted claim, and from no more than the ticket."""

    def entrant(label: str, name: str, way: str, **options: bool) -> Entrant:
        options_of = {"pipe": name, "layout": LAYERWISE, **options}
        return Entrant(label, f"{name} hand-over", "hand-over", way, LAYERWISE, options_of, assisted=True)

    ways = (("", "claim"), (", from the ticket", "ticket"))
    entrants = [entrant(name + suffix, name, way) for name in PIPES for suffix, way in ways]
    entrants.append(entrant(CHECKED, "cuda_ipc", "claim", checksum=True))
    goals = (Goal("cuda_ipc", "p50_us", 500.0),) if blocks == 8 else ()
    compared = {CHECKED: ("cuda_ipc",)}
    return Case(f"hand-over {title(blocks)}", blocks, tuple(entrants), goals, compared, rounds=5, repeats=40)


def sums(blocks: int, layout: str) -> Case:
    """What a checksum reads in D's memory, against copies within the GPU and from the other one."""
    size = PIECE_BYTES if layout == LAYERWISE else BLOCK_BYTES
    ours = tuple(
        Entrant(label, "same GPU", "sums", way, layout, piece_bytes=size, moves=False)
        for label, way in (("sum kernel", "kernel"), ("sum", "call"))
    )
    compared = {one.label: (LOCAL, ENGINE) for one in ours}
    entrants = (*ours, engine(LOCAL, "local", "same GPU", local=True), engine())
    return Case(f"sum {title(blocks)}, {layout}", blocks, entrants, (), compared, rounds=5, repeats=5)


def same_gpu(blocks: int) -> Case:
    """P and D on one GPU."""
    entrants = (
        kernel(WIDE, "all", LAYERWISE, "same GPU"),
        pipe("cuda_ipc", LAYERWISE, pair="same GPU"),
        engine(LOCAL, "local", "same GPU", local=True),
    )
    goals = (Goal(WIDE, "ratio", 0.85, LOCAL),)
    compared = {"cuda_ipc": (LOCAL,)}
    return Case(f"same GPU {title(blocks)}, default", blocks, entrants, goals, compared, repeats=5)


def more_memory() -> tuple[tuple[Entrant, Goal | None], ...]:
    """Return whose GPU memory is looked at once more, for a second peer of the same process."""
    return tuple((pipe(name, BLOCKWISE), Goal(name, "bytes", MEMORY_LIMIT_BYTES)) for name in PIPES)


def memory() -> tuple[tuple[Entrant, Goal | None], ...]:
    """Return whose GPU memory is looked at, and whether it has a goal."""
    ours = [pipe(name, LAYERWISE) for name in PIPES]
    others = [raw_nccl()[0], raw_nixl(("NIXL", ""), LAYERWISE, "pieces", PIECE_BYTES)[0]]
    others += [Entrant("Mooncake", "mooncake", "mooncake")]
    held: list[tuple[Entrant, Goal | None]] = [
        (entrant, Goal(entrant.label, "bytes", MEMORY_LIMIT_BYTES)) for entrant in ours
    ]
    return (*held, *((entrant, None) for entrant in others))


def all_cases() -> list[Case]:
    """Return the cases, the most important first: a run that runs out of time has those."""
    return [
        *(kernels(blocks, LAYERWISE) for blocks in (128, 512, 8, 1)),
        *(reads(blocks, LAYERWISE) for blocks in (128, 512, 8)),
        hand_over(8),
        *(reads(blocks, BLOCKWISE) for blocks in (128, 512)),
        *(same_gpu(blocks) for blocks in (128, 512)),
        *(sums(blocks, layout) for layout in (LAYERWISE, BLOCKWISE) for blocks in (8, 128, 512)),
        *(kernels(blocks, BLOCKWISE) for blocks in (128, 512)),
        writes(128),
        reads(1, LAYERWISE),
        hand_over(128),
    ]
