"""What of the GPU benchmark needs no GPU: rows and goals, layouts, tables, and a whole run over CPU memory."""

import dataclasses
import json

import numpy as np
import pytest

from bench import report as files
from bench.gpu import cases, report, rows, run
from bench.gpu.__main__ import short, whole
from bench.gpu.cases import Case, Entrant
from bench.gpu.memory import (
    BLOCK_BYTES,
    BLOCKWISE,
    LAYERWISE,
    LAYOUTS,
    PIECE_BYTES,
    PIECES,
    Pool,
    Selection,
    draw,
    leading,
    mismatch,
    piece_addresses,
)
from bench.gpu.nixl import BY_BLOCK, BY_PIECE, descriptors, indices
from bench.gpu.pair import LostError, Pair
from bench.gpu.rows import Goal, Measured, Row
from kvconnect.bench import tables
from kvconnect.cuda.costs import run_bytes
from kvconnect.cuda.tiles import Paged, table

BOTH = [LAYERWISE, BLOCKWISE]
US = 1e-6


def measured(nbytes=BLOCK_BYTES, sms=None, **samples):
    return Measured("case", nbytes, samples, dict.fromkeys(samples, PIECE_BYTES), sms or {})


def copied(source, target, chosen):
    """Copy blocks from pool to pool, the plain way."""
    to_ids, from_ids = chosen.near, chosen.far
    for mine, theirs in zip(target._views, source._views, strict=True):
        mine[to_ids] = theirs[from_ids]


# -- layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BOTH)
def test_a_block_is_2_mib_in_64_pieces_in_either_layout(layout):
    made = LAYOUTS[layout](6)
    assert made.nbytes([[0]]) == BLOCK_BYTES == 2 << 20
    assert sum(made.region_bytes) == 6 * BLOCK_BYTES
    addresses = piece_addresses(made, [i << 40 for i in range(len(made.region_bytes))], 6)
    assert addresses.shape == (PIECES, 6)
    assert len(np.unique(addresses)) == addresses.size
    region, offset, nbytes = made.pieces([[4]])
    assert np.array_equal((region << 40) + offset, addresses[:, 4])
    assert set(nbytes.tolist()) == {PIECE_BYTES}


def test_both_layouts_hold_the_same_blocks():
    assert LAYOUTS[LAYERWISE](3).shape() == LAYOUTS[BLOCKWISE](3).shape()


@pytest.mark.parametrize(("layout", "run_length"), [(LAYERWISE, PIECE_BYTES), (BLOCKWISE, BLOCK_BYTES)])
def test_pieces_are_scattered_in_the_default_layout_and_one_run_in_the_other(layout, run_length):
    made = LAYOUTS[layout](6)
    here, there = ([(side << 50) + (i << 40) for i in range(len(made.region_bytes))] for side in (1, 2))
    assert run_bytes(table(Paged(made, here), Paged(made, there), 0, PIECE_BYTES)) == run_length


@pytest.mark.parametrize("layout", BOTH)
def test_signatures_tell_whether_exactly_the_chosen_blocks_were_copied(layout):
    source, target = (Pool(layout, "cpu", 5) for _ in range(2))
    source.fill(1)
    target.fill(2)
    chosen = Selection([3, 0], [1, 4])
    before = target.signatures()
    assert mismatch(before, before, source.signatures(), chosen) == (
        "2 of 2 blocks have wrong bytes, 0 that nobody chose changed"
    )
    copied(source, target, chosen)
    assert mismatch(before, target.signatures(), source.signatures(), chosen) is None
    target.regions[0].view(-1)[-1] ^= 1  # the last block of a piece that nobody chose
    assert mismatch(before, target.signatures(), source.signatures(), chosen).endswith(", 1 that nobody chose changed")


def test_signatures_see_pieces_that_were_swapped():
    pool = Pool(BLOCKWISE, "cpu", 1)
    pool.fill(1)
    before = pool.signatures()
    first, second = pool._views[0].clone(), pool._views[1].clone()
    pool._views[0][:], pool._views[1][:] = second, first
    assert pool.signatures() != before


@pytest.mark.parametrize("layout", BOTH)
def test_flipped_blocks_differ_and_others_do_not(layout):
    pool = Pool(layout, "cpu", 4)
    pool.fill(1)
    before = pool.signatures()
    pool.flip([2, 0])
    assert (pool.signatures() != before).tolist() == [True, False, True, False]


@pytest.mark.parametrize("layout", BOTH)
def test_equal_blocks_have_equal_signatures_in_both_layouts(layout):
    pools = Pool(LAYERWISE, "cpu", 3), Pool(layout, "cpu", 3)
    pools[0].fill(1)
    pools[1].fill(2)
    copied(pools[0], pools[1], Selection([0, 1, 2], [0, 1, 2]))
    assert np.array_equal(pools[0].signatures(), pools[1].signatures())


