"""Work and limits of a section's instructions in one cycle, as arrays over the instructions.

    works = Works(program)
    work = works.of("step", batch)                  # bytes and operations
    limit = limit_of(work, work.total, limits)      # seconds

An access moves at the bandwidth measured for its reuse distance: the bytes touched since that data
was last used. For weights, and for what earlier cycles cached, that is the whole cycle; for
activations, what lies between one instruction and the next that uses them; for keys and values of
this cycle's own rows, what lies between `store` and `attend`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lmclock.batch import Batch
from lmclock.cost import ACTIVATION_BYTES, Bound, Cost, cost
from lmclock.hardware.limits import Limits
from lmclock.isa import Instruction
from lmclock.program import Program

MOST_SHAPES = 64  # batches whose work is remembered
# Whose work depends on more than the numbers of rows: on positions, and on the ids themselves.
_VARIABLE = ("attend", "embed", "experts")


@dataclass(frozen=True)
class Work:
    """Of one cycle, each array (instructions,): bytes by place, operations by kind, dependent
    steps. `fresh` is the part of `cache` that this cycle stored itself, at `fresh_distance` bytes.

    An operand is one activation of one instruction: `operand` its instruction, `operand_since` the
    instruction that used it last (or its own), `operand_bytes` its share of the activation bytes.
    """

    weight: np.ndarray
    cache: np.ndarray
    activation: np.ndarray
    flops: dict[str, np.ndarray]
    serial: np.ndarray
    fresh: np.ndarray
    stored_by: np.ndarray  # instruction that wrote the fresh bytes
    operand: np.ndarray
    operand_since: np.ndarray
    operand_bytes: np.ndarray
    experts: np.ndarray  # whose weights are read

    @property
    def bytes(self) -> np.ndarray:
        return self.weight + self.cache + self.activation

    @property
    def operations(self) -> np.ndarray:
        return sum(self.flops.values(), np.zeros(len(self.weight)))

    @property
    def total(self) -> float:
        """Bytes of all instructions together."""
        return float(self.bytes.sum())


@dataclass(frozen=True)
class Limit:
    """The least seconds of each instruction, each array (instructions,)."""

    memory: np.ndarray
    compute: np.ndarray
    serial: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return np.maximum(self.memory, self.compute) + self.serial


def limit_of(work: Work, cycle_bytes: float, limits: Limits) -> Limit:
    """Limits of the work of one section within a cycle that touches `cycle_bytes` in all."""
    before = np.concatenate([[0.0], np.cumsum(work.bytes)])
    whole = limits.bytes_per_second(cycle_bytes)
    own = work.operand_since == work.operand
    distance = np.where(
        own, work.bytes[work.operand], before[work.operand] - before[work.operand_since]
    )
    seconds = work.operand_bytes / limits.bytes_per_second(distance)
    memory = np.bincount(work.operand, seconds, len(work.weight))
    memory += (work.weight + work.cache - work.fresh) / whole
    at = np.flatnonzero(work.fresh)
    if len(at):
        near = before[at] - before[work.stored_by[at]]
        memory[at] += work.fresh[at] / limits.bytes_per_second(near)
    compute = np.zeros(len(work.weight))
    for kind, operations in work.flops.items():
        if operations.any():
            compute += operations / limits.peak(kind)
    return Limit(memory, compute, work.serial * limits.step.best)


class Works:
    """The work of a program's sections; what depends on numbers of rows only is remembered."""

    def __init__(self, program: Program) -> None:
        self.sections = {s.name: _Section(program, s.name) for s in program.sections}

    def of(self, section: str, batch: Batch) -> Work:
        """Work of the valid rows of a batch."""
        return self.sections[section].work(batch)


class _Section:
    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self.body = program.section(name).instructions
        self.types = program.types(name)
        self.operands = _operands(self.body)
        stores = {i.state: k for k, i in enumerate(self.body) if i.op == "store"}
        self.stored_by = np.array([stores.get(i.state, -1) for i in self.body])
        self.attends = np.array([i.op == "attend" for i in self.body])
        # Instructions of one group do the same work in every cycle, such as `attend` of all layers.
        self.groups: dict[object, list[int]] = {}
        for k, i in enumerate(self.body):
            if i.op in _VARIABLE:
                self.groups.setdefault(self._group(i), []).append(k)
        self.known: dict[object, Work] = {}

    def _group(self, i: Instruction) -> object:
        state = self.program.state(i.state)[0].name if i.state else i.ins[1:]
        ids = i.ins[0] if i.op == "embed" else None
        types = [self.types[v] for v in (i.ins[0], *i.outs)]
        return (i.op, i.attrs, i.weights, state, ids, *types)

    def work(self, batch: Batch) -> Work:
        bound = Bound(self.program, self.name, batch, self.types)
        shape = (
            *((space, bound.shape(space)) for space in batch.rows),
            len(batch.pick),
            batch.sequences,
        )
        if shape not in self.known:
            if len(self.known) >= MOST_SHAPES:
                del self.known[next(iter(self.known))]
            self.known[shape] = self._work(bound)
        return self._vary(self.known[shape], bound)

    def _work(self, bound: Bound) -> Work:
        """The work of every instruction, one by one."""
        costs = [cost(i, bound) for i in self.body]
        kinds = sorted({kind for c in costs for kind in c.flops})
        operand, since, values = self.operands
        sizes = np.array([bound.rows(v) * bound.width(v) * ACTIVATION_BYTES for v in values], float)
        activation = np.array([c.activation for c in costs], float)
        total = np.bincount(operand, sizes, len(costs))
        # A fused or partial instruction moves less, and `add=` more, than its operands' sizes.
        share = np.divide(activation, total, out=np.zeros_like(total), where=total > 0)
        return Work(
            weight=np.array([c.weight for c in costs], float),
            cache=np.array([c.cache for c in costs], float),
            activation=activation,
            flops={kind: np.array([c.flops.get(kind, 0) for c in costs], float) for kind in kinds},
            serial=np.array([c.serial for c in costs], float),
            fresh=np.zeros(len(costs)),
            stored_by=self.stored_by,
            operand=operand,
            operand_since=since,
            operand_bytes=sizes * share[operand],
            experts=np.array([c.experts for c in costs], float),
        )

    def _vary(self, work: Work, bound: Bound) -> Work:
        """The same with the variable instructions of this very batch."""
        weight, cache, experts = work.weight.copy(), work.cache.copy(), work.experts.copy()
        flops = {kind: table.copy() for kind, table in work.flops.items()}
        for numbers in self.groups.values():
            found: Cost = cost(self.body[numbers[0]], bound)
            weight[numbers], cache[numbers] = found.weight, found.cache
            experts[numbers] = found.experts
            for kind, operations in found.flops.items():
                flops[kind][numbers] = operations
        stored = np.where(self.stored_by >= 0, cache[self.stored_by], 0.0)
        fresh = np.where(self.attends, np.minimum(stored, cache), 0.0)
        return replace(work, weight=weight, cache=cache, flops=flops, fresh=fresh, experts=experts)


def _operands(body: tuple[Instruction, ...]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(instruction, instruction of the last use, value) of every activation operand. A result, and
    an input at its first use, are as near as the instruction itself.
    """
    used: dict[str, int] = {}
    numbers, since, values = [], [], []
    for k, i in enumerate(body):
        for value in dict.fromkeys((*i.reads(), *i.outs)):
            numbers.append(k)
            since.append(used.get(value, k))
            values.append(value)
            used[value] = k
    return np.array(numbers, int), np.array(since, int), values
