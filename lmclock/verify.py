"""Is a program sound? A table of rules, checked after the passes, or after assembly where none run.

`verify(program)` returns the program or raises ProgramError; the message names the instruction.
Shape rules live with the
opcodes (shapes.py); this file holds what concerns the whole: definitions, weights, states,
operands by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmclock.errors import LmclockError, ProgramError, choices
from lmclock.formats import get_format
from lmclock.isa import Instruction, Type
from lmclock.program import CACHE_FORMATS, STATE_KINDS, Program, State, Weight


def verify(program: Program) -> Program:
    """The program itself when every rule holds."""
    tables = (("weight", program.weights, WEIGHT_RULES), ("state", program.states, STATE_RULES))
    for what, items, rules in tables:
        for item in items:
            try:
                _check(rules, (item,))
            except ProgramError as error:
                raise ProgramError(f"{what} {item.name}: {error}") from None
    _names(program)
    if not program.sections:
        raise ProgramError(f"program {program.name!r} has no section")
    stored: set[str] = set()
    for section in program.sections:
        known = {i.name: i.type for i in program.inputs}
        for number, i in enumerate(section.instructions):
            scope = _Scope(program, section.name, i, known, stored)
            try:
                _check(OPERAND_RULES, (scope,))
                scope.outs = program.out_types(i, known)
                _check(TYPE_RULES, (scope,))
            except ProgramError as error:
                from lmclock.listing import assembly  # only where something is wrong

                where = f"{section.name} {number}: {assembly(i)}"
                raise ProgramError(f"{where}: {error}") from None
            known.update(zip(i.outs, scope.outs, strict=True))
            if i.op == "store" and i.state:
                stored.add(i.state)
    return program


def _check(rules: tuple[tuple[Callable[..., bool], str], ...], args: tuple) -> None:
    for holds, message in rules:
        if not holds(*args):
            raise ProgramError(message)


def _names(program: Program) -> None:
    seen: set[str] = set()
    tables = (program.inputs, program.weights, program.states)
    for name in [item.name for table in tables for item in table]:
        if name in seen:
            raise ProgramError(f"{name} is declared twice")
        seen.add(name)


# Operands that may be ids: the experts' third is who was chosen, the loss's second the target.
TAKE_IDS = {"embed": (0,), "pick": (0,), "experts": (2,), "loss": (1,)}


@dataclass
class _Scope:
    """What the rules of one instruction look at."""

    program: Program
    section: str
    i: Instruction
    known: dict[str, Type]
    stored: set[str]
    outs: tuple[Type, ...] = ()

    @property
    def state(self) -> State | None:
        return self.program.state(self.i.state)[0] if self.i.state else None

    def counts(self) -> bool:
        i, row = self.i, self.i.row
        for have, names in ((i.ins, row.ins), (i.weights, row.weights)):
            least, most = row.count(names)
            if not least <= len(have) <= most:
                return False
        if len(i.outs) != len(row.outs):
            return False
        return i.state is None if row.state == "" else bool(i.state) or row.state != "required"

    def shape_of(self, attr: str) -> tuple[int, int] | None:
        """Shape of the weight a named operand gives, None when it is absent."""
        name = self.i[attr] if attr in self.i.row.attrs else None
        return self.program.weight_table[name].shape if name else None

    def fits(self, attr: str, size: int) -> bool:
        shape = self.shape_of(attr)
        return shape is None or shape[0] * shape[1] == size

    def bias_sizes(self) -> bool:
        """Each bias has as many elements as the product it is added to."""
        names = [n for n in ("bias", "bias_k", "bias_v") if n in self.i.row.attrs]
        if not any(self.i[n] for n in names):
            return True
        widths = [self.program.weight_table[w].shape[0] for w in self.i.weights]
        if self.i.op == "norm":
            widths = [self.known[self.i.ins[0]].width // self.i["groups"]]
        return all(self.fits(n, width) for n, width in zip(names, widths, strict=False))

    def ids_where_meant(self) -> bool:
        meant = TAKE_IDS.get(self.i.op, ())
        return all(k in meant or not self.known[n].ids for k, n in enumerate(self.i.ins))


def _state_kind_fits(s: _Scope) -> bool:
    if s.state is None:
        return True
    if s.i.op == "lstm":
        return s.state.kind == "fixed"
    if s.state.kind == "frozen":
        return (s.i.op == "store") == (s.section == "encode")
    return s.state.kind == "paged"


def _state_width_fits(s: _Scope) -> bool:
    return s.i.op != "lstm" or s.state is None or s.state.width == 2 * s.outs[0].width


def _known_weights(s: _Scope) -> bool:
    return all(name in s.program.weight_table for name in s.i.all_weights())


def _add_fits(s: _Scope) -> bool:
    return "add" not in s.i.row.attrs or s.i["add"] is None or s.known[s.i["add"]] == s.outs[0]


def _rounding_fits(s: _Scope) -> bool:
    act = s.i["act"] if "act" in s.i.row.attrs else "none"
    if s.i.op == "attend":
        return act != "q8_32"
    inner = s.outs[0].width if s.i.op == "lstm" else 0  # its state is rounded too
    return act != "q8_32" or (s.known[s.i.ins[0]].width % 32 == 0 and inner % 32 == 0)


def _block_fits(w: Weight) -> bool:
    try:
        return w.shape[1] % get_format(w.format).block == 0
    except LmclockError as error:
        raise ProgramError(str(error)) from None


WEIGHT_RULES = (
    (_block_fits, "the width is not a multiple of the format's block"),
    (lambda w: min(w.shape) > 0, "rows and width must be positive"),
)
STATE_RULES = (
    (lambda s: s.kind in STATE_KINDS, f"the kind must be {choices(STATE_KINDS)}"),
    (lambda s: s.count > 0, "the count must be positive"),
    (lambda s: s.format in CACHE_FORMATS, f"the format must be {choices(CACHE_FORMATS)}"),
    (lambda s: s.kind != "fixed" or s.width > 0, "a fixed state needs width="),
    (
        lambda s: s.kind == "fixed" or min(s.heads, s.key, s.value) > 0,
        "a paged or frozen state needs heads=, key= and value=",
    ),
    (
        lambda s: s.format != "q8_0" or s.key % 32 == s.value % 32 == 0,
        "format=q8_0 needs key and value widths that are multiples of 32",
    ),
)
OPERAND_RULES = (
    (lambda s: s.counts(), "the number of operands is not what the opcode takes"),
    (lambda s: all(n in s.known for n in s.i.reads()), "an operand is read before it is defined"),
    (lambda s: not any(o in s.known for o in s.i.outs), "a value is defined twice"),
    (lambda s: len(set(s.i.outs)) == len(s.i.outs), "two results have one name"),
    (_known_weights, "a weight is not declared"),
    (
        lambda s: not any(o in s.program.weight_table for o in s.i.outs),
        "a result has the name of a weight",
    ),
    (_state_kind_fits, "this kind of state does not go with the opcode and section"),
    (
        lambda s: s.i.op != "attend" or s.i.state is None or s.i.state in s.stored,
        "the state is read before any store has written it",
    ),
    (lambda s: s.ids_where_meant(), "ids stand where numbers are meant"),
)
TYPE_RULES = (
    (_add_fits, "add= differs from the result in rows or width"),
    (_state_width_fits, "the lstm's state must be 2 x hidden wide"),
    (_rounding_fits, "act=q8_32 needs a product, and a width that is a multiple of 32"),
    (lambda s: s.bias_sizes(), "a bias has not as many elements as its product has outputs"),
    (
        lambda s: (
            s.i.op in ("norm",) or s.fits("norm", s.known[s.i.ins[0]].width if s.i.ins else 0)
        ),
        "norm= has not as many elements as the input is wide",
    ),
)
