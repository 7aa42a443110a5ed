"""A `Program`: plain immutable data that every machine loads. Inputs, weights, states and sections
of instructions.

The number of rows and the context of each sequence are not part of it: they are bound when a cycle
runs. A program is
made by assemble/, by hand (`listing.parse`), or by a pass; `verify.verify` says whether it is
sound.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from lmclock.errors import ProgramError, choices
from lmclock.formats import get_format
from lmclock.isa import ATTRS, OPCODES, Instruction, Type

SECTIONS = ("encode", "step", "train")
STATE_KINDS = ("paged", "fixed", "frozen")
CACHE_FORMATS = ("f32", "f16", "q8_0")


@dataclass(frozen=True)
class Input:
    """A value the batch brings. `ids` and `pos` are filled by the engine's decode stage."""

    name: str
    space: str
    width: int = 1
    ids: bool = True

    @property
    def type(self) -> Type:
        return Type(self.space, self.width, self.ids)


@dataclass(frozen=True)
class Weight:
    """A weight matrix: shape (rows, width) and stored format; `values` holds a small constant, row
    by row.
    """

    name: str
    shape: tuple[int, int]
    format: str = "f32"
    values: tuple[float, ...] | None = None

    @property
    def row_bytes(self) -> int:
        return get_format(self.format).row_bytes(self.shape[1])

    @property
    def bytes(self) -> int:
        """Stored bytes, scales included."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class State:
    """`count` states of one shape, named `name[0]` .. `name[count - 1]`.

    paged: keys and values of every position; frozen: the same, written once by `encode`; fixed:
    `width` numbers per
    sequence (an LSTM keeps h and c: width = 2 x hidden).
    """

    name: str
    count: int
    kind: str
    heads: int = 0
    key: int = 0
    value: int = 0
    width: int = 0
    format: str = "f32"

    @property
    def element_bytes(self) -> float:
        """Bytes per cached element, scales included."""
        form = get_format(self.format)
        return form.bytes / form.block


@dataclass(frozen=True)
class Section:
    """A straight line of instructions run once per cycle: `encode`, `step` or `train`."""

    name: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Program:
    """A model as data. `registers` maps values to registers after the `place` pass, and is empty
    before it.
    """

    family: str
    name: str
    inputs: tuple[Input, ...] = ()
    weights: tuple[Weight, ...] = ()
    states: tuple[State, ...] = ()
    sections: tuple[Section, ...] = ()
    context: int = 0  # positions the model was made for; 0: no limit
    registers: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    def section(self, name: str) -> Section:
        for section in self.sections:
            if section.name == name:
                return section
        have = choices(s.name for s in self.sections)
        raise ProgramError(
            f"program {self.name!r} has no section {name!r}; it has {have or 'none'}"
        )

    def has(self, name: str) -> bool:
        return any(section.name == name for section in self.sections)

    def state(self, reference: str) -> tuple[State, int]:
        """The state and index that `kv[3]` names."""
        name, bracket, index = reference.partition("[")
        state = next((s for s in self.states if s.name == name), None)
        number = int(index[:-1]) if bracket and index[:-1].isdecimal() and index[-1] == "]" else -1
        if state is None or not 0 <= number < state.count:
            have = choices(f"{s.name}[0..{s.count - 1}]" for s in self.states)
            raise ProgramError(f"unknown state {reference!r}; valid: {have or 'none is declared'}")
        return state, number

    @cached_property
    def weight_table(self) -> dict[str, Weight]:
        return {w.name: w for w in self.weights}

    @cached_property
    def bytes_per_cycle(self) -> int:
        """Weight bytes a cycle of one row of `step` (else of the first section) must read once,
        tables gathered by row excluded.
        """
        section = self.section("step") if self.has("step") else self.sections[0]
        used = {w for i in section.instructions if i.op != "embed" for w in i.all_weights()}
        chosen = {i.outs[1]: i["top"] for i in section.instructions if i.op == "route"}
        parts = {
            w: chosen.get(i.ins[2], i["experts"]) / i["experts"]
            for i in section.instructions
            if i.op == "experts"
            for w in i.weights
        }
        return round(sum(self.weight_table[name].bytes * parts.get(name, 1) for name in used))

    def types(self, section: str) -> dict[str, Type]:
        """The type of every value of a section, inputs included. ProgramError names the
        instruction at fault.
        """
        known = {i.name: i.type for i in self.inputs}
        for number, i in enumerate(self.section(section).instructions):
            try:
                known.update(zip(i.outs, self.out_types(i, known), strict=True))
            except ProgramError as error:
                raise ProgramError(
                    f"{section} {number}: {i.op} {', '.join(i.outs)}: {error}"
                ) from None
        return known

    def out_types(self, i: Instruction, known: dict[str, Type]) -> tuple[Type, ...]:
        """Types of what `i` defines, by its opcode's shape rule."""
        for name in i.reads():
            if name not in known:
                raise ProgramError(f"{name} is read before it is defined")
        shapes = []
        for name in i.weights:
            if name not in self.weight_table:
                raise ProgramError(f"weight {name} is not declared")
            shapes.append(self.weight_table[name].shape)
        state = self.state(i.state)[0] if i.state else None
        return i.row.shape(i, [known[name] for name in i.ins], shapes, state)

    def with_sections(self, sections: tuple[Section, ...], **changes: Any) -> Program:
        """A copy with other sections; registers no longer hold and are dropped."""
        return replace(self, sections=sections, **({"registers": ()} | changes))