def test_random_ids_are_inside_the_pool_and_never_twice():
    chosen = draw(np.random.default_rng(1), 20, 30)
    for ids in (chosen.near, chosen.far):
        assert len(set(ids)) == 20
        assert set(ids) <= set(range(30))
    assert chosen.near != chosen.far


@pytest.mark.parametrize(("layout", "kind"), [(LAYERWISE, BY_PIECE), (BLOCKWISE, BY_PIECE), (BLOCKWISE, BY_BLOCK)])
def test_nixl_is_given_every_byte_of_the_chosen_blocks(layout, kind):
    pool = Pool(layout, "cpu", 4)
    chosen = descriptors(pool, pool.bases, 1, kind)[indices([2, 1], 4, kind)]
    assert set(chosen[:, 2].tolist()) == {1}
    got = sorted((int(a), int(n)) for a, n, _ in chosen)
    pieces = piece_addresses(pool.layout, pool.bases, 4)
    if kind == BY_BLOCK:
        assert got == sorted((int(pieces[0, i]), BLOCK_BYTES) for i in (1, 2))
    else:
        assert got == sorted((int(a), PIECE_BYTES) for a in pieces[:, [1, 2]].reshape(-1))


# -- rows ---------------------------------------------------------------------------


def test_a_contender_has_a_row_of_its_own_and_one_for_each_reference():
    found = rows.of_case(
        measured(mine=[[1e-3, 3e-3]], slow=[[2e-3]], sms={"mine": 16}), (), {"mine": ("slow", "missing")}
    )
    assert [(row.backend, row.reference, row.ratio) for row in found] == [
        ("mine", None, None),
        ("mine", "slow", 1.0),
        ("slow", None, None),
    ]
    assert found[0].p50_us == 2000
    assert found[0].gb_per_s == pytest.approx(BLOCK_BYTES / 2e-3 / 1e9, abs=0.01)
    assert (found[0].sms, found[2].sms) == (16, None)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("mine", "ratio", 2.0, "slow"), True),
        (Goal("mine", "ratio", 2.1, "slow"), False),
        (Goal("mine", "p50_us", 100.0), True),
        (Goal("mine", "p50_us", 99.0), False),
        (Goal("mine", "p99_us", 100.0), True),
        (Goal("mine", "gb_per_s", 20.0), True),
        (Goal("mine", "gb_per_s", 22.0), False),
    ],
)
def test_goals_bound_rates_from_below_and_times_from_above(goal, met):
    found = rows.of_case(measured(mine=[[100 * US]] * 3, slow=[[200 * US]] * 3), (goal,), {})
    held = [row for row in found if row.goal is not None]
    assert [(row.backend, row.limit, row.goal, row.met) for row in held] == [("mine", goal.limit, goal.value, met)]


def test_goals_of_contenders_that_failed_are_left_out():
    goals = (Goal("gone", "ratio", 2.0, "mine"), Goal("mine", "ratio", 2.0, "gone"), Goal("gone", "p50_us", 1.0))
    assert [row.goal for row in rows.of_case(measured(mine=[[1.0]]), goals, {})] == [None]


def test_ratios_compare_medians_of_the_same_round():
    assert rows.ratio([[1.0, 1.0, 9.0], [10.0], [1.0]], [[2.0], [20.0, 20.0, 5.0], [2.0]]) == 2.0


def test_memory_is_held_against_bytes():
    goal = Goal("cuda_ipc", "bytes", 64e6)
    assert rows.of_memory("cuda_ipc", 10 << 20, 1, goal).met is True
    assert rows.of_memory("cuda_ipc", 100 << 20, 1, goal).met is False
    assert rows.of_memory("raw NCCL", 100 << 20, 1, None).met is None
    more = rows.of_memory("nccl", 100 << 20, 1, goal, first=False)
    assert more.case == "GPU memory beside the pool, one more peer"
    assert {entrant.contender for entrant, _ in cases.memory()}.isdisjoint(e.contender for e, _ in cases.more_memory())


# -- cases --------------------------------------------------------------------------


def test_every_goal_and_comparison_names_contenders_of_its_case():
    for case in cases.all_cases():
        labels = [entrant.label for entrant in case.entrants]
        assert len(labels) == len(set(labels)), case.name
        named = [name for goal in case.goals for name in (goal.backend, goal.reference) if name]
        named += [name for own, others in case.compared.items() for name in (own, *others)]
        known = {*labels, *cases.NIXL, *cases.NIXL_BLOCKWISE, *cases.MOONCAKE, cases.RAW_NCCL}
        assert set(named) <= known, case.name
        assert {goal.backend for goal in case.goals} <= set(labels), case.name


