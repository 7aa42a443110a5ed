"""The engine: sequences in, one clock cycle at a time, tokens out.

    engine = Engine(machine, program, capacity=capacity, eos=frozenset({2}))
    number = engine.add(Request(prompt=ids, max_new_tokens=64))
    for event in engine.run():
        print(event.tokens, event.finish)

The machine has already loaded the program with the same capacity. A cycle is four stages, each in
the file of its name: fetch, decode, execute (here), write_back. Time is the machine's, read where
one stage follows the other. The engine knows token ids only: text is made in `Request.sink`.
Perplexity reads rows: `Request(ids, 0, want={"logits": receiver}, pick_all=True)`.
An engine belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import numpy as np

from lmclock.batch import Batch
from lmclock.cache import Cache
from lmclock.cycle import Cycle, Cycles, Run
from lmclock.engine.burst import LONGEST, Burst, Records, burst_length
from lmclock.engine.decode import Decoder
from lmclock.engine.facts import read_facts
from lmclock.engine.fetch import Plan, Scheduler
from lmclock.engine.request import Event, Request, Running, Sink, last_length
from lmclock.engine.sampling import Sampling, Tally
from lmclock.engine.search import Beams, Hypothesis
from lmclock.engine.write_back import write_back
from lmclock.errors import LmclockError, OptionError
from lmclock.machines import Capacity, Machine
from lmclock.program import Program

__all__ = ["Beams", "Engine", "Event", "Hypothesis", "Request", "Sampling", "capacity_for"]


class Engine:
    """See the module's header. `chunk` bounds the rows of a prompt in one cycle; `invariant` says
    that the machine gives a prompt the same bits however it is cut (fetch.py). `prefix_reuse`
    shares cached pages between equal beginnings, so that what follows is cut elsewhere. `on_cycles`
    hears every cycle, those of one step at a time.
    """

    def __init__(
        self,
        machine: Machine,
        program: Program,
        *,
        capacity: Capacity,
        eos: frozenset[int] = frozenset(),
        chunk: int = 512,
        invariant: bool = False,
        prefix_reuse: bool = True,
        on_cycles: Callable[[Sequence[Cycle]], None] | None = None,
    ) -> None:
        if chunk < 1:
            raise OptionError(f"chunk={chunk} is out of range; valid: 1 or more")
        self.machine, self.program, self.capacity = machine, program, capacity
        self.eos, self.on_cycles = eos, on_cycles
        self.facts = facts = read_facts(program)
        self.cache = Cache(
            capacity.slots,
            capacity.page_size,
            min((capacity.pages[name] for name in facts.paged), default=None),
            min((capacity.pages[name] for name in facts.frozen), default=None),
            fixed=bool(facts.fixed),
            reuse=prefix_reuse and facts.causal,
        )
        self.scheduler = Scheduler(facts, self.cache, capacity, chunk, invariant)
        self.decoder = Decoder(facts, self.scheduler.limit, capacity.page_size)
        self.live: dict[int, Running] = {}
        self.events: list[Event] = []  # of the last step, and of cancellations before it
        self._news: list[Event] = []
        self._number = 0
        self._cycles = 0
        self._took = 0  # ticks of the last cycle

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.live or self._news)

    def check(self, request: Request) -> int:
        """The length at which the request would be finished; the errors of `add` when it cannot
        run.
        """
        return last_length(request, self.program, self.facts, self.cache, self.capacity)

    def add(self, request: Request) -> int:
        """Queue a sequence and return its number. Errors (see Request) come before any work."""
        sequence = self._enter(request, self.check(request))
        self.scheduler.add(sequence)
        return sequence.id

    def fork(
        self,
        number: int,
        sampling: Sampling | None = None,
        sink: Sink | None = None,
        ended: Callable[[Event], None] | None = None,
    ) -> int | None:
        """A second sequence that goes on from where `number` stands, sharing its cache; None when
        it is over. Without another seed it draws the same tokens; it has no receivers.
        """
        parent = self.live.get(number)
        if parent is None:
            return None
        if parent.group:
            raise OptionError(f"sequence {number} is a search, which cannot be forked")
        sampling = sampling or parent.request.sampling
        request = replace(
            parent.request, sampling=sampling, sink=sink, ended=ended, want={}, pick_all=False
        )
        child = self._enter(request, parent.last)
        child.tokens = list(parent.tokens)
        if child.tally:
            child.tally = Tally(sampling, child.tokens)
        self.scheduler.fork(parent, child)
        return child.id

    def cancel(self, number: int) -> bool:
        """End a sequence between cycles; its last event comes with the next step. False when it is
        over already.
        """
        if number not in self.live:
            return False
        self._news.append(Event(number, (), "cancelled"))
        self._forget(self._news[-1])
        return True

    def step(self, most: int = 1, within: float = LONGEST) -> Sequence[Cycle]:
        """One clock cycle, or up to `most` where they need nothing in between (burst.py) and are
        done in about `within` seconds. They are returned; `events` holds their news.

        None ran when no sequence is left to run, or when the machine failed: a sequence that fails
        alone ends with `error`; of several, each is run alone in the cycles that follow.
        """
        now = self.machine.now
        begin = now()
        plan = self.scheduler.fetch()
        self._copy()
        if not plan.spans:
            assert not self.live, "sequences are left, but none has a row due"
            self._tell([])
            return ()
        fetched = now()
        batch = self.decoder.decode(plan)
        self.machine.bind(batch)
        decoded = now()
        length = self._burst_length(plan, most, within)
        if length > 1:
            return self._burst(plan, batch, length, (begin, fetched, decoded))
        try:
            runs, values = self._execute(plan, batch)
        except LmclockError as error:
            self._fail(plan, str(error))
            return ()
        executed = now()
        sampled: list[int] = []
        if len(batch.pick) and self.facts.next is not None:
            sampled = [token for (token,) in self.machine.read(self.facts.next).tolist()]
        if self.on_cycles:
            batch = self._observed(batch, runs)
        self.machine.commit()
        outcome = write_back(plan, sampled, values, self.facts, self.cache, self.scheduler.expand)
        self._tell(outcome.events)
        cycle = Cycle(
            self._cycles, batch, tuple(runs), (begin, fetched, decoded, executed, now()),
            outcome.prompt_rows, outcome.decode_rows, outcome.retired, tuple(outcome.decoding),
        )  # fmt: skip
        return self._record([cycle], cycle.stamps[4] - begin)

    @contextmanager
    def heard(self) -> Iterator[Cycles]:
        """The cycles of what runs inside, which nobody else hears."""
        cycles = Cycles()
        before, self.on_cycles = self.on_cycles, cycles.parts.append
        try:
            yield cycles
        finally:
            self.on_cycles = before

    def _burst_length(self, plan: Plan, most: int, within: float) -> int:
        """How many cycles run in one call."""
        traits = self.machine.traits
        if most < 2 or not traits.many or not self._took:
            return 1
        fit = int(within * traits.tick_rate / self._took)
        return burst_length(plan, self.scheduler, self.facts, min(most, fit))

    def _burst(
        self, plan: Plan, batch: Batch, length: int, stamps: tuple[int, int, int]
    ) -> Sequence[Cycle]:
        try:
            burst = Burst.run(self.machine, plan, batch, self.facts, length)
        except LmclockError as error:
            self._fail(plan, str(error))
            return ()
        self._tell(burst.write_back(self.facts, self.cache))
        cycles = Records(burst, self.facts, self._cycles, stamps, self.machine.now())
        return self._record(cycles, cycles.end - stamps[0])

    def _record(self, cycles: Sequence[Cycle], ticks: int) -> Sequence[Cycle]:
        """Count the cycles, which took so many ticks, and let them be heard."""
        self._cycles += len(cycles)
        self._took = ticks // len(cycles)
        if self.on_cycles:
            self.on_cycles(cycles)
        return cycles

    def _observed(self, batch: Batch, runs: list[Run]) -> Batch:
        """The batch with what its routers chose, for those who read the record."""
        sections = dict.fromkeys(run.section for run in runs)
        names = [name for section in sections for name in self.facts.routed[section]]
        if not names:
            return batch
        return replace(batch, routed={name: self.machine.read(name) for name in names})

    def run(self) -> Iterator[Event]:
        """Step until nothing is left, yielding the events as they come."""
        while self.busy:
            self.step()
            yield from self.events

    def close(self) -> None:
        """Cancel what is left and close the machine."""
        for number in list(self.live):
            self.cancel(number)
        self.machine.close()

    def _enter(self, request: Request, last: int) -> Running:
        sequence = Running(self._number, request, last, self.eos)
        self._number += sequence.width
        self.live[sequence.id] = sequence
        return sequence

    def _tell(self, news: list[Event]) -> None:
        """Make the news of a cycle, and of what happened before it, the current events."""
        for event in news:
            if event.finish:
                self._forget(event)
        self.events, self._news = self._news + news, []

    def _forget(self, last: Event) -> None:
        """Free what a sequence holds, whose last event this is, and tell its request."""
        sequence = self.live.pop(last.sequence)
        self.scheduler.remove(sequence)
        if sequence.request.ended:
            sequence.request.ended(last)

    def _fail(self, plan: Plan, message: str) -> None:
        """Nothing of the plan is committed."""
        if len(plan.spans) == 1 or plan.spans[0][0].group is plan.spans[-1][0].group is not None:
            self._tell([Event(plan.spans[0][0].id, (), "error", message)])
        else:
            self.scheduler.suspect(plan)
            self._tell([])

    def _copy(self) -> None:
        """Pages and slots that forks and snapshots need copied, in order."""
        copies = self.cache.take_copies()
        for kind, group in groupby(copies, key=lambda copy: copy[0]) if copies else ():
            pairs = [(source, target) for _, source, target in group]
            for state in self.facts.paged if kind == "paged" else self.facts.fixed:
                self.machine.copy(state, pairs)

    def _execute(self, plan: Plan, batch: Batch) -> tuple[list[Run], dict[str, np.ndarray]]:
        """Run the cycle's section, stopping after each instruction whose value is wanted."""
        wanted = {name for sequence, _, _ in plan.spans for name in sequence.request.want}
        if self.facts.logits and any(s.group for s, _, _ in plan.spans) and any(plan.picks):
            wanted.add(self.facts.logits)
        section = "encode" if plan.encoded else self.facts.main
        runs, values, first = [], {}, 0
        where = {n: self.facts.values[n] for n in wanted}
        stops = sorted((at.index + 1, n) for n, at in where.items() if at.section == section)
        for stop, name in stops:
            if stop > first:
                runs.append(Run(section, self.machine.run(section, first, stop)))
                first = stop
            values[name] = self.machine.read(name)
        if not stops or first < len(self.program.section(section).instructions):
            runs.append(Run(section, self.machine.run(section, first)))
        return runs, values


def capacity_for(
    program: Program,
    *,
    sequences: int = 8,
    tokens: int | None = None,
    chunk: int = 512,
    picks: int | None = None,
    page_size: int = 64,
    source: int = 512,
) -> Capacity:
    """What a machine should set aside for so many sequences at once: `tokens` cached positions in
    all (None: the model's whole context for each sequence), a prompt chunk beside a row of every
    other sequence, `source` encoder rows a sequence.
    """
    if tokens is None:
        tokens = sequences * (program.context or 4096)
    rows = max(chunk + sequences - 1, source if program.has("encode") else 0)
    sizes = {"paged": tokens, "frozen": sequences * (-(-source // page_size) * page_size)}
    pages = {s.name: -(-sizes[s.kind] // page_size) for s in program.states if s.kind in sizes}
    return Capacity(rows, picks or max(sequences, 64), sequences, page_size, pages)