# --- the fixed-width encoding that the native machine loads
# ----------------------------------------

OUTS, INS, WEIGHTS = 3, 3, 3
ABSENT = -1
_PLACES = {name: k for k, name in enumerate(ATTRS)}


def encoded_fields() -> tuple[tuple[str, str, int], ...]:
    """(name, "int32" or "float32", count) of every field of an encoded instruction, in order."""
    counts = {"op": 1, "outs": OUTS, "ins": INS, "weights": WEIGHTS, "state": 1}
    head = tuple((name, "int32", count) for name, count in counts.items())
    return head + tuple(
        (a.name, "float32" if a.kind == "float" else "int32", 1) for a in ATTRS.values()
    )


def encode(program: Program, section: str) -> np.ndarray:
    """The section as one structured array, a row per instruction; operands are indices, absent
    ones -1.

    Values are numbered in the order of `value_names`, weights as `program.weights`, states by
    their running number over
    `program.states`. Attributes the opcode lacks hold 0, or -1 when they name an operand.
    """
    dtype = np.dtype([(n, t, (c,)) if c > 1 else (n, t) for n, t, c in encoded_fields()])
    values = {name: k for k, name in enumerate(value_names(program, section))}
    weights = {w.name: k for k, w in enumerate(program.weights)}
    defaults: dict[str, list[Any]] = {}  # by opcode; few attributes differ from them
    rows = []
    for i in program.section(section).instructions:
        if i.op not in defaults:
            given = {name: i.row.default(name) for name in i.row.attrs}
            defaults[i.op] = [
                _encode_attr(i, a.kind, name, given.get(name), values, weights)
                for name, a in ATTRS.items()
            ]
        attrs = defaults[i.op].copy()
        for name, value in i.attrs:
            kind = ATTRS[name].kind
            attrs[_PLACES[name]] = _encode_attr(i, kind, name, value, values, weights)
        rows.append((
            OPCODES[i.op].code, _numbers(i.outs, values, OUTS), _numbers(i.ins, values, INS),
            _numbers(i.weights, weights, WEIGHTS),
            state_number(program, i.state) if i.state else ABSENT, *attrs,
        ))  # fmt: skip
    return np.array(rows, dtype)


def _numbers(names: tuple[str, ...], numbers: dict[str, int], most: int) -> list[int]:
    """Numbers of operands, absent ones included."""
    return [numbers[name] for name in names] + [ABSENT] * (most - len(names))


def _encode_attr(
    i: Instruction, kind: str, name: str, value: Any, values: dict, weights: dict
) -> Any:
    if kind in ("value", "weight"):
        return ABSENT if value is None else (values if kind == "value" else weights)[value]
    if value is None:
        return 0
    return i.row.members(name).index(value) if kind == "enum" else value


def value_names(program: Program, section: str) -> tuple[str, ...]:
    """Inputs, then values in the order they are defined."""
    names = [i.name for i in program.inputs]
    for i in program.section(section).instructions:
        names += i.outs
    return tuple(names)


def state_number(program: Program, reference: str) -> int:
    """The running number of `kv[3]` over all declared states."""
    state, index = program.state(reference)
    return sum(s.count for s in program.states[: program.states.index(state)]) + index