def test_every_case_has_a_name_of_its_own_and_pairs_that_exist():
    found = cases.all_cases()
    assert len({case.name for case in found}) == len(found)
    assert {entrant.pair for case in found for entrant in case.entrants} == set(cases.PAIRS)


def test_the_goals_are_those_that_were_set():
    held = {(case.blocks, case.name.split()[0], g.backend, g.limit, g.reference): g.value
            for case in cases.all_cases() if "BLHNC" not in case.name for g in case.goals}  # fmt: skip
    expected = {
        (128, "kernel", cases.FEW, "ratio", cases.ENGINE): 0.90,
        (128, "kernel", cases.WIDE, "ratio", cases.ENGINE): 0.93,
        (512, "kernel", cases.WIDE, "ratio", cases.ENGINE): 0.95,
        (8, "kernel", cases.FEW, "p50_us", None): 70,
        (1, "kernel", cases.FEW, "p50_us", None): 30,
        (8, "hand-over", "cuda_ipc", "p50_us", None): 500,
        (128, "read", "cuda_ipc", "ratio", "NIXL READ"): 60,
        (128, "read", "cuda_ipc", "ratio", "NIXL WRITE"): 60,
        (128, "read", "nccl", "ratio", cases.RAW_NCCL): 0.80,
        (512, "read", "nccl", "ratio", cases.RAW_NCCL): 0.90,
        (128, "read", "nixl", "gb_per_s", None): 150,
        (128, "read", "nixl", "ratio", "NIXL READ"): 20,
        (128, "same", cases.WIDE, "ratio", cases.LOCAL): 0.85,
    }
    assert {key: held[key] for key in expected} == expected


def test_cases_are_chosen_by_name():
    chosen, memory = run.select("^hand-over")
    assert [case.name for case in chosen] == ["hand-over 16.8 MB", "hand-over 268 MB"]
    assert not memory
    assert run.select(None)[1]
    assert run.select("memory") == ([], True)


# -- a whole run over CPU memory --------------------------------------------------------


def shm(layout=LAYERWISE, way="read"):
    return cases.pipe("shm", layout, way)


def bad(label):
    """A contender that cannot be had: the run goes on without it."""
    return dataclasses.replace(shm(), label=label, pair="bad", options={"pipe": label, "layout": LAYERWISE})


def measure(*chosen):
    said = []
    pairs = dict.fromkeys(("shm", "bad"), ("cpu", "cpu"))
    plan = run.Plan(pairs, pool_blocks=12)
    return run.Runner(list(chosen), memory=False, quick=True, say=said.append, plan=plan).run()


@pytest.fixture(scope="module")
def book():
    hand = Entrant("hand", "shm", "hand-over", "claim", LAYERWISE, {"pipe": "shm", "layout": LAYERWISE}, assisted=True)
    ticket = dataclasses.replace(hand, label="from the ticket", way="ticket")
    written = dataclasses.replace(shm(way="write"), label="written")
    blockwise = dataclasses.replace(shm(BLOCKWISE), label="blockwise")
    never = bad("no-such-pipe")
    checked = dataclasses.replace(hand, label="checked", options={**hand.options, "checksum": True})
    sums = (Entrant(f"sum, {layout}", "shm", "sums", "call", layout, moves=False) for layout in BOTH)
    goals = (Goal("shm", "ratio", 0.001, "written"), Goal("shm", "p50_us", 1e9))
    compared = {"shm": ("blockwise", "no-such-pipe")}
    entrants = (shm(), written, blockwise, never, hand, ticket, checked, *sums)
    case = Case("read 4 blocks", 4, entrants, goals, compared, repeats=2)
    return measure(case)


def test_a_run_measures_two_processes_and_checks_their_bytes(book):
    moved = {"shm", "written", "blockwise", "hand", "from the ticket", "checked"}
    assert {row.backend for row in book.rows} == {*moved, *(f"sum, {layout}" for layout in BOTH)}
    assert [row.met for row in book.rows if row.goal is not None] == [True, True]
    assert all(row.gb_per_s > 0 and row.bytes == 4 * BLOCK_BYTES for row in book.rows)
    assert {row.reference for row in book.rows if row.backend == "shm"} == {None, "written", "blockwise"}


def test_what_cannot_be_had_is_noted_and_costs_the_others_nothing(book):
    assert list(book.left_out) == ["read 4 blocks: no-such-pipe"]
    assert "no-such-pipe" in next(iter(book.left_out.values()))


def test_wrong_bytes_are_an_error_and_no_result():
    # Told to have moved the first blocks when it moved random ones of the other pool.
    liar = dataclasses.replace(shm(), label="liar", layout=BLOCKWISE)
    found = measure(Case("read", 2, (liar,), rounds=1))
    assert found.rows == []
    assert "wrong bytes" in found.left_out["read: liar"]


