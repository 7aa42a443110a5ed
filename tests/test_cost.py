"""Costs against numbers worked out by hand, and conservation under fusion."""

from __future__ import annotations

import numpy as np
import pytest

from lmclock.batch import Batch, Rows
from lmclock.cost import Bound, Cost, cost, expected_experts
from lmclock.listing import parse
from lmclock.passes import fuse
from lmclock.program import Program
from tests.tiny import llama


def batch(*spans: tuple[int, int], pages: list[list[int]] | None = None, picks: int = 1) -> Batch:
    """A batch of (first position, rows) per sequence; page tables of 64 positions, none shared."""
    own = [[100 * n + k for k in range(-(-(a + b) // 64))] for n, (a, b) in enumerate(spans)]
    tables = [np.array(p, np.int32) for p in (pages or own)]
    rows = Rows.of(list(spans))
    ids = np.arange(len(rows), dtype=np.int32).reshape(-1, 1) % 7
    return Batch(
        {"tok": rows}, {"ids": ids}, np.arange(len(spans), dtype=np.int32), {"kv": tables},
        pick=np.arange(picks, dtype=np.int32),
    )  # fmt: skip


def find(program: Program, op: str, bound: Bound) -> Cost:
    return cost(next(i for i in program.section("step").instructions if i.op == op), bound)


def test_decode_by_hand() -> None:
    """One row at position 99 of a 64-wide model with 4 heads, 2 kv heads of 16, f16 cache."""
    program = llama()
    bound = Bound(program, "step", batch((99, 1)))
    assert find(program, "embed", bound) == Cost({}, 64 // 32 * 34, 0, 64 * 4)
    assert find(program, "norm", bound) == Cost({"f32": 4 * 64}, 64 * 4, 0, 2 * 64 * 4)
    assert find(program, "linear", bound) == Cost({"f32": 2 * 64 * 64}, 64 * 64 * 4, 0, 2 * 64 * 4)
    assert find(program, "rope", bound) == Cost({"f32": 3 * 64}, 0, 0, 2 * 64 * 4)
    assert find(program, "store", bound) == Cost({}, 0, 64 * 2, 64 * 4)
    assert find(program, "attend", bound) == Cost(
        {"f32": 100 * 4 * (2 * 16 + 2 * 16 + 5)}, 0, 2 * (16 + 16) * 2 * 100, 2 * 64 * 4
    )
    assert find(program, "sample", bound).activation == 100 * 4


def test_prefill_sees_a_triangle_and_reads_each_position_once() -> None:
    program = llama()
    attend = find(program, "attend", Bound(program, "step", batch((0, 10))))
    assert attend.flops["f32"] == 55 * 4 * 69
    assert attend.cache == 10 * 2 * 32 * 2


def test_shared_pages_are_read_once() -> None:
    program = llama()
    alone = find(program, "attend", Bound(program, "step", batch((99, 1), (99, 1))))
    shared = batch((99, 1), (99, 1), pages=[[0, 1], [0, 2]])
    both = find(program, "attend", Bound(program, "step", shared))
    assert alone.cache == 200 * 128
    assert both.cache == (64 + 36 + 36) * 128
    assert both.flops == alone.flops, "sharing saves bytes, not arithmetic"


def test_a_window_bounds_bytes_and_arithmetic() -> None:
    text = 'program t "t"\ninput q tok f32 width=32\nstate kv[1] paged heads=2 key=16 value=16\n'
    text += "section step\nstore kv[0], q, q\nattend y, q, kv[0] heads=2 window=10\n"
    program = parse(text)
    seen = find(program, "attend", Bound(program, "step", batch((98, 2))))
    assert seen.flops["f32"] == 2 * 10 * 2 * 69
    assert seen.cache == 11 * 2 * 32 * 4, "positions 89..99"


def test_padding_rows_cost_nothing() -> None:
    program = llama()
    full = batch((0, 4))
    padded = Rows(np.array([0, 6], np.int32), np.arange(6, dtype=np.int32), np.arange(6) < 4)
    with_padding = Batch({"tok": padded}, full.inputs, full.slots, full.pages, pick=full.pick)
    for op in ("norm", "linear", "rope", "store"):
        assert find(program, op, Bound(program, "step", with_padding)) == find(
            program, op, Bound(program, "step", full)
        )


@pytest.mark.parametrize("spans", [((99, 1),), ((0, 7), (20, 1)), ((0, 64),)])
def test_fusion_keeps_arithmetic_weights_and_cache(spans: tuple[tuple[int, int], ...]) -> None:
    plain, fused = llama(), fuse(llama())
    totals = []
    for program in (plain, fused):
        bound = Bound(program, "step", batch(*spans))
        totals.append(sum((cost(i, bound) for i in program.section("step").instructions), Cost()))
    a, b = totals
    assert a.flops == b.flops
    assert (a.weight, a.cache) == (b.weight, b.cache)
    assert b.activation < a.activation, "inner operands never leave the instruction"


def test_no_row_no_cost() -> None:
    program = llama()
    empty = batch((5, 0), picks=0)
    bound = Bound(program, "step", empty)
    for i in program.section("step").instructions:
        assert cost(i, bound).bytes == 0 or i.op == "embed", i
        assert cost(i, bound).operations == 0


def test_experts_used_is_the_expected_number() -> None:
    rng = np.random.default_rng(0)
    trials = [
        len({e for _ in range(6) for e in rng.choice(8, 2, replace=False)}) for _ in range(4000)
    ]
    assert abs(np.mean(trials) - expected_experts(8, 2, 6)) < 0.05
