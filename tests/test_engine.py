"""The engine's four stages, on a machine whose tokens are hashes of what each row sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lmclock.cycle import Cycle
from lmclock.engine import Engine, Event, Request, Sampling
from lmclock.engine.fetch import Plan
from lmclock.errors import ContextError, LmclockError, OptionError
from tests.hash_machine import KINDS, HashMachine, engine, expected, ids, logits_of


def request(kind: str, prompt: list[int], new: int, **options: Any) -> Request:
    source = ids(5, len(prompt)) if kind == "encoder" else ()
    return Request(prompt, new, source=source, **options)


def results(of: Engine) -> dict[int, tuple[list[int], str]]:
    """Tokens and finish of every sequence, run until nothing is left."""
    found: dict[int, tuple[list[int], str]] = {}
    for event in of.run():
        tokens, finish = found.get(event.sequence, ([], ""))
        assert not finish, "news of a sequence that has ended"
        found[event.sequence] = (tokens + list(event.tokens), event.finish or "")
        of.cache.check()
    assert not of.cache.open_sequences and not of.live
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_sequence_gives_alone(kind: str) -> None:
    of = engine(kind)
    requests = [request(kind, ids(n), 12) for n in (1, 3, 16, 17, 40, 2, 33, 5)]
    numbers = [of.add(r) for r in requests]
    assert results(of) == {n: expected(r) for n, r in zip(numbers, requests, strict=True)}


@pytest.mark.parametrize("kind", (*KINDS, "whole"))
@pytest.mark.parametrize("invariant", (False, True))
def test_preempted_sequences_end_with_the_same_tokens(kind: str, invariant: bool) -> None:
    of = engine(kind, tokens=40, invariant=invariant)
    requests = [request(kind, ids(n), 20) for n in (9, 11, 10, 12)]
    numbers = [of.add(r) for r in requests]
    assert results(of) == {n: expected(r) for n, r in zip(numbers, requests, strict=True)}
    assert (of.scheduler.preemptions > 0) == (kind != "fixed")


def test_prompts_mix_with_decode_rows_and_are_cut_in_the_same_places() -> None:
    """Where a sequence stands after each of its cycles does not depend on its neighbours."""

    def steps(arrivals: dict[int, int]) -> tuple[dict[int, list[int]], set[str]]:
        of = engine()
        found: dict[int, list[int]] = {}
        kinds = set()
        for time in range(60):
            if time in arrivals:
                of.add(Request(ids(arrivals[time]), 9))
            kinds |= {cycle.kind for cycle in of.step()}
            for s in of.live.values():
                lengths = found.setdefault(s.prompt_length, [])
                if s.held and s.held.length not in [0, *lengths]:
                    lengths.append(s.held.length)
        return found, kinds

    crowd, kinds = steps({0: 4, 5: 20, 6: 40, 7: 35, 8: 33, 9: 5})
    assert kinds == {"prefill", "mixed", "decode"}
    assert crowd[40] == [16, 32, *range(40, 48)]
    for n in (20, 40, 35, 33):
        assert crowd[n] == steps({0: n})[0][n]


def test_a_cycle_records_rows_stamps_and_tokens() -> None:
    cycles: list[Cycle] = []
    of = engine(on_cycles=cycles.extend)
    of.add(Request(ids(20), 3))
    of.add(Request(ids(4), 2))
    list(of.run())
    assert [c.number for c in cycles] == list(range(len(cycles)))
    assert sum(c.prompt_rows for c in cycles) == 24
    assert sum(c.retired for c in cycles) == 5
    assert sum(c.decode_rows for c in cycles) == 3
    stamps = [tick for c in cycles for tick in c.stamps]
    assert stamps == sorted(set(stamps))
    for c in cycles:
        assert all(c.stamps[2] < r.ticks.begin < r.ticks.end < c.stamps[3] for r in c.runs)


def test_records_of_past_cycles_do_not_change() -> None:
    cycles: list[Cycle] = []
    of = engine(on_cycles=cycles.extend)
    of.add(Request(ids(6), 12, Sampling(temperature=1, repetition=1.1)))
    of.step()
    (first,) = of.step()
    batch = first.batch
    copies = [batch.rows["tok"].positions, batch.inputs["ids"], batch.sampling, batch.adjust,
              batch.pages["kv"][0], batch.pick, batch.slots]  # fmt: skip
    before = [array.copy() for array in copies]
    list(of.run())
    assert all(np.array_equal(a, b) for a, b in zip(copies, before, strict=True))


def test_finish_reasons_and_what_is_handed_out() -> None:
    base = Request(ids(6), 10)
    tokens, _ = expected(base)
    of = engine(eos=frozenset({tokens[4]}))
    where = tokens.index(tokens[4])
    taken: list[int] = []

    def two(token: int) -> bool:
        taken.append(token)
        return len(taken) < 2

    cases = {
        of.add(base): (tokens[:where], "stop"),
        of.add(Request(ids(6), 10, ignore_eos=True)): (tokens, "length"),
        of.add(Request(ids(6), 10, ignore_eos=True, stop_ids=frozenset({tokens[0]}))): ([], "stop"),
        of.add(Request(ids(6), 10, ignore_eos=True, sink=two)): (tokens[:2], "stop"),
        of.add(Request(ids(6), 0)): ([], "length"),
    }
    assert results(of) == cases
    assert taken == tokens[:2]


def test_a_sequence_the_machine_fails_on_ends_alone() -> None:
    """Its neighbours are found innocent, one by one, and end with the tokens they always have."""
    of = engine()
    run, bad = of.machine.run, 3
    requests = [Request([5, 6, k], 6) for k in range(8)]

    def failing(section: str, *span: Any) -> Any:
        ticks = run(section, *span)
        assert isinstance(of.machine, HashMachine) and of.machine.bound
        rows = of.machine.bound.rows["tok"]
        ids = of.machine.bound.inputs["ids"][:, 0]
        if bad in ids[rows.positions == 2]:
            of.machine.bound = None
            raise LmclockError("logits cannot be sampled")
        return ticks

    of.machine.run = failing
    ended: list[Event] = []
    numbers = [of.add(replace(r, ended=ended.append)) for r in requests]
    want = {n: expected(r) for n, r in zip(numbers, requests, strict=True)}
    want[numbers[bad]] = ([], "error")
    assert results(of) == want
    messages = {event.sequence: event.message for event in ended}
    assert messages == dict.fromkeys(numbers, "") | {bad: "logits cannot be sampled"}


def test_cancelling_frees_at_once_and_says_so() -> None:
    of = engine()
    ended: list[Event] = []
    numbers = [of.add(Request(ids(9, k), 30, ended=ended.append)) for k in range(8)]
    of.step()
    for number in numbers:
        assert of.cancel(number) and not of.cancel(number)
    assert [event.finish for event in ended] == ["cancelled"] * 8
    assert not of.cache.open_sequences
    assert of.busy and not of.step()
    assert of.events == [Event(number, (), "cancelled") for number in numbers]
    assert not of.busy and not of.cancel(99)


def test_prefix_reuse_computes_less_and_gives_the_same() -> None:
    rows = []
    shared = ids(24)
    for reuse in (True, False):
        cycles: list[Cycle] = []
        of = engine(prefix_reuse=reuse, on_cycles=cycles.extend)
        for tail in ([1], [2], [1]):
            r = Request(shared + tail, 4)
            number = of.add(r)
            assert results(of) == {number: expected(r)}
        rows.append(sum(c.prompt_rows for c in cycles))
    assert rows == [25 + 1 + 1, 75]


def test_salts_and_other_sources_share_nothing() -> None:
    for kind, changed in (("paged", {"salt": b"b"}), ("encoder", {"source": ids(7)})):
        of = engine(kind)
        total = []
        of.on_cycles = lambda cs, total=total: total.extend(c.prompt_rows for c in cs)
        first = {"source": ids(6)} if kind == "encoder" else {"salt": b"a"}
        for options in (first, changed, first):
            of.add(Request(ids(12), 0, **options))
            list(of.run())
        # A source has a cycle of its own before its prompt.
        assert total == ([12, 12, 4] if kind == "paged" else [6, 12, 7, 12, 6, 4])


def test_forks_share_the_cache_and_draw_their_own_tokens() -> None:
    for kind in KINDS:
        of = engine(kind)
        parent = request(kind, ids(10), 12, sampling=Sampling(temperature=1, seed=1))
        number = of.add(parent)
        for _ in range(5):
            of.step()
        own = Sampling(temperature=1, seed=2, frequency=50)
        child = of.fork(number, own)
        assert child is not None
        start = list(of.live[child].tokens)
        found = results(of)
        # the events of the first steps were heard before `results`
        assert start[10:] + found[number][0] == expected(parent)[0]
        forked = request(kind, ids(10), 12, sampling=own)
        assert found[child] == expected(forked, start=start)
        assert found[child][0] != found[number][0]
        assert isinstance(of.machine, HashMachine) and of.machine.copies > 0
        assert of.fork(number) is None


@pytest.mark.parametrize("chunk", (3, 16))
def test_receivers_get_every_row_once(chunk: int) -> None:
    """Logits at each position of a prompt and at each new token, preemption or not."""
    of = engine(tokens=32, chunk=chunk)
    rows: dict[int, list[tuple[int, np.ndarray]]] = {}
    seen: dict[int, list[tuple[int, float]]] = {}
    requests = []
    for n in (14, 11, 9):
        rows[n] = []
        seen[n] = []
        want = {
            "logits": lambda at, x, n=n: rows[n].append((at, x.copy())),
            "x": lambda at, x, n=n: seen[n].extend(enumerate(x[:, 0], at)),
        }
        requests.append(Request(ids(n), 10, want=want, pick_all=True))
        of.add(requests[-1])
    results(of)
    assert of.scheduler.preemptions > 0
    for r in requests:
        n = len(r.prompt)
        tokens = [*r.prompt, *expected(r)[0]]
        at = [first + k for first, x in rows[n] for k in range(len(x))]
        assert at == list(range(n + 9))
        stacked = np.concatenate([x for _, x in rows[n]])
        right = [logits_of(tokens[: k + 1], ()) for k in range(n + 9)]
        assert np.array_equal(stacked, np.array(right))
        assert seen[n] == list(enumerate(tokens[:-1]))


def test_a_prompt_as_long_as_the_context_leaves_room_or_is_refused() -> None:
    of = engine()
    number = of.add(Request(ids(60)))  # the context is 64
    assert results(of)[number] == expected(Request(ids(60), 4))
    of.add(Request(ids(64), 0))
    assert len(results(of)) == 1
    with pytest.raises(ContextError, match=r"prompt of 64 tokens does not fit.* 64 tokens"):
        of.add(Request(ids(64)))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (Request([]), OptionError, "prompt is empty"),
        (Request([1, 13]), OptionError, "token id 13 in the prompt; valid: 0 to 12"),
        (Request([1, -1]), OptionError, "token id -1"),
        (Request([1.5]), OptionError, "whole token ids"),
        (Request(ids(60), 5), ContextError, "60 tokens and 5 new ones .* context .* 64 tokens"),
        (Request(ids(65)), ContextError, "65 tokens does not fit"),
        (Request([1], -1), OptionError, "max_new_tokens=-1"),
        (Request([1], 2**63), ContextError, "does not fit"),
        (Request([1], True), OptionError, "max_new_tokens=True"),
        (Request([1], source=[1]), OptionError, "no encoder, so 1 source tokens"),
        (Request([1], inputs={"types": np.zeros((1, 1))}), OptionError, "'types'.* valid: none"),
        (Request([1], want={"nought": print}), OptionError, "want='nought'"),
        (Request([1], 1, Sampling(logit_bias={13: 1})), OptionError, "token 13: valid ids: 0 to 1"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_any_work(
    wrong: Request, kind: type[LmclockError], message: str
) -> None:
    of = engine()
    with pytest.raises(kind, match=message):
        of.add(wrong)
    assert not of.busy


def test_capacity_is_part_of_the_check() -> None:
    with pytest.raises(ContextError, match=r"30 tokens and 5 .* room of the cache is 32 tokens"):
        engine(tokens=32).add(Request(ids(30), 5))
    of = engine("encoder")
    with pytest.raises(OptionError, match="needs source tokens"):
        of.add(Request([1], 1))
    with pytest.raises(ContextError, match="source of 20 tokens must run in one cycle"):
        of.add(Request([1], 1, source=ids(20)))
    with pytest.raises(OptionError, match="chunk=0"):
        engine(chunk=0)


def spans_of(of: Engine) -> dict[int, list[tuple[int, int]]]:
    """(first, rows) of every span planned from now on, by sequence."""
    spans: dict[int, list[tuple[int, int]]] = {}
    fetch = of.scheduler.fetch

    def recorded() -> Plan:
        plan = fetch()
        for sequence, first, count in plan.spans:
            spans.setdefault(sequence.id, []).append((first, count))
        return plan

    of.scheduler.fetch = recorded
    return spans


def test_a_sequence_computed_anew_repeats_its_first_spans_unless_invariant() -> None:
    alone = {}
    for n in (9, 11, 10, 12):
        of = engine()
        spans = spans_of(of)
        number = of.add(Request(ids(n), 20))
        results(of)
        alone[n] = set(spans[number])
    for invariant_ in (False, True):
        of = engine(tokens=40, invariant=invariant_, prefix_reuse=False)
        spans = spans_of(of)
        numbers = [of.add(Request(ids(n), 20)) for n in (9, 11, 10, 12)]
        results(of)
        assert of.scheduler.preemptions > 0
        same = [set(spans[k]) == alone[n] for k, n in zip(numbers, (9, 11, 10, 12), strict=True)]
        assert all(same) != invariant_


def test_a_prompt_is_admitted_only_beside_a_spare_page_for_each_that_runs() -> None:
    of = engine(tokens=16)
    for n in (7, 6):
        of.add(Request(ids(n), 5))
    assert len(results(of)) == 2 and of.scheduler.preemptions == 0


def test_a_prompt_that_must_not_be_cut_waits_for_its_rows_and_is_not_overtaken() -> None:
    of = engine("whole", rows=12)
    of.add(Request(ids(3), 20))
    of.step()
    spans = spans_of(of)
    whole = of.add(Request(ids(12), 2))
    later = [of.add(Request(ids(2, k), 20)) for k in range(3)]
    found = results(of)
    assert spans[whole][0] == (0, 12)
    assert found[whole] == expected(Request(ids(12), 2))
    assert [spans[n][0] for n in later] == [(0, 2)] * 3
    assert list(found)[:2] == [0, whole]
    with pytest.raises(ContextError, match="13 tokens must run in one cycle, which takes 12 rows"):
        of.add(Request(ids(13), 1))


def test_nothing_starves_behind_long_prompts_or_short_ones() -> None:
    """Short requests keep arriving; the long prompt is still first to finish of its cohort."""
    of = engine(tokens=64)
    long = of.add(Request(ids(50), 4))
    ended: list[int] = []
    for k in range(60):
        of.add(Request(ids(3, k), 2))
        of.step()
        ended += [event.sequence for event in of.events if event.finish]
        if long in ended:
            break
    assert long in ended and len(ended) <= 12
