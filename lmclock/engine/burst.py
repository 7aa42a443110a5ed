"""Bursts: several decode cycles in one call of the machine.

Between two cycles Python finds the caches of the processor full of weights, and what takes 15 us
warm takes 150. Where nothing of a cycle depends on Python (all sequences decode, no receivers, no
penalties, nobody waits) the machine feeds itself, and the cycles are written back together. Each
still has its record and its stamps: those of a burst touch, and writing back is the last one's.

A sequence that its sink ends in the middle leaves cycles behind that were for nothing. Their
records say so (`kept`), nothing of them is committed, and other sequences compute the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np

from lmclock.batch import Batch, Rows
from lmclock.cache import Cache
from lmclock.cycle import Cycle, Run
from lmclock.engine.facts import POSITIONS, TOKENS, Facts
from lmclock.engine.fetch import Plan, Scheduler
from lmclock.engine.request import Event
from lmclock.engine.write_back import Outcome, write_back
from lmclock.machines import Feed, Machine, Ticks

BURST = 32  # cycles in one call of the machine: longer ones gain nothing
LONGEST = 0.1  # seconds: so long may a caller wait before it can cancel


def burst_length(plan: Plan, scheduler: Scheduler, facts: Facts, most: int) -> int:
    """How many cycles may follow each other from this plan on, up to `most`."""
    if most < 2 or scheduler.waiting or scheduler.suspects or facts.fixed or facts.encodes:
        return 1
    if facts.routed[facts.main]:  # a record says which experts its routers chose
        return 1
    if facts.next is None or any(i.name not in TOKENS + POSITIONS for i in facts.inputs):
        return 1
    for sequence, first, count in plan.spans:
        held, request = sequence.held, sequence.request
        assert held is not None
        new = sequence.prompt_length <= first == len(sequence.tokens) - 1
        if count != 1 or not new or request.want or sequence.tally or sequence.group:
            return 1
        most = min(most, sequence.last - len(sequence.tokens), held.ready - first)
    return most if sum(plan.picks) == len(plan.spans) else 1


def feed_of(plan: Plan, facts: Facts) -> Feed:
    """What run_many is told of the plan's sequences."""
    names = [i.name for i in facts.inputs]
    ids = next((name for name in names if name in TOKENS), None)
    positions = next((name for name in names if name in POSITIONS), None)
    assert facts.next is not None
    return Feed(ids, positions, facts.next, [sequence.stops for sequence, _, _ in plan.spans])


@dataclass
class Burst:
    """Cycles that ran in one call, on their way to be written back one after the other."""

    plan: Plan
    batch: Batch  # of the first cycle
    ticks: Sequence[Ticks]
    tokens: np.ndarray  # (cycles, sequences)
    outcomes: list[Outcome] = field(default_factory=list)
    useful: int = 0  # cycles until a sink ended a sequence

    @staticmethod
    def run(machine: Machine, plan: Plan, batch: Batch, facts: Facts, most: int) -> Burst:
        """At least one cycle of a bound batch; what the machine raises is of the first."""
        ticks, tokens = machine.run_many(facts.main, most, feed_of(plan, facts))
        return Burst(plan, batch, ticks, tokens)

    def write_back(self, facts: Facts, cache: Cache) -> list[Event]:
        """The events of all cycles."""
        events: list[Event] = []
        rows = len(self.plan.spans)
        for n, tokens in enumerate(self.tokens.tolist()):
            if self.useful < n:
                self.outcomes.append(Outcome(decode_rows=rows, decoding=[True] * rows))
                continue
            outcome = write_back(_later(self.plan, n), tokens, {}, facts, cache)
            self.outcomes.append(outcome)
            events += outcome.events
            self.useful += not any(event.finish for event in outcome.events)
        return events


@dataclass
class Records(Sequence[Cycle]):
    """The records of a burst that is written back, made when they are looked at: most replies'
    never are, and after so many cycles every object is made with cold caches.

    `stamps` are the first cycle's up to where it is executed; `end` is when the last was written
    back.
    """

    burst: Burst
    facts: Facts
    number: int
    stamps: tuple[int, int, int]
    end: int

    def __len__(self) -> int:
        return len(self.burst.outcomes)

    @overload
    def __getitem__(self, at: int) -> Cycle: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Cycle]: ...
    def __getitem__(self, at: int | slice) -> Cycle | Sequence[Cycle]:
        return self._cycles[at]

    @cached_property
    def _cycles(self) -> list[Cycle]:
        burst = self.burst
        batches = _batches(burst.batch, burst.tokens, self.facts)
        nothing = np.zeros(len(burst.plan.spans), bool)
        cycles, (begin, fetched, decoded) = [], self.stamps
        for n, (ticks, outcome) in enumerate(zip(burst.ticks, burst.outcomes, strict=True)):
            if n:
                begin = fetched = burst.ticks[n - 1].end
                decoded = ticks.begin
            end = self.end if n + 1 == len(self) else ticks.end
            cycles.append(
                Cycle(
                    self.number + n, batches[n], (Run(self.facts.main, ticks),),
                    (begin, fetched, decoded, ticks.end, end), outcome.prompt_rows,
                    outcome.decode_rows, outcome.retired, tuple(outcome.decoding),
                    nothing if burst.useful < n else None,
                )
            )  # fmt: skip
        return cycles


def _batches(first: Batch, tokens: np.ndarray, facts: Facts) -> list[Batch]:
    """The batch of each cycle: `first`, and those in which the tokens of the one before run. Their
    arrays are rows of a few made for all, because each array function finds the caches cold.
    """
    old, cycles = first.rows[facts.space], len(tokens)
    steps = np.arange(cycles, dtype=np.int32)
    positions = old.positions + steps[:, None]
    sampling = [first.sampling] * cycles
    drawing = first.sampling["temperature"] != 0  # greedy rows draw nothing
    if drawing.any():
        every = np.repeat(first.sampling[None], cycles, axis=0)
        every["draw"] += (steps[:, None] * drawing).astype(np.uint64)
        sampling = list(every)
    batches = [first]
    for n in range(1, cycles):
        inputs = {
            i.name: (tokens[n - 1] if i.name in TOKENS else positions[n])[:, None]
            for i in facts.inputs
        }
        rows = {facts.space: Rows(old.starts, positions[n], old.valid)}
        batches.append(
            Batch(
                rows, inputs, first.slots, first.pages, first.lengths, first.page_size,
                first.pick, sampling[n], first.adjust,
            )
        )  # fmt: skip
    return batches


def _later(plan: Plan, cycles: int) -> Plan:
    """The plan so many cycles on."""
    spans = [(sequence, first + cycles, count) for sequence, first, count in plan.spans]
    return Plan(spans, plan.picks)
