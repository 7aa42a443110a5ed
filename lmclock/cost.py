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

from lmclock.batch import Batch, Rows
from lmclock.isa import Instruction, expand
from lmclock.program import Program

ACTIVATION_BYTES = 4  # registers hold f32
_KIND_COST = {"relu": 1, "softcap": 12}  # operations per element; the others need an exponential


@dataclass(frozen=True)
class Cost:
    """Operations by arithmetic kind (multiply and add counted apart) and bytes by place; `serial`:
    dependent steps.
    """

    flops: dict[str, float] = field(default_factory=dict)
    weight: float = 0.0
    cache: float = 0.0
    activation: float = 0.0
    serial: int = 0

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
                    self.activation + other.activation, self.serial + other.serial)  # fmt: skip


class Bound:
    """A program's section with a batch: every count the cost rules ask for."""

    def __init__(self, program: Program, section: str, batch: Batch) -> None:
        self.program = program
        self.types = program.types(section)
        self.batch = batch
        self._seen: dict[tuple[str, int, str], tuple[int, int]] = {}

    def rows(self, value: str) -> int:
        """Valid rows of the space a value belongs to."""
        space = self.types[value].space
        if space in ("pick", "seq"):
            return self.batch.count(space)
        return int(self.batch.rows[space].valid.sum())

    def width(self, value: str) -> int:
        return self.types[value].width

    def weight_bytes(self, *names: str | None) -> int:
        return sum(self.program.weight_table[n].bytes for n in names if n)

    def distinct_ids(self, value: str) -> int:
        return len(np.unique(self.batch.inputs[value])) if value in self.batch.inputs else 1

    def longest(self, value: str) -> int:
        rows = self.batch.rows[self.types[value].space]
        return int(np.diff(rows.starts).max(initial=0))

    def visible(self, i: Instruction) -> tuple[int, int]:
        """(visible positions summed over rows, distinct positions) of an attend."""
        key = (i["mask"], i["window"], i.state or i.ins[1])
        if key not in self._seen:
            self._seen[key] = self._visible(i)
        return self._seen[key]

    def _visible(self, i: Instruction) -> tuple[int, int]:
        rows = self.batch.rows[self.types[i.ins[0]].space]
        state = self.program.state(i.state)[0] if i.state else None
        if state is not None and state.kind == "frozen":
            return self._all_positions(rows.starts, self.batch.lengths[state.name])
        if i["mask"] == "full" and state is None:
            other = self.batch.rows[self.types[i.ins[1]].space]
            return self._all_positions(rows.starts, np.diff(other.starts))
        seen = rows.positions[rows.valid] + 1
        if i["window"]:
            seen = np.minimum(seen, i["window"])
        return int(seen.sum()), self._distinct(i, rows, state.name if state else None)

    @staticmethod
    def _all_positions(starts: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
        """Every row sees all of its sequence's positions."""
        return int((np.diff(starts) * lengths).sum()), int(lengths.sum())

    def _distinct(self, i: Instruction, rows: Rows, state: str | None) -> int:
        """Positions read at least once; pages shared between sequences count once."""
        pages = self.batch.pages.get(state) if state else None
        size = self.batch.page_size
        covered: dict[int, int] = {}
        total = 0
        for n in range(rows.sequences):
            seen = rows.positions[rows.starts[n] : rows.starts[n + 1]]
            if not len(seen):
                continue
            end = int(seen[-1]) + 1
            low = max(0, int(seen[0]) + 1 - i["window"]) if i["window"] else 0
            if pages is None:
                total += end - low
                continue
            for slot in range(low // size, -(-end // size)):
                count = min(end, (slot + 1) * size) - max(low, slot * size)
                page = int(pages[n][slot])
                covered[page] = max(covered.get(page, 0), count)
        return total + sum(covered.values())


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
    return Cost(total.flops, total.weight, total.cache, outer, total.serial)


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
    flops = {"f32": float(seen * heads * (2 * both + 5))}
    return Cost(flops, b.weight_bytes(*i.all_weights()), distinct * width * per,
                _moved(b, i.ins[0], i.outs[0]))  # fmt: skip


def _lstm(i: Instruction, b: Bound) -> Cost:
    rows, d, h = b.rows(i.ins[0]), b.width(i.ins[0]), b.width(i.outs[0])
    flops = {"f32": float(8 * rows * h * (d + h) + 10 * rows * h)}
    weights = b.weight_bytes(*i.all_weights()) if rows else 0
    moved = _moved(b, i.ins[0], i.outs[0])
    # h and c, read and written once per sequence
    cache = 4 * b.batch.sequences * h * ACTIVATION_BYTES
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
    used = expected_experts(i["experts"], top, rows) / i["experts"]
    gate = b.program.weight_table[i.weights[0]]
    flops = 6.0 * rows * top * gate.shape[1] * (gate.shape[0] // i["experts"])
    moved = 2 * rows * top * gate.shape[1] * ACTIVATION_BYTES
    return Cost({arithmetic(i, b): flops}, used * b.weight_bytes(*i.weights), 0, moved)


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
