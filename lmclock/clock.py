"""The clock: every instruction held against its limit, every tick of a cycle accounted for.

For each thread p and instruction i, begun at b and ended at e, in integer ticks:

    busy    = sum over threads (e - b)
    wait    = gaps between a thread's instructions, run entry and exit included
    outside = P x (T - T_run)                          busy + wait + outside = P x T, always
    ideal   = min(busy, P x limit)      kept = ideal x limit(kept rows) / limit(all rows)
    gap     = busy - ideal              discarded = ideal - kept

The limit of an instruction is max(t_mem, t_cmp) + serial steps (roofline.py), that of a cycle
max(sum t_mem, sum t_cmp) + serial steps. Nothing of this runs while the engine does: cycles are
records, accounts are made of them afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lmclock.batch import Batch
from lmclock.cycle import STAGES, Cycle
from lmclock.hardware.limits import Limits
from lmclock.program import Program
from lmclock.roofline import Limit, Work, Works, limit_of

LEAVES = (
    "memory_limit",
    "compute_limit",
    "memory_gap",
    "core_gap",
    "discarded",
    "wait",
    "front_end",
)
_TABLES = ("busy", "ideal", "kept", "memory_bound", "memory_side", "limit")


@dataclass
class Account:
    """Integer ticks of one or many cycles; tables hold an entry per instruction of each section."""

    threads: int
    total: int = 0  # P x T
    wait: int = 0
    stages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))  # P x ticks
    limit: dict[str, np.ndarray] = field(default_factory=dict)  # P x limit of all rows
    busy: dict[str, np.ndarray] = field(default_factory=dict)
    ideal: dict[str, np.ndarray] = field(default_factory=dict)
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    memory_bound: dict[str, np.ndarray] = field(default_factory=dict)  # kept ticks at that limit
    memory_side: dict[str, np.ndarray] = field(default_factory=dict)  # gap ticks under that roof
    model_error: int = 0  # ticks by which instructions were faster than their limit
    bound: float = 0.0  # P x ticks of the cycles' own limits

    def check(self) -> None:
        """The account telescopes: nothing is lost, nothing counted twice."""
        busy, outside = self._sum("busy"), sum(self.stages.values())
        assert busy + self.wait + outside == self.total, (busy, self.wait, outside, self.total)
        assert sum(self.tree().values()) == self.total

    def tree(self) -> dict[str, int]:
        """The leaves of the top-down tree; they add up to `total`."""
        busy, ideal, kept, memory_bound, memory_side, _ = (self._sum(name) for name in _TABLES)
        leaves = (
            memory_bound,
            kept - memory_bound,
            memory_side,
            busy - ideal - memory_side,
            ideal - kept,
            self.wait,
            sum(self.stages.values()),
        )
        return dict(zip(LEAVES, leaves, strict=True))

    def _sum(self, name: str) -> int:
        return sum(int(table.sum()) for table in getattr(self, name).values())

    def add(self, other: Account) -> None:
        """Another account of the same threads and program, added to this one."""
        self.total += other.total
        self.wait += other.wait
        self.model_error += other.model_error
        self.bound += other.bound
        for stage, ticks in other.stages.items():
            self.stages[stage] += ticks
        for name in _TABLES:
            mine, theirs = getattr(self, name), getattr(other, name)
            for section, ticks in theirs.items():
                mine[section] = mine[section] + ticks if section in mine else ticks


@dataclass
class Tally:
    """Sums over the cycles of one kind: counts beside the account.

    `traffic` is (instructions, 2) by section: bytes and operations of the kept rows. In mixed
    cycles `decode_bound` is the part of `account.bound` that the decode rows alone would need;
    the rest is prefill. `cycle_bytes` is the largest footprint of a cycle.
    """

    account: Account
    cycles: int = 0
    prompt_tokens: int = 0
    decode_rows: int = 0
    retired: int = 0
    ticks: int = 0
    decode_bound: float = 0.0
    cycle_bytes: float = 0.0
    memory_seconds: float = 0.0  # the two sides of the cycles' own limits
    compute_seconds: float = 0.0
    traffic: dict[str, np.ndarray] = field(default_factory=dict)
    experts: dict[str, np.ndarray] = field(default_factory=dict)  # used, (instructions,) by section
    observed: bool = True  # the records say which ones; else so many are expected


class Clock:
    """Accounts of many cycles of one program on one machine, apart by kind of cycle.

    `threads` and `rate` (ticks per second) come from the machine's traits.
    """

    def __init__(self, program: Program, threads: int, rate: float, limits: Limits) -> None:
        self.program, self.threads, self.rate, self.limits = program, threads, rate, limits
        self.works = Works(program)
        self.kinds: dict[str, Tally] = {}

    def add(self, cycle: Cycle) -> Account:
        """The account of one cycle, checked and added to its kind's tally."""
        account, roof = self._account(cycle)
        account.check()
        tally = self.kinds.setdefault(cycle.kind, Tally(Account(self.threads)))
        tally.account.add(account)
        tally.cycles += 1
        tally.prompt_tokens += cycle.prompt_rows
        tally.decode_rows += cycle.decode_rows
        tally.retired += cycle.retired
        tally.ticks += cycle.stamps[4] - cycle.stamps[0]
        tally.cycle_bytes = max(tally.cycle_bytes, roof.bytes)
        tally.memory_seconds += roof.memory
        tally.compute_seconds += roof.compute
        if cycle.kind == "mixed":
            decoding = np.array(cycle.decoding, bool)[cycle.batch.rows["tok"].owners]
            alone = self._roof(cycle, _only(cycle.batch, decoding))
            tally.decode_bound += min(alone.bound, roof.bound) * self.rate * self.threads
        for section, work in roof.works.items():
            table = np.stack([work.bytes, work.operations], axis=1)
            tally.traffic[section] = tally.traffic.get(section, 0) + table
            tally.experts[section] = tally.experts.get(section, 0) + work.experts
        tally.observed &= bool(cycle.batch.routed)
        return account

    def _account(self, cycle: Cycle) -> tuple[Account, _Roof]:
        """The account of one cycle, and the roof over the rows that were kept."""
        account, ran = self._times(cycle)
        done = kept = self._roof(cycle, _kept(cycle))
        if (
            any(not rows.valid.all() for rows in cycle.batch.rows.values())
            or cycle.kept is not None
        ):
            done = self._roof(cycle, _all_rows(cycle.batch))
        account.bound = kept.bound * self.rate * self.threads
        for section, busy in account.busy.items():
            limit = done.limits[section]
            wanted = self._ticks(limit.total) * ran[section]
            ideal = np.minimum(busy, wanted)
            useful = ideal
            if done is not kept:
                part = kept.limits[section].total / np.maximum(limit.total, 1e-30)
                useful = (ideal * np.minimum(part, 1)).astype(np.int64)
            memory = limit.memory >= limit.compute
            account.limit[section] = wanted
            account.ideal[section] = ideal
            account.kept[section] = useful
            account.memory_bound[section] = useful * memory
            account.memory_side[section] = (busy - ideal) * memory
            account.model_error += int(np.maximum(0, wanted - busy).sum())
        return account, kept

    def _times(self, cycle: Cycle) -> tuple[Account, dict[str, np.ndarray]]:
        """What the stamps alone say, and which instructions of each section ran."""
        account = Account(self.threads)
        stamps = cycle.stamps
        account.total = self.threads * (stamps[4] - stamps[0])
        for stage, a, b in zip(STAGES, stamps, stamps[1:], strict=False):
            account.stages[stage] = self.threads * (b - a)
        ran: dict[str, np.ndarray] = {}
        for run in cycle.runs:
            ticks = run.ticks
            begins, ends = ticks.table[:, :, 0], ticks.table[:, :, 1]
            account.stages["execute"] -= self.threads * (ticks.end - ticks.begin)
            account.wait += int((begins[1:] - ends[:-1]).sum())
            account.wait += int((begins[:1] - ticks.begin).sum() + (ticks.end - ends[-1:]).sum())
            if run.section not in ran:
                length = len(self.program.section(run.section).instructions)
                account.busy[run.section] = np.zeros(length, np.int64)
                ran[run.section] = np.zeros(length, bool)
            span = slice(ticks.first, ticks.first + len(begins))
            account.busy[run.section][span] += (ends - begins).sum(axis=1)
            ran[run.section][span] = True
        return account, ran

    def _roof(self, cycle: Cycle, batch: Batch) -> _Roof:
        sections = dict.fromkeys(run.section for run in cycle.runs)
        works = {name: self.works.of(name, batch) for name in sections}
        total = sum(work.total for work in works.values())
        limits = {name: limit_of(work, total, self.limits) for name, work in works.items()}
        return _Roof(works, limits, total)

    def _ticks(self, seconds: np.ndarray) -> np.ndarray:
        return np.rint(seconds * self.rate * self.threads).astype(np.int64)


