"""The clock: every instruction held against its limit, every tick of a cycle accounted for.

For each thread p and instruction i, begun at b and ended at e, in integer ticks:

    busy    = sum over threads (e - b)
    wait    = gaps between a thread's instructions, run entry and exit included
    outside = P x (T - T_run)                          busy + wait + outside = P x T, always
    ideal   = min(busy, P x limit)      kept = ideal x limit(kept rows) / limit(all rows)
    gap     = busy - ideal              discarded = ideal - kept

The limit of an instruction is max(t_mem, t_cmp) + serial steps, where each byte moves at the
bandwidth measured for its
reuse distance (the distinct bytes touched since its last use) and each operation runs at the peak
of its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lmclock.batch import Batch
from lmclock.cost import ACTIVATION_BYTES, Bound, Cost, cost
from lmclock.cycle import STAGES, Cycle
from lmclock.hardware.limits import Limits
from lmclock.isa import Instruction
from lmclock.program import Program

LEAVES = (
    "memory_limit",
    "compute_limit",
    "memory_gap",
    "core_gap",
    "discarded",
    "wait",
    "front_end",
)


@dataclass(frozen=True)
class Limit:
    """Limits of a section's instructions, seconds, each array (instructions,)."""

    memory: np.ndarray
    compute: np.ndarray
    serial: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return np.maximum(self.memory, self.compute) + self.serial

    @property
    def cycle(self) -> float:
        """The cycle's own bound: memory and arithmetic may overlap across instructions."""
        return float(max(self.memory.sum(), self.compute.sum()) + self.serial.sum())


class Costs:
    """Costs and limits of one section, remembered between cycles of the same shape."""

    def __init__(self, program: Program, section: str, limits: Limits) -> None:
        self.program, self.section, self.limits = program, section, limits
        self.body = program.section(section).instructions
        self.known: dict[tuple[object, ...], tuple[list[Cost], list[float]]] = {}

    def costs(self, batch: Batch) -> tuple[list[Cost], list[float]]:
        """(cost of each instruction, seconds of its activation bytes)."""
        bound = Bound(self.program, self.section, batch)
        attends = {(i["mask"], i["window"], i.state): bound.visible(i) for i in self.body
                   if i.op == "attend"}  # fmt: skip
        shape = (
            tuple(
                (space, int(rows.valid.sum()), rows.sequences) for space, rows in batch.rows.items()
            ),
            len(batch.pick),
            tuple((name, len(np.unique(ids))) for name, ids in batch.inputs.items()),
            tuple(attends.values()),
        )
        if shape not in self.known:
            costs = [cost(i, bound) for i in self.body]
            self.known[shape] = (costs, self._activation_seconds(bound, costs))
        return self.known[shape]

    def _activation_seconds(self, bound: Bound, costs: list[Cost]) -> list[float]:
        """Each operand at the bandwidth of the bytes touched since its definition."""
        before = np.concatenate([[0.0], np.cumsum([c.bytes for c in costs])])
        defined = {o: k for k, i in enumerate(self.body) for o in i.outs}
        seconds = []
        for k, (i, c) in enumerate(zip(self.body, costs, strict=True)):
            sizes = {v: bound.rows(v) * bound.width(v) * ACTIVATION_BYTES for v in _operands(i)}
            total = sum(sizes.values())
            time = 0.0
            for value, size in sizes.items():
                distance = before[k + 1] - before[min(defined.get(value, k), k)]
                # A fused or partial instruction moves less than its whole operands.
                share = size / total * c.activation if total else 0.0
                time += share / self.limits.bytes_per_second(distance)
            seconds.append(time)
        return seconds

    def limit(self, batch: Batch) -> Limit:
        costs, activation = self.costs(batch)
        whole = sum(c.bytes for c in costs)
        rate = self.limits.bytes_per_second(whole)
        memory = [(c.weight + c.cache) / rate + a for c, a in zip(costs, activation, strict=True)]
        compute = [sum(f / self.limits.peak(k) for k, f in c.flops.items()) for c in costs]
        serial = [c.serial * self.limits.step.best for c in costs]
        return Limit(np.array(memory), np.array(compute), np.array(serial))


def _operands(i: Instruction) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*i.reads(), *i.outs)))