def test_a_process_that_dies_ends_its_pair_and_says_so():
    pair = Pair("pair", "cpu", "cpu", 2)
    try:
        assert pair.started() == {"gpu": "none"}
        assert pair.free() == (0, 0)
        pair._far.kill()
        with pytest.raises(LostError):
            pair.ask(False, "free")
        with pytest.raises(LostError, match="Error"):
            pair.ask(True, "free")
    finally:
        pair.kill()


def test_a_run_that_is_late_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(run, "BUDGET_S", 0.0)
    found = measure(Case("read", 2, (shm(),)))
    assert found.left_out == {"read": "the run's time was over"}


# -- the file and the document ------------------------------------------------------------


def results_of(found):
    return whole(run.Book(found, {"some pipe": "it was not there"}, {"gpu": "a GPU"}), 0.1, "abc")


def few_rows():
    samples = {cases.FEW: [[800 * US]], cases.ENGINE: [[700 * US]], "nixl": [[20e-3]]}
    goals = (Goal(cases.FEW, "ratio", 0.9, cases.ENGINE), Goal("nixl", "gb_per_s", 150.0))
    pieces = {cases.FEW: PIECE_BYTES, cases.ENGINE: 128 * BLOCK_BYTES, "nixl": PIECE_BYTES}
    made = Measured("kernel 268 MB, default", 128 * BLOCK_BYTES, samples, pieces, {cases.FEW: 16})
    memory = [rows.of_memory("nccl", 30 << 20, 128 * BLOCK_BYTES, Goal("nccl", "bytes", 64e6))]
    return [*memory, *rows.of_case(made, goals, {})]


def test_the_file_has_the_agreed_columns_and_reads_back(tmp_path):
    results = results_of(few_rows())
    assert {"schema", "command", "hardware", "versions", "commit", "rows"} <= set(results)
    path = tmp_path / "h200x2.json"
    tables.save(results, path)
    assert files.load(path) == json.loads(json.dumps(results))
    agreed = {"case", "backend", "bytes", "piece_bytes", "gb_per_s", "p50_us", "p99_us", "reference", "ratio"}
    assert all(agreed | {"goal", "met"} <= set(row) for row in results["rows"])


def test_tables_show_goals_counts_and_what_is_missing():
    text = report.render(results_of(few_rows()), plotted=True)
    assert "1 of 3 met." in text
    assert "| kernel 268 MB, default | cuda_ipc kernel, 16 SMs | ≥ 0.9 × copy engine | 0.88 | **missed** |" in text
    assert "| kernel 268 MB, default | nixl | ≥ 150 GB/s | 13.4 GB/s | **missed** |" in text
    assert "≤ 64 MB | 31.5 MB | met |" in text
    assert "cuda_ipc kernel, 16 SMs (16 seen) | 32 KiB | 335.5 | 800.0 | 800.0 | 0.88 |" in text
    assert "- some pipe: it was not there" in text
    assert "(img/h200x2.svg)" in text
    assert "img" not in report.render(results_of(few_rows()), plotted=False)


def test_what_is_printed_last_has_every_contender_once():
    text = short(results_of(few_rows()))
    assert sum(line.startswith("kernel") for line in text.splitlines()) == 3
    assert "16 SMs" in text
    assert "not measured: some pipe: it was not there" in text


def test_bars_are_sorted_and_leave_out_what_has_no_rate():
    found = results_of(few_rows())["rows"]
    assert list(report.bars(found, "kernel 268 MB, default")) == [cases.ENGINE, cases.FEW, "nixl"]
    assert report.bars(found, found[0]["case"]) == {}


def test_the_plot_is_an_svg(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(results_of(few_rows())["rows"], tmp_path / "img" / "plot.svg")
    assert "<svg" in (tmp_path / "img" / "plot.svg").read_text(encoding="utf-8")


def test_the_document_shows_exactly_what_the_gpu_results_say():
    text = files.DOCUMENT.read_text(encoding="utf-8")
    shown = report.document(text, files.load(report.RESULTS), plotted=report.PLOT.exists())
    assert text == shown, "run `python -m bench.gpu.report`"


def test_what_the_gpu_results_call_met_follows_from_their_numbers():
    results = files.load(report.RESULTS)
    if results is None:
        pytest.skip("no run was recorded yet")
    for row in results["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(Row)}
        if row["goal"] is None:
            assert row["met"] is None
        else:
            assert row["met"] == rows.is_met(row["limit"], row[row["limit"]], row["goal"])


def test_contiguous_contenders_move_the_first_blocks():
    assert leading(3) == Selection([0, 1, 2], [0, 1, 2])
