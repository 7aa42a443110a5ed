"""The clock: accounts that telescope whatever the ticks, limits worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import batch, cycle, limits, steady, table
from tiny import llama

import lmclock.roofline
from lmclock.batch import Batch, Rows
from lmclock.clock import LEAVES, Account, Clock
from lmclock.cost import Bound, cost
from lmclock.cycle import STAGES, Run
from lmclock.errors import UnsupportedError
from lmclock.listing import parse
from lmclock.machines import Ticks
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.roofline import MOST_SHAPES, Works, limit_of

RATE = 1e9
LLAMA = optimise(llama(), 2)
LENGTH = len(LLAMA.section("step").instructions)


def program(body: str, declare: str = "") -> Program:
    head = 'program t "t"\ninput x tok f32 width=32\nstate kv[1] paged heads=2 key=8 value=8\n'
    return parse(f"{head}{declare}\nsection step\n{body}\n")


# --- the account


def by_hand(threads: int, one: object) -> tuple[int, int, int, int]:
    """(busy, wait, outside, all) of a cycle, tick by tick as design and header say it."""
    busy = wait = inside = 0
    for run in one.runs:  # type: ignore[attr-defined]
        inside += run.ticks.end - run.ticks.begin
        for thread in range(threads):
            last = run.ticks.begin
            for begin, end in run.ticks.table[:, thread].tolist():
                busy += end - begin
                wait += begin - last
                last = end
            wait += run.ticks.end - last
    whole = one.stamps[4] - one.stamps[0]  # type: ignore[attr-defined]
    return busy, wait, threads * (whole - inside), threads * whole


@given(st.data())
def test_the_account_telescopes(data: st.DataObject) -> None:
    threads = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    most = data.draw(st.sampled_from([1, 100, 10**6, 10**12]))
    clock = Clock(LLAMA, threads, RATE, limits())
    spans = [(int(a), int(n)) for a, n in rng.integers([0, 1], [99, 5], (rng.integers(1, 4), 2))]
    valid = [int(rng.integers(0, n + 1)) for _, n in spans] if rng.random() < 0.5 else None
    of = batch(*spans, valid=valid)
    cut = int(rng.integers(0, LENGTH + 1))
    runs, now = [], int(rng.integers(0, 2**40))
    start = now
    for first, last in ((0, cut), (cut, LENGTH)):
        if first == last:
            continue
        shape = (last - first, threads)
        stamps = table(rng.integers(0, most, shape), rng.integers(0, most, shape), now + 5)
        end = int(stamps.max()) + int(rng.integers(0, most))
        runs.append(Run("step", Ticks(now + 3, end, stamps, first)))
        now = end
    kept = rng.random(len(of.rows["tok"])) < 0.7 if rng.random() < 0.5 else None
    one = cycle(of, *runs, stamps=(start, start + 1, start + 3, now + 4, now + 9), kept=kept)
    account = clock.add(one)
    busy, wait, outside, whole = by_hand(threads, one)
    assert sum(int(b.sum()) for b in account.busy.values()) == busy
    assert (account.wait, sum(account.stages.values()), account.total) == (wait, outside, whole)
    tree = account.tree()
    assert sum(tree.values()) == account.total and tuple(tree) == LEAVES
    assert min(tree.values()) >= 0 and account.model_error >= 0
    assert busy + account.model_error == sum(
        int(np.maximum(account.limit[s], account.busy[s]).sum()) for s in account.busy
    ), "what is below the limit is told apart, not clamped"


def test_a_lost_tick_is_noticed() -> None:
    clock = Clock(LLAMA, 2, RATE, limits())
    account = clock.add(steady(batch((9, 1)), LENGTH, 50))
    account.wait += 1
    with pytest.raises(AssertionError):
        account.check()


def test_ticks_of_more_threads_than_the_machine_has_are_noticed() -> None:
    clock = Clock(LLAMA, 2, RATE, limits())
    with pytest.raises(AssertionError):
        clock.add(steady(batch((9, 1)), LENGTH, 50, threads=3))


def test_every_tick_by_hand() -> None:
    declare = "weight w 32x32 f32"
    two = program("linear y, x, w\nact z, y kind=relu", declare)
    clock = Clock(two, 2, RATE, limits(near=128e9, far=128e9, peak=1e15))
    # (linear: 4096 of weight and 256 of x and y; act: 256) / 128 bytes a tick = 34 and 2 ticks
    stamps = np.array([[[100, 150], [102, 140]], [[160, 161], [158, 168]]])
    one = cycle(batch((5, 1)), Run("step", Ticks(90, 170, stamps)), stamps=(0, 20, 85, 175, 200))
    account = clock.add(one)
    assert account.busy["step"].tolist() == [50 + 38, 1 + 10]
    assert account.limit["step"].tolist() == [2 * 34, 2 * 2]
    assert account.stages == {"fetch": 40, "decode": 130, "execute": 2 * 10, "write_back": 50}
    assert account.wait == (10 + 10 + 9) + (12 + 18 + 2)
    assert account.tree() == {
        "memory_limit": 68 + 4, "compute_limit": 0, "memory_gap": 20 + 7, "core_gap": 0,
        "discarded": 0, "wait": 61, "front_end": 240,
    }  # fmt: skip
    assert account.total == 400 and account.model_error == 0
    assert account.bound == pytest.approx(2 * 36)


def test_model_error_is_told() -> None:
    clock = Clock(LLAMA, 2, RATE, limits(near=1e9, far=1e9))
    account = clock.add(steady(batch((9, 1)), LENGTH, 1))
    assert account.model_error == int(account.limit["step"].sum()) - 2 * LENGTH > 0
    assert account.tree()["memory_gap"] == 0, "nothing is above such a limit"


def test_instructions_that_did_not_run_are_no_model_error() -> None:
    clock = Clock(LLAMA, 1, RATE, limits())
    stamps = table(np.full((1, 1), 10**9), np.zeros((1, 1), int), 10)
    one = cycle(
        batch((9, 1)), Run("step", Ticks(10, 10 + 10**9, stamps, 3)),
        stamps=(0, 5, 10, 10 + 10**9, 20 + 10**9),
    )  # fmt: skip
    account = clock.add(one)
    assert account.model_error == 0
    assert np.flatnonzero(account.limit["step"]).tolist() == [3]


# --- rows that were for nothing


def test_padding_is_discarded() -> None:
    clock = Clock(LLAMA, 2, RATE, limits(near=1e15, far=1e15))  # compute alone, even over rows
    account = clock.add(steady(batch((0, 8), valid=[6], picks=[5]), LENGTH, 10**7))
    full = Clock(LLAMA, 2, RATE, limits(near=1e15, far=1e15)).add(
        steady(batch((0, 8)), LENGTH, 10**7)
    )
    linear = next(k for k, i in enumerate(LLAMA.section("step").instructions) if i.op == "qkv")
    assert account.ideal["step"][linear] == full.ideal["step"][linear]
    assert account.kept["step"][linear] == pytest.approx(full.kept["step"][linear] * 6 / 8, abs=1)
    tree = account.tree()
    assert tree["discarded"] > 0 and sum(tree.values()) == account.total
    assert full.tree()["discarded"] == 0


def test_rejected_rows_are_discarded_like_padding() -> None:
    padded = steady(batch((0, 8), valid=[6], picks=[5]), LENGTH, 10**7)
    mask = np.arange(8) < 6
    rejected = steady(batch((0, 8), picks=[5]), LENGTH, 10**7, kept=mask)
    accounts = [Clock(LLAMA, 2, RATE, limits()).add(one) for one in (padded, rejected)]
    assert accounts[0].tree() == accounts[1].tree()
    assert accounts[0].bound == accounts[1].bound, "the cycle's limit is that of the kept rows"


# --- kinds of cycles


def test_kinds_are_told_apart_and_tokens_counted_apart() -> None:
    clock = Clock(LLAMA, 2, RATE, limits())
    for of, retired in ((batch((0, 9)), 1), (batch((9, 1)), 1), (batch((10, 1), (0, 5)), 2)):
        clock.add(steady(of, LENGTH, 1000, retired=retired))
    counts = {
        k: (t.cycles, t.prompt_tokens, t.decode_rows, t.retired) for k, t in clock.kinds.items()
    }
    assert counts == {"prefill": (1, 9, 0, 1), "decode": (1, 0, 1, 1), "mixed": (1, 5, 1, 2)}


def test_decode_rows_of_a_mixed_cycle_are_costed_alone() -> None:
    mixed, alone = batch((100, 1), (0, 20), (70, 1)), batch((100, 1), (70, 1))
    both, one = (Clock(LLAMA, 2, RATE, limits()) for _ in range(2))
    both.add(steady(mixed, LENGTH, 1000, decoding=(True, False, True)))
    one.add(steady(alone, LENGTH, 1000))
    tally = both.kinds["mixed"]
    assert tally.decode_bound == pytest.approx(one.kinds["decode"].account.bound)
    assert 0 < tally.decode_bound < tally.account.bound


def test_a_prompt_of_one_row_is_not_decode() -> None:
    clock = Clock(LLAMA, 2, RATE, limits())
    clock.add(steady(batch((100, 1), (0, 1)), LENGTH, 1000, decoding=(True, False)))
    one = Clock(LLAMA, 2, RATE, limits())
    one.add(steady(batch((100, 1)), LENGTH, 1000))
    assert clock.kinds["mixed"].decode_bound == pytest.approx(one.kinds["decode"].account.bound)


def test_accounts_add_up() -> None:
    clock = Clock(LLAMA, 2, RATE, limits())
    parts = [clock.add(steady(batch((n, 1)), LENGTH, 100 + n)) for n in range(5)]
    tally = clock.kinds["decode"]
    tally.account.check()
    assert tally.account.total == sum(a.total for a in parts)
    assert tally.account.stages == {s: sum(a.stages[s] for a in parts) for s in STAGES}
    assert tally.ticks == tally.account.total // 2
    assert tally.account.tree() == {leaf: sum(a.tree()[leaf] for a in parts) for leaf in LEAVES}
    assert Account(2).tree() == dict.fromkeys(LEAVES, 0)


# --- limits


def test_weights_move_at_the_speed_of_the_whole_cycle() -> None:
    """A small matrix of a big program comes from memory, though it would fit into a cache."""
    declare = "weight w 32x32 f32\nweight big 65536x32 f32"
    small = program("linear y, x, w", declare)
    large = program("linear y, x, w\nlinear z, x, big", declare)
    fast = limit_of_only(small, batch((0, 1)))[0]
    slow = limit_of_only(large, batch((0, 1)))[0]
    assert fast == pytest.approx((4096 + 256) / 100e9)
    assert slow == pytest.approx(4096 / 10e9 + 256 / 100e9)


def limit_of_only(of: Program, of_batch: Batch, **options: float) -> np.ndarray:
    """(instructions,): seconds of memory of section step, alone in its cycle."""
    work = Works(of).of("step", of_batch)
    return limit_of(work, work.total, limits(**options)).memory


def test_an_activation_is_as_far_as_its_last_use() -> None:
    """`x` is read again by `binary` after 8 MB of weights; y and z are new each time."""
    declare = "weight big 65536x32 f32\nweight w 32x65536 f32"
    text = "act y, x kind=relu\nlinear h, y, big\nlinear z, h, w\n"
    far = limit_of_only(program(f"{text}binary r, z, x kind=add", declare), batch((0, 1)))
    again = f"{text}binary s, x, x kind=add\nbinary r, x, s kind=add"
    near = limit_of_only(program(again, declare), batch((0, 1)))
    row = 32 * 4
    # z went by with the 8 MB of its own instruction, x with all of them, r is written near.
    assert far[3] == pytest.approx(2 * row / 10e9 + row / 100e9)
    assert near[4] == pytest.approx(3 * row / 100e9), "the use in between brought x near"


def test_keys_of_this_cycle_are_near_and_older_ones_far() -> None:
    declare = "input q tok f32 width=16\nweight big 65536x16 f32"
    body = "store kv[0], q, q\nattend y, q, kv[0] heads=2\nlinear z, y, big"
    of = program(body, declare)
    position, row = 2 * 16 * 4, 16 * 4  # bytes of a cached position, and of q or y
    prefill = limit_of_only(of, batch((0, 64)))[1]
    assert prefill == pytest.approx(64 * (position + 2 * row) / 100e9)
    decode = limit_of_only(of, batch((63, 1)))[1]
    assert decode == pytest.approx(63 * position / 10e9 + (position + 2 * row) / 100e9)


def test_arithmetic_counts_at_the_peak_of_its_kind() -> None:
    declare = "weight a 32x32 q8_0\nweight b 32x32 f32"
    of = program("linear y, x, a act=q8_32\nlinear z, y, b", declare)
    work = Works(of).of("step", batch((0, 4)))
    limit = limit_of(work, work.total, limits(peak=1e6))
    assert limit.compute == pytest.approx([2 * 4 * 32 * 32 / 2e6, 2 * 4 * 32 * 32 / 1e6])
    assert limit.total == pytest.approx(limit.compute), "the larger term counts"
    with pytest.raises(UnsupportedError, match="no measured peak for 'int8'; measured: f32"):
        limit_of(work, 1.0, replace(limits(), peaks={"f32": limits().peaks["f32"]}))


def test_recurrent_steps_wait_for_each_other() -> None:
    head = 'program t "t"\ninput x tok f32 width=8\nstate m[1] fixed width=16\nweight a 32x8 f32\n'
    of = parse(f"{head}section step\nlstm h, m[0], x, a, a\n")
    for spans, steps in ((((0, 5), (0, 2)), 5), (((0, 4), (0, 3)), 4), (((3, 1), (5, 1)), 1)):
        work = Works(of).of("step", batch(*spans))
        assert limit_of(work, work.total, limits(step=1e-3)).serial.tolist() == [steps * 1e-3]


def test_a_cycle_of_two_sections_has_one_roof() -> None:
    """The sums of memory and arithmetic are taken over all sections before the larger counts."""
    head = 'program t "t"\ninput x tok f32 width=32\ninput s src f32 width=32\n'
    head += "weight w 32x32 f32\nweight v 4096x32 f32\n"
    of = parse(f"{head}section encode\nlinear e, s, w\nsection step\nlinear y, x, v\n")
    rows = Rows.of([(0, 512)]), Rows.of([(0, 1)])
    given = {"s": np.zeros((512, 32), np.float32), "x": np.zeros((1, 32), np.float32)}
    both = Batch({"src": rows[0], "tok": rows[1]}, given, np.zeros(1, np.int32))
    runs, now = [], 10
    for name in ("encode", "step"):
        runs.append(Run(name, Ticks(now, now + 10, np.array([[[now, now + 10]]]))))
        now += 10
    clock = Clock(of, 1, RATE, limits())
    account = clock.add(cycle(both, *runs, stamps=(0, 5, 10, 30, 35)))
    works = {n: Works(of).of(n, both) for n in ("encode", "step")}
    total = sum(w.total for w in works.values())
    apart = [limit_of(w, total, limits()) for w in works.values()]
    memory, compute = sum(x.memory.sum() for x in apart), sum(x.compute.sum() for x in apart)
    assert account.bound == pytest.approx(max(memory, compute) * RATE)
    assert account.bound < sum(x.total.sum() for x in apart) * RATE, "one overlaps the other"
    assert clock.kinds["mixed"].traffic.keys() == {"encode", "step"}


# --- what is remembered


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 6)), min_size=1, max_size=4))
def test_remembered_work_is_the_work_worked_out_anew(spans: list[tuple[int, int]]) -> None:
    for n, of in enumerate((batch(*spans), batch(*((a + 1, b) for a, b in spans)))):
        bound = Bound(LLAMA, "step", of)
        costs = [cost(i, bound) for i in LLAMA.section("step").instructions]
        work = WORKS.of("step", of)
        assert work.bytes == pytest.approx([c.bytes for c in costs]), n
        assert work.operations == pytest.approx([c.operations for c in costs])
        assert np.bincount(work.operand, work.operand_bytes, LENGTH) == pytest.approx(
            [c.activation for c in costs]
        ), "every activation byte belongs to an operand"


WORKS = Works(LLAMA)


def test_a_decode_cycle_works_out_few_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    works, calls = Works(LLAMA), []
    works.of("step", batch((5, 1)))
    monkeypatch.setattr(lmclock.roofline, "cost", lambda i, b: calls.append(i.op) or cost(i, b))
    works.of("step", batch((6, 1)))
    assert sorted(calls) == ["attend", "embed"], "one of each, of all layers"


def test_shapes_are_forgotten() -> None:
    works = Works(LLAMA)
    for rows in range(1, MOST_SHAPES + 20):
        works.of("step", batch((0, rows)))
    assert len(works.sections["step"].known) == MOST_SHAPES


def test_limits_between_and_beyond_the_measured_footprints() -> None:
    found = limits(near=100e9, far=25e9)
    assert found.bytes_per_second(1) == found.bytes_per_second(64 << 10) == pytest.approx(100e9)
    assert found.bytes_per_second(1 << 40) == pytest.approx(25e9)
    assert found.bytes_per_second(256 << 10) == pytest.approx(50e9), "half way on log scales"
    assert found.bytes_per_second(np.array([0, 1 << 20])) == pytest.approx([100e9, 25e9])
    assert found.spread_at(1 << 30) == 0.04 and found.spread_at(0) == 0.01
    assert found.spread == 0.04
