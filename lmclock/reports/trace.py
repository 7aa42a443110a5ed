"""Cycles as Chrome trace-event JSON, which Perfetto and chrome://tracing open.

One process for the engine (its stages) and one for the machine (a track per thread); counters of
rows and of tokens per
second. Times are microseconds from the first cycle; the array form is written event by event, so a
file cut short still
opens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from lmclock.cycle import STAGES, Cycle
from lmclock.isa import Instruction
from lmclock.listing import assembly
from lmclock.machines import Traits
from lmclock.program import Program
from lmclock.reports.summary import title

ENGINE, MACHINE = 1, 2


def write_trace(
    cycles: Iterable[Cycle], program: Program, traits: Traits, file: TextIO, most: int = 2_000_000
) -> int:
    """Write the events, at most `most` of them; returns how many were written."""
    count = 0
    file.write("[\n")
    for event in _events(cycles, program, traits):
        if count == most:
            break
        file.write(("" if count == 0 else ",\n") + json.dumps(event))
        count += 1
    file.write("\n]\n")
    return count


def _events(cycles: Iterable[Cycle], program: Program, traits: Traits) -> Iterator[dict[str, Any]]:
    yield from _names(program, traits)
    origin: int | None = None
    scale = 1e6 / traits.tick_rate
    titles: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for cycle in cycles:
        origin = cycle.stamps[0] if origin is None else origin
        yield from _cycle(cycle, origin, scale)
        for run in cycle.runs:
            if run.section not in titles:
                body = program.section(run.section).instructions
                titles[run.section] = [(title(i), _args(i, k)) for k, i in enumerate(body)]
            for k, threads in enumerate(run.ticks.table.tolist(), run.ticks.first):
                name, args = titles[run.section][k]
                for thread, (begin, end) in enumerate(threads):
                    if end > begin:
                        yield _slice(name, MACHINE, thread + 1, begin - origin, end - begin, scale,
                                     "instruction", args)  # fmt: skip


def _args(i: Instruction, number: int) -> dict[str, Any]:
    return {"number": number, "assembly": assembly(i)}


def _cycle(cycle: Cycle, origin: int, scale: float) -> Iterator[dict[str, Any]]:
    stamps = cycle.stamps
    args = {
        "kind": cycle.kind,
        "prompt_rows": cycle.prompt_rows,
        "decode_rows": cycle.decode_rows,
        "retired": cycle.retired,
    }
    name = f"cycle {cycle.number} ({cycle.kind})"
    yield _slice(name, ENGINE, 1, stamps[0] - origin, stamps[4] - stamps[0], scale, "cycle", args)
    for stage, a, b in zip(STAGES, stamps, stamps[1:], strict=False):
        yield _slice(stage, ENGINE, 2, a - origin, b - a, scale, "stage", {"cycle": cycle.number})
    when = (stamps[0] - origin) * scale
    rows = {"prompt": cycle.prompt_rows, "decode": cycle.decode_rows}
    yield {"name": "rows", "ph": "C", "pid": ENGINE, "ts": when, "args": rows}
    seconds = (stamps[4] - stamps[0]) * scale / 1e6
    rate = {"tokens": round(cycle.retired / seconds, 1) if seconds else 0}
    yield {"name": "tokens per second", "ph": "C", "pid": ENGINE, "ts": when, "args": rate}


def _slice(
    name: str, pid: int, tid: int, begin: int, length: int, scale: float, kind: str,
    args: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {"name": name, "cat": kind, "ph": "X", "pid": pid, "tid": tid,
            "ts": round(begin * scale, 4), "dur": round(length * scale, 4),
            "args": args}  # fmt: skip


def _names(program: Program, traits: Traits) -> Iterator[dict[str, Any]]:
    def meta(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}

    yield meta("process_name", ENGINE, 0, f"engine: {program.name}")
    yield meta("thread_name", ENGINE, 1, "cycles")
    yield meta("thread_name", ENGINE, 2, "stages")
    yield meta("process_name", MACHINE, 0, f"machine: {traits.name}")
    for thread in range(traits.threads):
        yield meta("thread_name", MACHINE, thread + 1, f"thread {thread}")