@dataclass(frozen=True)
class _Roof:
    """Work and limits of some rows of a cycle, by section; `bytes` of all sections together."""

    works: dict[str, Work]
    limits: dict[str, Limit]
    bytes: float

    @property
    def memory(self) -> float:
        return sum(float(limit.memory.sum()) for limit in self.limits.values())

    @property
    def compute(self) -> float:
        return sum(float(limit.compute.sum()) for limit in self.limits.values())

    @property
    def bound(self) -> float:
        """Seconds of the cycle's own limit: its instructions may overlap, dependent steps not."""
        serial = sum(float(limit.serial.sum()) for limit in self.limits.values())
        return max(self.memory, self.compute) + serial


def _only(batch: Batch, mask: np.ndarray) -> Batch:
    """The batch with only some of its `tok` rows valid and picked."""
    rows = batch.rows["tok"]
    only = replace(rows, valid=rows.valid & mask)
    return replace(batch, rows=batch.rows | {"tok": only}, pick=batch.pick[only.valid[batch.pick]])


def _kept(cycle: Cycle) -> Batch:
    return cycle.batch if cycle.kept is None else _only(cycle.batch, cycle.kept)


def _all_rows(batch: Batch) -> Batch:
    rows = {k: replace(r, valid=np.ones(len(r), bool)) for k, r in batch.rows.items()}
    return replace(batch, rows=rows)
