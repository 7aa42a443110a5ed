"""What an instruction must cost: the compulsory traffic and arithmetic of the executed algorithm.

`cost(instruction, bound)` is the one source for the clock, the roofline and the simulator. Bytes
are those an ideal machine
could not avoid: each weight once per cycle, each visible cache position once, each operand and
result once. A fused
instruction costs what its expansion costs in arithmetic, weights and cache, and its outer operands
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lmclock.batch import Batch
from lmclock.isa import ROUNDED_ROWS, Instruction, Type, expand
from lmclock.program import Program, State

ACTIVATION_BYTES = 4  # registers hold f32
_KIND_COST = {"relu": 1, "softcap": 12}  # operations per element; the others need an exponential


@dataclass(frozen=True)
class Cost:
    """Operations by arithmetic kind (multiply and add counted apart) and bytes by place; `serial`:
    dependent steps; `experts`: those whose weights are read.
    """

    flops: dict[str, float] = field(default_factory=dict)
    weight: float = 0.0
    cache: float = 0.0
    activation: float = 0.0
    serial: int = 0
    experts: float = 0.0

    @property
    def bytes(self) -> float:
        return self.weight + self.cache + self.activation

    @property
    def operations(self) -> float:
        return sum(self.flops.values())

    def __add__(self, other: Cost) -> Cost:
        kinds = {*self.flops, *other.flops}
        flops = {k: self.flops.get(k, 0) + other.flops.get(k, 0) for k in sorted(kinds)}
        return Cost(flops, self.weight + other.weight, self.cache + other.cache,
                    self.activation + other.activation, self.serial + other.serial,
                    self.experts + other.experts)  # fmt: skip


class Bound:
    """A program's section with a batch: every count the cost rules ask for, valid rows only.

    `types` saves working out `program.types(section)` anew for every batch.
    """

    def __init__(
        self, program: Program, section: str, batch: Batch, types: dict[str, Type] | None = None
    ) -> None:
        self.program = program
        self.types = program.types(section) if types is None else types
        self.batch = batch
        self._counts: dict[str, np.ndarray] = {}
        self._seen: dict[tuple[str, int, str], tuple[int, int]] = {}

    def counts(self, space: str) -> np.ndarray:
        """(sequences,): the valid rows of each sequence in `tok` or `src`."""
        if space not in self._counts:
            rows = self.batch.rows[space]
            found = np.bincount(rows.owners[rows.valid], minlength=rows.sequences)
            self._counts[space] = found
        return self._counts[space]

    def shape(self, space: str) -> tuple[int, int, int]:
        """(rows, sequences that have some, rows of the longest) of `tok` or `src`."""
        counts = self.counts(space)
        return int(counts.sum()), int((counts > 0).sum()), int(counts.max(initial=0))

    def rows(self, value: str) -> int:
        """Rows of the space a value belongs to."""
        space = self.types[value].space
        if space in ("pick", "seq"):
            return self.batch.count(space)
        return self.shape(space)[0]

    def width(self, value: str) -> int:
        return self.types[value].width

    def weight_bytes(self, *names: str | None) -> int:
        return sum(self.program.weight_table[n].bytes for n in names if n)

    def distinct_ids(self, value: str) -> int:
        if value not in self.batch.inputs:
            return 1
        valid = self.batch.rows[self.types[value].space].valid
        return len(np.unique(self.batch.inputs[value][valid]))

    def experts(self, i: Instruction) -> float:
        """Experts that the rows of an `experts` use: counted where the record of the cycle has
        their ids, else as many as even choices would use.
        """
        chosen = self.batch.routed.get(i.ins[2])
        if chosen is None:
            return expected_experts(i["experts"], self.width(i.ins[2]), self.rows(i.ins[0]))
        valid = self.batch.rows[self.types[i.ins[0]].space].valid
        return int(np.count_nonzero(np.bincount(chosen[valid].reshape(-1))))

    def longest(self, value: str) -> int:
        return self.shape(self.types[value].space)[2]

    def visible(self, i: Instruction) -> tuple[int, int]:
        """(visible positions summed over rows, distinct positions) of an attend."""
        key = (i["mask"], i["window"], i.state or i.ins[1])
        if key not in self._seen:
            self._seen[key] = self._visible(i)
        return self._seen[key]

    def _visible(self, i: Instruction) -> tuple[int, int]:
        space = self.types[i.ins[0]].space
        counts = self.counts(space)
        live = counts > 0
        state = self.program.state(i.state)[0] if i.state else None
        low = np.zeros(len(counts), np.int64)
        if state is None and i["mask"] == "full":
            end = self.counts(self.types[i.ins[1]].space)
        elif state is not None and state.kind == "frozen":
            end = self.batch.lengths[state.name]
        else:
            end = np.zeros_like(low)
            positions = self.batch.rows[space].positions[self.batch.rows[space].valid]
            last = np.cumsum(counts)[live]
            end[live] = positions[last - 1] + 1
            if i["mask"] != "full":
                visible = positions + 1
                if i["window"]:
                    low[live] = np.maximum(0, positions[last - counts[live]] + 1 - i["window"])
                    visible = np.minimum(visible, i["window"])
                return int(visible.sum()), self._distinct(state, low, end, live)
        # Without a mask every row sees all of its sequence's positions.
        return int((counts * end).sum()), self._distinct(state, low, end, live)

    def _distinct(
        self, state: State | None, low: np.ndarray, end: np.ndarray, live: np.ndarray
    ) -> int:
        """Positions low..end - 1 of the live sequences; pages they share count once."""
        tables = self.batch.pages.get(state.name) if state else None
        if tables is None or live.sum() < 2:
            return int((end - low)[live].sum())
        size = self.batch.page_size
        first, last = low // size, -(-end // size)
        counts = np.where(live, last - first, 0)
        owner = np.repeat(np.arange(len(counts)), counts)
        slot = np.arange(len(owner)) - (np.cumsum(counts) - counts - first)[owner]
        table_starts = np.cumsum([0, *(len(table) for table in tables)])
        pages = np.concatenate(tables)[table_starts[owner] + slot]
        within = np.minimum(end[owner], (slot + 1) * size) - np.maximum(low[owner], slot * size)
        most = np.zeros(int(pages.max(initial=0)) + 1, np.int64)
        np.maximum.at(most, pages, within)
        return int(most.sum())


def cost(i: Instruction, bound: Bound) -> Cost:
    """The compulsory cost of one instruction. Rules of core opcodes are RULES; fused ones follow
    from expand.
    """
    steps = expand(i)
    if len(steps) == 1:
        return RULES[i.op](i, bound)
    for step in steps:
        bound.types.update(zip(step.outs, bound.program.out_types(step, bound.types), strict=True))
    total = sum((cost(step, bound) for step in steps), Cost())
    outer = sum(bound.rows(v) * bound.width(v) for v in (*i.reads(), *i.outs)) * ACTIVATION_BYTES
    return Cost(total.flops, total.weight, total.cache, outer, total.serial, total.experts)


def arithmetic(i: Instruction, bound: Bound) -> str:
    """The arithmetic kind whose peak applies to a product: int8, bf16 or f32."""
    act = i["act"] if "act" in i.row.attrs else "none"
    form = bound.program.weight_table[i.weights[0]].format
    if act == "q8_32" and form not in ("f32", "f16", "bf16"):
        return "int8"
    return "bf16" if act == "bf16" and form == "bf16" else "f32"


def _moved(bound: Bound, *values: str) -> float:
    return ACTIVATION_BYTES * sum(bound.rows(v) * bound.width(v) for v in values)


def _embed(i: Instruction, b: Bound) -> Cost:
    row = b.program.weight_table[i.weights[0]].row_bytes
    return Cost(weight=b.distinct_ids(i.ins[0]) * row, activation=_moved(b, i.outs[0]))


def _linear(i: Instruction, b: Bound) -> Cost:
    rows = b.rows(i.ins[0])
    if not rows:
        return Cost()
    outputs, width = b.program.weight_table[i.weights[0]].shape
    flops = {arithmetic(i, b): 2.0 * rows * outputs * width}
    return Cost(flops, b.weight_bytes(*i.all_weights()), 0, _moved(b, i.ins[0], i.outs[0]))


def _elementwise(
    per_element: Callable[[Instruction], float],
) -> Callable[[Instruction, Bound], Cost]:
    def rule(i: Instruction, b: Bound) -> Cost:
        elements = b.rows(i.outs[0]) * b.width(i.outs[0])
        weights = b.weight_bytes(*i.all_weights()) if elements else 0
        moved = _moved(b, *i.reads(), *i.outs)
        return Cost({"f32": per_element(i) * elements}, weights, 0, moved)

    return rule


def _state_bytes(i: Instruction, b: Bound) -> tuple[float, int]:
    """(bytes per element, heads x (key + value)) of the state or values an instruction touches."""
    if i.state:
        state = b.program.state(i.state)[0]
        return state.element_bytes, state.heads * (state.key + state.value)
    return ACTIVATION_BYTES, b.width(i.ins[-2]) + b.width(i.ins[-1])


def _store(i: Instruction, b: Bound) -> Cost:
    per, width = _state_bytes(i, b)
    rows = b.rows(i.ins[0])
    return Cost(cache=rows * width * per, activation=rows * width * ACTIVATION_BYTES)


def _attend(i: Instruction, b: Bound) -> Cost:
    heads, kv_heads = i["heads"], i["kv_heads"] or i["heads"]
    per, width = _state_bytes(i, b)
    seen, distinct = b.visible(i)
    both = width // kv_heads  # dk + dv
    rounded = i["act"] == "bf16" and b.longest(i.ins[0]) >= ROUNDED_ROWS
    flops = {"int16" if rounded else "f32": float(seen * heads * (2 * both + 5))}
    return Cost(flops, b.weight_bytes(*i.all_weights()), distinct * width * per,
                _moved(b, i.ins[0], i.outs[0]))  # fmt: skip


def _lstm(i: Instruction, b: Bound) -> Cost:
    rows, d, h = b.rows(i.ins[0]), b.width(i.ins[0]), b.width(i.outs[0])
    products, gates = 8.0 * rows * h * (d + h), 10.0 * rows * h
    kind = arithmetic(i, b)
    flops = {"f32": gates + products} if kind == "f32" else {kind: products, "f32": gates}
    weights = b.weight_bytes(*i.all_weights()) if rows else 0
    moved = _moved(b, i.ins[0], i.outs[0])
    # h and c, read and written once per sequence
    cache = 4 * b.shape(b.types[i.ins[0]].space)[1] * h * ACTIVATION_BYTES
    return Cost(flops, weights, cache, moved, b.longest(i.ins[0]))


def _route(i: Instruction, b: Bound) -> Cost:
    rows, experts = b.rows(i.ins[0]), i["experts"]
    flops = {"f32": rows * experts * (2.0 * b.width(i.ins[0]) + 5)}
    return Cost(flops, b.weight_bytes(*i.weights), 0, _moved(b, i.ins[0], *i.outs))


def expected_experts(experts: int, top: int, rows: int) -> float:
    """Experts used by `rows` rows that choose `top` of `experts` evenly: E (1 - (1 - k/E)^R)."""
    return experts * (1 - (1 - top / experts) ** rows)


def _experts(i: Instruction, b: Bound) -> Cost:
    rows, top = b.rows(i.ins[0]), b.width(i.ins[1])
    used = b.experts(i)
    gate = b.program.weight_table[i.weights[0]]
    flops = 6.0 * rows * top * gate.shape[1] * (gate.shape[0] // i["experts"])
    moved = 2 * rows * top * gate.shape[1] * ACTIVATION_BYTES
    weights = used / i["experts"] * b.weight_bytes(*i.weights)
    return Cost({arithmetic(i, b): flops}, weights, 0, moved, experts=used)


def _pool(i: Instruction, b: Bound) -> Cost:
    moved = _moved(b, i.ins[0], i.outs[0])
    return Cost({"f32": float(b.rows(i.ins[0]) * b.width(i.ins[0]))}, 0, 0, moved)


def _sample(i: Instruction, b: Bound) -> Cost:
    moved = _moved(b, i.ins[0])
    return Cost({"f32": moved / ACTIVATION_BYTES}, 0, 0, moved)


RULES: dict[str, Callable[[Instruction, Bound], Cost]] = {
    "embed": _embed,
    "norm": _elementwise(lambda i: 4 if i["kind"] == "rms" else 7),
    "linear": _linear,
    "rope": _elementwise(lambda i: 3),
    "store": _store,
    "attend": _attend,
    "act": _elementwise(lambda i: _KIND_COST.get(i["kind"], 8)),
    "binary": _elementwise(lambda i: 1),
    "pick": lambda i, b: Cost(activation=2 * _moved(b, i.outs[0])),
    "pool": _pool,
    "softmax": _elementwise(lambda i: 5),
    "concat": _elementwise(lambda i: 0),
    "lstm": _lstm,
    "route": _route,
    "experts": _experts,
    "sample": _sample,
    "loss": lambda i, b: Cost({"f32": 5.0 * b.rows(i.ins[0]) * b.width(i.ins[0])}, 0, 0,
                              _moved(b, i.ins[0])),
    "dropout": _elementwise(lambda i: 2),
}  # fmt: skip
