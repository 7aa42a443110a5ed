"""The fetch stage: which sequences have rows in the next cycle, and how many.

Continuous batching, in order of arrival. A running sequence past its prompt has one row (decode);
prompts fill the rows that are left, in chunks, and waiting sequences are admitted while slots and
pages last: one whose prompt fits beside a spare page for each running sequence, or the first one
when nothing runs.

Pages of new tokens are taken on demand. When there is none, the youngest running sequence is
preempted: it gives up its pages and waits, in its place by arrival, to be computed anew. The
oldest sequence is never preempted and any single one fits (request.py checks), so each cycle the
oldest advances and every sequence ends.

Where a chunk ends depends on the sequence alone: at multiples of `chunk`, at the end of the
prompt, and, when computed anew, after every new token, as the first time. So no sequence's
arithmetic depends on its neighbours. `invariant` promises that chunks do not matter to the machine,
and lets a sequence be computed anew in whole chunks.

Sources are encoded in cycles of their own, as soon as their sequences are admitted: a cycle waits
for both sections anyway, and so the clock can tell them apart. The beams of a search run in the
same cycles; they claim their slots when the search is admitted, and a preempted search starts over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from lmclock.cache import Cache
from lmclock.engine.facts import Facts
from lmclock.engine.request import Running
from lmclock.machines import Capacity

Span = tuple[Running, int, int]  # sequence, first position, rows


@dataclass(slots=True)
class Plan:
    """The spans of one cycle, in order of arrival. `picks` are the rows of each that are picked,
    its last ones; `encoded` those whose source rows run in this cycle, which has no others then.
    """

    spans: list[Span] = field(default_factory=list)
    picks: list[int] = field(default_factory=list)
    encoded: list[Running] = field(default_factory=list)


class Scheduler:
    """The sequences that wait and run, both ordered by arrival. `limit` bounds those running."""

    def __init__(
        self, facts: Facts, cache: Cache, capacity: Capacity, chunk: int, invariant: bool
    ) -> None:
        self.facts, self.cache, self.capacity = facts, cache, capacity
        self.invariant = invariant
        self.limit = min(capacity.slots, capacity.rows, capacity.picks)
        # Beside a row (and a pick) of every other sequence, a whole chunk always fits.
        self.chunk = min(chunk, capacity.rows - self.limit + 1)
        self.pick_chunk = min(self.chunk, capacity.picks - self.limit + 1)
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.preemptions = 0
        self.suspects: list[int] = []
        # the sequence that had to wait, and the room and number running when it had to
        self._refused = (-1, 0, 0)

    def add(self, sequence: Running) -> None:
        """Take it into the order of arrival."""
        insort(self.waiting, sequence, key=_arrival)

    def remove(self, sequence: Running) -> None:
        """Forget it and free what it holds, all beams of a search."""
        line = self.running if sequence.held else self.waiting
        unit = _unit(sequence)
        at = bisect_left(line, sequence.id, key=_arrival)
        del line[at : at + len(unit)]
        for one in unit:
            self._release(one)

    def fork(self, parent: Running, child: Running) -> None:
        """Take in a child that shares what the parent has computed, if there is a slot for it."""
        held = self.cache.fork(parent.held) if self._may_run() and parent.held else None
        if held is None:
            self.add(child)
        else:
            child.held, child.source_due = held, parent.source_due
            insort(self.running, child, key=_arrival)

    def expand(self, sequence: Running) -> list[Running]:
        """The beams of a search whose prompt is computed: each shares what the first one holds."""
        group = sequence.group
        assert group is not None and sequence.held is not None
        for beam in group.expand() if len(group.beams) == 1 else ():
            beam.held = self.cache.fork(sequence.held)
            assert beam.held is not None, "the slots were claimed when the search was admitted"
            insort(self.running, beam, key=_arrival)
        return group.beams

    def fetch(self) -> Plan:
        """The rows of the next cycle; none when nothing is left to run."""
        if not self.suspects and not (self.waiting and self._may_run()):
            decode = self._decode_only()
            if decode:
                return decode
        only = self._next_suspect()
        plan = self._encode(only) if self.facts.encodes else Plan()
        if plan.spans:
            return plan
        due = [self._due(sequence) for sequence in self.running]
        singles = due.count(1)
        left = _Left(self.capacity.rows - singles, self.capacity.picks - len(due))
        at = 0
        while at < len(self.running):  # preemption shortens the list from its end
            unit, count = _unit(self.running[at]), due[at]
            wanted = unit[0] is only or not only
            # All beams of a search run in the same cycle, or none.
            fits = wanted and (count == 1 or left.rows)
            if fits and all(self._make_room(one, count) for one in unit):
                for one in unit:
                    self._grant(plan, left, one, count)
            at += len(unit)
        # What is admitted with a source must be encoded first: by `_encode`, in the next cycle.
        admits = not only and not self.facts.encodes
        while self.waiting and left.rows and self._may_run() and admits:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            left.picks -= 1
            count = self._due(sequence)
            if count == 1:
                left.rows -= 1
            self._grant(plan, left, sequence, count)
        return plan

    def _encode(self, only: Running | None) -> Plan:
        """The cycle of sources that wait to be encoded, which has no token rows."""
        while self.waiting and self._may_run() and not only:
            if not self._admit(self.waiting[0]):
                break
        plan, rows = Plan(), self.capacity.rows
        for sequence in self.running:
            if 0 < sequence.source_due <= rows and (sequence is only or not only):
                rows -= sequence.source_due
                plan.spans.append((sequence, 0, 0))
                plan.picks.append(0)
                plan.encoded.append(sequence)
        return plan

    def _decode_only(self) -> Plan | None:
        """The plan when every running sequence has one new token and room for it, as in most
        cycles.
        """
        spans: list[Span] = []
        for sequence in self.running:
            held = sequence.held
            assert held is not None
            first = held.length
            new = sequence.prompt_length <= first == len(sequence.tokens) - 1
            if not new or held.ready == first or sequence.source_due:
                return None
            spans.append((sequence, first, 1))
        return Plan(spans, [1] * len(spans))

    def suspect(self, plan: Plan) -> None:
        """The machine failed on this plan: run each of its sequences alone, to find out whose
        fault it is.
        """
        self.suspects = list(dict.fromkeys(_unit(s)[0].id for s, _, _ in plan.spans))

    def _next_suspect(self) -> Running | None:
        while self.suspects:
            number = self.suspects.pop(0)
            for sequence in self.running:
                if sequence.id == number:
                    return sequence
        return None

    def _due(self, sequence: Running) -> int:
        """Rows of its next span."""
        assert sequence.held is not None
        length = sequence.held.length
        rest = len(sequence.tokens) - length
        if rest == 1:
            return 1
        if not self.facts.causal:
            return sequence.prompt_length if length == 0 else 1
        if length < sequence.prompt_length:
            rest = min(rest, sequence.prompt_length - length)
        elif not self.invariant:
            return 1
        chunk = self.pick_chunk if sequence.request.pick_all else self.chunk
        return min(rest, chunk - length % chunk)

    def _grant(self, plan: Plan, left: _Left, sequence: Running, count: int) -> None:
        """Plan the span if its rows fit; else nobody younger overtakes it with a longer one."""
        assert sequence.held is not None
        first = sequence.held.length
        picks = self._picks(sequence, first, count)
        extra = count if count > 1 else 0
        if extra > left.rows or picks - 1 > left.picks:
            left.rows = 0
            return
        left.rows -= extra
        left.picks -= max(picks - 1, 0)
        plan.spans.append((sequence, first, count))
        plan.picks.append(picks)

    def _picks(self, sequence: Running, first: int, count: int) -> int:
        """How many rows of the span, counted from its end, need logits."""
        end = first + count
        if not self.facts.picks:
            return 0
        if sequence.request.pick_all and end <= sequence.prompt_length:
            return min(count, max(0, end - sequence.delivered))
        if self.facts.next is None:
            return int(bool(sequence.request.want) and end == len(sequence.tokens))
        return int(end == len(sequence.tokens) < sequence.last)

    def _make_room(self, sequence: Running, count: int) -> bool:
        """Reserve pages for the span, preempting from the youngest on; False if that is itself."""
        assert sequence.held is not None
        while not self.cache.reserve(sequence.held, sequence.held.length + count):
            unit = _unit(self.running[-1])
            del self.running[-len(unit) :]
            for one in unit:
                self._release(one)
            if unit[0].group:
                unit[0].group.restart()
            insort(self.waiting, unit[0], key=_arrival)
            self.preemptions += 1
            if sequence in unit or sequence.group is unit[0].group is not None:
                return False
        return True

    def _admit(self, sequence: Running) -> bool:
        """Move the first waiting sequence to the running ones, if there is room.

        Looking for its prefix takes a hash for each page, so it is not done again for nothing.
        """
        number, room, running = self._refused
        if number == sequence.id and room >= self.cache.room and running <= len(self.running):
            return False
        held = self.cache.open(
            sequence.tokens,
            source=len(sequence.request.source),
            salt=sequence.salt,
            reuse=sequence.may_share,
            spare=len(self.running),
        )
        if held is None:
            self._refused = (sequence.id, self.cache.room, len(self.running))
            return False
        del self.waiting[0]
        sequence.held = held
        insort(self.running, sequence, key=_arrival)
        return True

    def _may_run(self) -> bool:
        """Whether there are slots for the first waiting sequence, and those it may become."""
        wanted = self.waiting[0].claims if self.waiting else 1
        return sum(sequence.claims for sequence in self.running) + wanted <= self.limit

    def _release(self, sequence: Running) -> None:
        if sequence.held is not None:
            self.cache.close(sequence.held)
            sequence.held, sequence.source_due = None, len(sequence.request.source)


@dataclass(slots=True)
class _Left:
    """What is left of a cycle's capacity: rows for spans of more than one, and picks."""

    rows: int
    picks: int


def _unit(sequence: Running) -> list[Running]:
    """What is scheduled as one: a sequence, or all beams of its search."""
    return sequence.group.beams if sequence.group else [sequence]


def _arrival(sequence: Running) -> int:
    return sequence.id
