"""Bursts: cycles in one call of the machine give the tokens, events and records of single steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lmclock.cycle import Cycles
from lmclock.engine import Engine, Event, Request, Sampling, capacity_for
from lmclock.errors import ProgramError
from lmclock.machines import Feed, create
from tests import tiny
from tests.helpers import batch_of, random_weights

VOCABULARY = 96
Found = tuple[dict[int, list[Event]], Cycles]


@pytest.fixture
def engine() -> Engine:
    program = tiny.llama(vocab=VOCABULARY)
    machine = create("native", threads=2)
    capacity = capacity_for(program, sequences=4, tokens=512, chunk=32, page_size=16)
    machine.load(program, random_weights(program), capacity)
    return Engine(machine, program, capacity=capacity, prefix_reuse=False)


def told(of: Engine, requests: list[Request], most: int) -> Found:
    """Events of each request in the order given, and all cycles."""
    cycles = Cycles()
    of.on_cycles = cycles.parts.append  # looked at once all have run: nothing may have changed them
    numbers = [of.add(request) for request in requests]
    events: dict[int, list[Event]] = {at: [] for at in range(len(numbers))}
    while of.busy:
        of.step(most, within=1e6)  # however slow the machine is now
        of.cache.check()
        for event in of.events:
            at = numbers.index(event.sequence)
            events[at].append(Event(at, event.tokens, event.finish, event.message))
    return events, cycles


def requests(sink: Callable[[], Callable[[int], bool]] | None = None) -> list[Request]:
    return [
        Request([5, 6, 7], 40),
        Request(list(range(20)), 25, Sampling(temperature=1.0, seed=3), sink=sink and sink()),
        Request([9], 33, Sampling(temperature=0.9, top_k=5, seed=4)),
    ]


def test_a_burst_gives_what_single_steps_give(engine: Engine) -> None:
    single, alone = told(engine, requests(), 1)
    many, together = told(engine, requests(), 16)
    assert many == single
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        for name in ("kind", "prompt_rows", "decode_rows", "retired", "decoding"):
            assert getattr(one, name) == getattr(other, name)
        a, b = one.batch, other.batch
        assert a.rows["tok"].positions.tolist() == b.rows["tok"].positions.tolist()
        assert a.inputs["ids"].tolist() == b.inputs["ids"].tolist()
        assert a.sampling.tolist() == b.sampling.tolist()
        assert other.kept is None
    for one, other in pairwise(together):
        assert other.number == one.number + 1
        assert one.stamps[4] <= other.stamps[0]
        assert list(other.stamps) == sorted(other.stamps)
    touching = sum(one.stamps[4] == other.stamps[0] for one, other in pairwise(together))
    assert touching > len(together) / 2, "few cycles ran in bursts"


def test_a_sampled_end_ends_the_burst(engine: Engine) -> None:
    first, _ = told(engine, [Request([5, 6, 7], 40)], 1)
    token = first[0][7].tokens[0]
    stopped = [Request([5, 6, 7], 40, stop_ids=frozenset({token, 3})), Request([8], 40)]
    single, alone = told(engine, stopped, 1)
    many, together = told(engine, stopped, 16)
    assert many == single
    assert single[0][-1].finish == "stop"
    assert len(alone) == len(together)


def test_a_sink_that_ends_in_the_middle_leaves_rows_of_no_use(engine: Engine) -> None:
    def sink() -> Callable[[int], bool]:
        heard: list[int] = []

        def hear(token: int) -> bool:
            heard.append(token)
            return len(heard) < 10

        return hear

    single, alone = told(engine, requests(sink), 1)
    many, together = told(engine, requests(sink), 16)
    assert many == single
    assert single[1][-1].finish == "stop"
    wasted = [cycle for cycle in together if cycle.kept is not None]
    assert wasted and not any(cycle.retired or np.any(cycle.kept) for cycle in wasted)
    assert len(together) == len(alone) + len(wasted)


def test_what_cannot_follow_from_a_cycle_is_refused(engine: Engine) -> None:
    machine = engine.machine
    feed = Feed("ids", None, "next", [()])
    two = batch_of(engine.program, [(0, 2)], ids=np.array([[1], [2]], np.int32))
    machine.bind(replace(two, page_size=16))
    with pytest.raises(ProgramError, match="one picked row for each sequence"):
        machine.run_many("step", 4, feed)


def test_a_burst_ends_within_the_time_it_has(engine: Engine) -> None:
    engine.add(Request([5, 6, 7], 64))
    for _ in range(3):  # the prompt, and cycles that say how long one takes
        engine.step()
    assert len(engine.step(32, within=0.0)) == 1
    (cycle,) = engine.step()
    took = (cycle.stamps[4] - cycle.stamps[0]) / engine.machine.traits.tick_rate
    assert len(engine.step(32, within=3.5 * took)) == 3
    assert len(engine.step(32, within=1e6)) == 6  # the page is full


def test_cycles_are_found_by_number(engine: Engine) -> None:
    _, cycles = told(engine, requests(), 16)
    every = list(cycles)
    assert len(cycles.parts) < len(cycles) == len(every)
    for n in range(-len(every), len(every)):
        assert cycles[n] is every[n]
    assert list(cycles[1:-1:2]) == every[1:-1:2]
    assert not Cycles()
    for n in (len(every), -len(every) - 1):
        with pytest.raises(IndexError, match=f"none has the index {n}"):
            cycles[n]