@dataclass
class Account:
    """Integer ticks of one or many cycles; `busy`, `ideal`, `kept` per instruction of each
    section.
    """

    threads: int
    total: int = 0  # P x T
    wait: int = 0
    stages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))  # P x ticks
    busy: dict[str, np.ndarray] = field(default_factory=dict)
    ideal: dict[str, np.ndarray] = field(default_factory=dict)
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    memory_bound: dict[str, np.ndarray] = field(default_factory=dict)  # kept ticks at that limit
    memory_side: dict[str, np.ndarray] = field(default_factory=dict)  # gap ticks under that roof
    model_error: int = 0
    bound: float = 0.0  # P x ticks of the cycles' own bounds

    def check(self) -> None:
        """The account telescopes: nothing is lost, nothing counted twice."""
        busy = sum(int(b.sum()) for b in self.busy.values())
        outside = sum(self.stages.values())
        assert busy + self.wait + outside == self.total, (busy, self.wait, outside, self.total)
        assert sum(self.tree().values()) == self.total

    def tree(self) -> dict[str, int]:
        """The leaves of the top-down tree; they add up to `total`."""
        sums = {n: self._sum(n) for n in ("busy", "ideal", "kept", "memory_bound", "memory_side")}
        gap = sums["busy"] - sums["ideal"]
        leaves = (
            sums["memory_bound"],
            sums["kept"] - sums["memory_bound"],
            sums["memory_side"],
            gap - sums["memory_side"],
            sums["ideal"] - sums["kept"],
            self.wait,
            sum(self.stages.values()),
        )
        return dict(zip(LEAVES, leaves, strict=True))

    def _sum(self, name: str) -> int:
        return sum(int(a.sum()) for a in getattr(self, name).values())

    def add(self, other: Account) -> None:
        """Another account of the same threads and program, added to this one."""
        self.total += other.total
        self.wait += other.wait
        self.model_error += other.model_error
        self.bound += other.bound
        for stage, ticks in other.stages.items():
            self.stages[stage] += ticks
        for name in ("busy", "ideal", "kept", "memory_bound", "memory_side"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for section, ticks in theirs.items():
                mine[section] = mine[section] + ticks if section in mine else ticks


class Clock:
    """Accounts of many cycles of one program on one machine, apart by kind of cycle.

    `threads` and `rate` (ticks per second) come from the machine's traits.
    """

    def __init__(self, program: Program, threads: int, rate: float, limits: Limits) -> None:
        self.program, self.threads, self.rate, self.limits = program, threads, rate, limits
        self.costs = {s.name: Costs(program, s.name, limits) for s in program.sections}
        self.kinds: dict[str, Tally] = {}

    def add(self, cycle: Cycle) -> Account:
        """The account of one cycle, checked and added to its kind's tally."""
        account = self.account(cycle)
        account.check()
        tally = self.kinds.setdefault(cycle.kind, Tally(Account(self.threads)))
        tally.add(cycle, account, self._traffic(cycle))
        return account

    def account(self, cycle: Cycle) -> Account:
        """The account of one cycle; its per-instruction arrays span each section that ran."""
        account = Account(self.threads)
        stamps = cycle.stamps
        account.total = self.threads * (stamps[4] - stamps[0])
        for stage, a, b in zip(STAGES, stamps, stamps[1:], strict=False):
            account.stages[stage] = self.threads * (b - a)
        for run in cycle.runs:
            inside = self.threads * (run.ticks.end - run.ticks.begin)
            account.stages["execute"] -= inside
            span = (run.ticks.table[:, :, 1] - run.ticks.table[:, :, 0]).sum(axis=1)
            account.wait += int(inside - span.sum())
            length = len(self.costs[run.section].body)
            busy = account.busy.setdefault(run.section, np.zeros(length, np.int64))
            busy[run.ticks.first : run.ticks.first + len(span)] += span
        for section, busy in account.busy.items():
            self._section(account, section, busy, cycle.batch)
        return account

    def _section(self, account: Account, section: str, busy: np.ndarray, batch: Batch) -> None:
        costs = self.costs[section]
        limit = costs.limit(batch)
        wanted = self._ticks(limit.total)
        ideal = np.minimum(busy, wanted)
        kept = ideal
        if any(not rows.valid.all() for rows in batch.rows.values()):
            everything = self._ticks(costs.limit(_all_valid(batch)).total)
            kept = (ideal * (wanted / np.maximum(everything, 1))).astype(np.int64)
            kept = np.minimum(kept, ideal)
        memory = limit.memory >= limit.compute
        account.ideal[section] = ideal
        account.kept[section] = kept
        account.memory_bound[section] = np.where(memory, kept, 0)
        account.memory_side[section] = np.where(memory, busy - ideal, 0)
        account.model_error += int(np.maximum(0, wanted - busy).sum())
        account.bound += limit.cycle * self.rate * self.threads

    def _ticks(self, seconds: np.ndarray) -> np.ndarray:
        return np.rint(seconds * self.rate * self.threads).astype(np.int64)

    def _traffic(self, cycle: Cycle) -> dict[str, np.ndarray]:
        """(instructions, 2) by section: bytes and operations of each instruction."""
        sections = dict.fromkeys(run.section for run in cycle.runs)
        found = {name: self.costs[name].costs(cycle.batch)[0] for name in sections}
        return {n: np.array([[c.bytes, c.operations] for c in costs]) for n, costs in found.items()}

    def decode_share(self, cycle: Cycle) -> float:
        """Of a mixed cycle's limit, the part its decode rows alone would need; the rest is
        prefill.
        """
        rows = cycle.batch.rows["tok"]
        alone = np.diff(rows.starts)[rows.owners] == 1
        batch = replace(cycle.batch, rows=cycle.batch.rows | {"tok": replace(rows, valid=alone)})
        section = self.costs[cycle.runs[-1].section]
        return section.limit(batch).cycle / section.limit(cycle.batch).cycle


def _all_valid(batch: Batch) -> Batch:
    rows = {k: replace(r, valid=np.ones(len(r), bool)) for k, r in batch.rows.items()}
    return replace(batch, rows=rows)


@dataclass
class Tally:
    """Sums over the cycles of one kind: counts beside the account."""

    account: Account
    cycles: int = 0
    prompt_tokens: int = 0
    decode_rows: int = 0
    retired: int = 0
    ticks: int = 0
    traffic: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # (instructions, bytes | operations)

    def add(self, cycle: Cycle, account: Account, traffic: dict[str, np.ndarray]) -> None:
        self.account.add(account)
        self.cycles += 1
        self.prompt_tokens += cycle.prompt_rows
        self.decode_rows += cycle.decode_rows
        self.retired += cycle.retired
        self.ticks += cycle.stamps[4] - cycle.stamps[0]
        for section, table in traffic.items():
            self.traffic[section] = self.traffic.get(section, 0) + table
