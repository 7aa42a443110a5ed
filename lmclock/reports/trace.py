"""Cycles as Chrome trace-event JSON, which Perfetto and chrome://tracing open.

One process for the engine, whose track nests stages in cycles, and one for the machine, with a
track of instructions per thread; counters of rows, tokens and bandwidth. Times are microseconds
from the first cycle, rounded to whole nanoseconds at both ends of a slice, so that what nests in
ticks nests in the file. It is an array, an event per line: a file cut short still opens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from lmclock.cycle import STAGES, Cycle
from lmclock.listing import assembly
from lmclock.machines import Traits
from lmclock.program import Program
from lmclock.reports.summary import title
from lmclock.roofline import Works

ENGINE, MACHINE = 1, 2
Event = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """How much of a trace was written."""

    cycles: int
    events: int


def write_trace(
    cycles: Iterable[Cycle], program: Program, traits: Traits, file: TextIO, most: int = 2_000_000
) -> Written:
    """Write whole cycles while their events are at most `most` in all."""
    tracer = _Tracer(program, traits)
    events = tracer.names()
    written = len(events)
    file.write("[\n" + ",\n".join(map(json.dumps, events)))
    count = 0
    for cycle in cycles:
        events = tracer.cycle(cycle)
        if written + len(events) > most:
            break
        file.write("".join(f",\n{json.dumps(event)}" for event in events))
        written += len(events)
        count += 1
    file.write("\n]\n")
    return Written(count, written)


class _Tracer:
    def __init__(self, program: Program, traits: Traits) -> None:
        self.program, self.traits = program, traits
        self.works = Works(program)
        self.origin: int | None = None
        self.titles = {
            s.name: [(title(i), assembly(i)) for i in s.instructions] for s in program.sections
        }

    def names(self) -> list[Event]:
        """What the tracks are called, in the order they are shown."""

        def meta(kind: str, pid: int, tid: int, **args: Any) -> Event:
            return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": args}

        events = [
            meta("process_name", ENGINE, 0, name=f"engine: {self.program.name}"),
            meta("process_sort_index", ENGINE, 0, sort_index=ENGINE),
            meta("thread_name", ENGINE, 1, name="cycles and stages"),
            meta("process_name", MACHINE, 0, name=f"machine: {self.traits.name}"),
            meta("process_sort_index", MACHINE, 0, sort_index=MACHINE),
        ]
        for thread in range(self.traits.threads):
            events.append(meta("thread_name", MACHINE, thread + 1, name=f"thread {thread}"))
            events.append(meta("thread_sort_index", MACHINE, thread + 1, sort_index=thread))
        return events

    def cycle(self, cycle: Cycle) -> list[Event]:
        """Every event of one cycle."""
        stamps = cycle.stamps
        if self.origin is None:
            self.origin = stamps[0]
        args = {
            "kind": cycle.kind,
            "prompt_rows": cycle.prompt_rows,
            "decode_rows": cycle.decode_rows,
            "generated_tokens": cycle.retired,
        }
        name = f"cycle {cycle.number} ({cycle.kind})"
        events = [self._slice(name, "cycle", ENGINE, 1, stamps[0], stamps[4], args)]
        for stage, begin, end in zip(STAGES, stamps, stamps[1:], strict=False):
            number = {"cycle": cycle.number}
            events.append(self._slice(stage, "stage", ENGINE, 1, begin, end, number))
        events += self._counters(cycle)
        events += self._instructions(cycle)
        return events

    def _counters(self, cycle: Cycle) -> Iterator[Event]:
        when = self._nanoseconds(cycle.stamps[0]) / 1000
        seconds = (cycle.stamps[4] - cycle.stamps[0]) / self.traits.tick_rate
        moved = sum(self.works.of(name, cycle.batch).total for name in _sections(cycle))
        values = {
            "rows": {"prompt": cycle.prompt_rows, "decode": cycle.decode_rows},
            "tokens per second": {"generated": round(cycle.retired / max(seconds, 1e-9), 3)},
            "GB per second, at least": {"moved": round(moved / max(seconds, 1e-9) / 1e9, 3)},
        }
        for name, args in values.items():
            yield {"name": name, "ph": "C", "pid": ENGINE, "tid": 0, "ts": when, "args": args}

    def _instructions(self, cycle: Cycle) -> Iterator[Event]:
        works = {name: self.works.of(name, cycle.batch) for name in _sections(cycle)}
        for run in cycle.runs:
            work = works[run.section]
            moved, done = work.bytes.tolist(), work.operations.tolist()
            for k, threads in enumerate(run.ticks.table.tolist(), run.ticks.first):
                name, text = self.titles[run.section][k]
                args = {"number": k, "assembly": text, "bytes": moved[k], "operations": done[k]}
                for thread, (begin, end) in enumerate(threads, 1):
                    if end > begin:
                        yield self._slice(name, "instruction", MACHINE, thread, begin, end, args)

    def _slice(
        self, name: str, kind: str, pid: int, tid: int, begin: int, end: int, args: Event
    ) -> Event:
        first, last = self._nanoseconds(begin), self._nanoseconds(end)
        return {"name": name, "cat": kind, "ph": "X", "pid": pid, "tid": tid,
                "ts": first / 1000, "dur": (last - first) / 1000, "args": args}  # fmt: skip

    def _nanoseconds(self, stamp: int) -> int:
        return round((stamp - (self.origin or 0)) * 1e9 / self.traits.tick_rate)


def _sections(cycle: Cycle) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.section for run in cycle.runs))
