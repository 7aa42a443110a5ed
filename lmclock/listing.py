"""A program as text and back: `parse(render(p)) == p`.

One declaration or instruction a line, operands first (results, then the rest), then `name=value`
attributes; what follows `;` is comment. Lines that differ only by a layer number are folded:

    .repeat i = 0..29
      norm     h.{i}, x.{i}, blk.{i}.attn_norm    eps=1e-05
      ...
      linear   x.{i+1}, f.{i}, blk.{i}.ffn_down   act=q8_32 add=y.{i}
    .end

`{i}` and `{i+1}` stand for numbers inside names, so a fold is only shorthand (folding.py): unfolded
it is the same program. Of a weight's own values, `64*0.5` stands for sixty-four equal ones.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from lmclock.errors import FileError, LmclockError, ProgramError, choices
from lmclock.folding import fold_twice, unfold
from lmclock.isa import ATTRS, OPCODES, SPACES, Instruction, Type, make
from lmclock.program import SECTIONS, STATE_KINDS, Input, Program, Section, State, Weight

_NAME = re.compile(r"[A-Za-z_][\w.'~/-]*(\[\d+\])?$")


# --- program -> text
# -------------------------------------------------------------------------------


def render(program: Program, comments: bool = True) -> str:
    """The listing, folded. With comments: row space and width of each result, format of each
    weight.
    """
    title = f'program  {program.family} "{program.name}"'
    if program.context:
        title += f" context={program.context}"
    if comments and program.registers:
        title += f"   ; {1 + max(r for _, r in program.registers)} registers"
    lines = [title]
    for i in program.inputs:
        kind = "ids" if i.ids else f"f32 width={i.width}"
        lines.append(f"input    {i.name} {i.space} {kind}")
    lines += fold_twice([_weight_line(w) for w in program.weights])
    lines += [_state_line(s) for s in program.states]
    for section in program.sections:
        lines += ["", f"section  {section.name}"]
        types = program.types(section.name) if comments else {}
        lines += _columns(fold_twice([_line(program, i, types) for i in section.instructions]))
    return "\n".join(lines) + "\n"


def _columns(lines: list[str]) -> list[str]:
    """Operands, attributes and comments under one another (parts are separated by three blanks)."""
    rows = []
    for line in lines:
        code, *comment = line.split("   ;", 1)
        head = len(code) - len(code.lstrip()) + 9  # indent, opcode and its padding
        operands, *attrs = code[head:].split("   ", 1)
        rows.append([code[:head] + operands, attrs[0] if attrs else "", *comment])
    for column, most in ((0, 48), (1, 40)):
        width = min(most, max((len(row[column]) for row in rows), default=0)) + 1
        for row in rows:
            row[column] = f"{row[column]:<{width}} "
    return [f"{a}{b}{';' + c[0] if c else ''}".rstrip() for a, b, *c in rows]


def _weight_line(w: Weight) -> str:
    line = f"weight   {w.name} {w.shape[0]}x{w.shape[1]} {w.format}"
    if w.values is not None:
        runs = ((repr(v), len(list(same))) for v, same in groupby(w.values))
        line += " = " + " ".join(f"{count}*{v}" if count > 3 else " ".join([v] * count)
                                 for v, count in runs)  # fmt: skip
    return line


def _values(text: str, shape: tuple[int, int]) -> tuple[float, ...]:
    """Numbers with spaces between; `64*0.5` stands for sixty-four of them."""
    found: list[float] = []
    size = shape[0] * shape[1]
    for word in text.split():
        run = re.fullmatch(r"(\d{1,9})\*(\S+)", word)
        count = min(int(run[1]), size + 1) if run else 1
        found += [_number(run[2] if run else word, "float", "value")] * count
    if len(found) != size:
        raise ProgramError(f"{len(found)} values do not fill {shape[0]}x{shape[1]}")
    return tuple(found)


def _state_line(s: State) -> str:
    parts = [f"state    {s.name}[{s.count}] {s.kind}"]
    parts += [f"{k}={v}" for k in ("heads", "key", "value", "width") if (v := getattr(s, k))]
    return " ".join([*parts, f"format={s.format}"])


def _line(program: Program, i: Instruction, types: dict[str, Type]) -> str:
    """One instruction; results first, the state before the inputs when there is no result."""
    text = assembly(i)
    if not types:
        return text
    notes = [f"{types[o].space} x {types[o].width}" for o in i.outs[:1]]
    notes += sorted({program.weight_table[w].format for w in i.weights})
    return f"{text}   ; {', '.join(notes)}" if notes else text


def assembly(i: Instruction) -> str:
    """The instruction as the listing spells it, without comment."""
    state = [i.state] if i.state else []
    named = [*i.ins, *state] if i.outs else [*state, *i.ins]
    operands = ", ".join([*i.outs, *named, *i.weights])
    attrs = " ".join(f"{k}={_spell(v)}" for k, v in i.attrs)
    return f"{i.op:<8} {operands}   {attrs}" if attrs else f"{i.op:<8} {operands}"


def _spell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


# --- text -> program
# -------------------------------------------------------------------------------


def parse(text: str) -> Program:
    """The program a listing describes; ProgramError names the line. Soundness is verify's
    business.
    """
    parser = _Parser()
    for number, line in unfold(text):
        try:
            parser.line(line)
        except LmclockError as error:
            raise ProgramError(f"line {number}: {error}") from None
    return parser.program()


def read(path: str) -> Program:
    """The program in a listing file."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read listing {path}: {error}") from None


class _Parser:
    def __init__(self) -> None:
        self.title: tuple[str, str, int] | None = None
        self.inputs: list[Input] = []
        self.weights: dict[str, Weight] = {}
        self.states: dict[str, State] = {}
        self.sections: dict[str, list[Instruction]] = {}
        self.current: list[Instruction] | None = None

    def line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        declare = {"program": self.head, "input": self.input, "weight": self.weight,
                   "state": self.state, "section": self.section}  # fmt: skip
        if word in declare:
            declare[word](rest.strip())
        elif word in OPCODES:
            if self.current is None:
                raise ProgramError(f"{word} stands before the first section")
            self.current.append(self.instruction(word, rest))
        else:
            valid = choices([*declare, *OPCODES])
            raise ProgramError(f"unknown opcode or declaration {word!r}; valid: {valid}")

    def head(self, rest: str) -> None:
        match = re.fullmatch(r'(\S+)\s+"([^"]*)"(?:\s+context=(\d{1,9}))?', rest)
        if not match:
            raise ProgramError(f'expected `program FAMILY "NAME" [context=N]`, not {rest!r}')
        self.title = (match[1], match[2], int(match[3] or 0))

    def input(self, rest: str) -> None:
        match = re.fullmatch(r"(\S+)\s+(\w+)\s+(?:(ids)|f32(?:\s+width=(\d{1,9}))?)", rest)
        if not match or match[2] not in SPACES:
            raise ProgramError(
                f"expected `input NAME SPACE ids` or `input NAME SPACE f32 width=N`, not {rest!r}; "
                f"spaces: {choices(SPACES)}"
            )
        self.inputs.append(Input(_name(match[1]), match[2], int(match[4] or 1), bool(match[3])))

    def weight(self, rest: str) -> None:
        match = re.fullmatch(r"(\S+)\s+(\d{1,9})x(\d{1,9})\s+(\w+)(?:\s*=\s*(.*))?", rest)
        if not match:
            raise ProgramError(f"expected `weight NAME ROWSxWIDTH FORMAT [= VALUES]`, not {rest!r}")
        shape = (int(match[2]), int(match[3]))
        values = None
        if match[5] is not None:
            values = _values(match[5], shape)
        self.declare(self.weights, Weight(_name(match[1]), shape, match[4], values))

    def state(self, rest: str) -> None:
        match = re.fullmatch(r"([\w.]+)\[(\d{1,6})\]\s+(\w+)((?:\s+\w+=\w+)*)", rest)
        if not match or match[3] not in STATE_KINDS:
            raise ProgramError(
                "expected `state NAME[COUNT] KIND heads= key= value= width= format=`, "
                f"not {rest!r}; kinds: {choices(STATE_KINDS)}"
            )
        options: dict[str, Any] = dict(part.split("=") for part in match[4].split())
        for key in options:
            if key not in ("heads", "key", "value", "width", "format"):
                raise ProgramError(
                    f"state has no {key}=; valid: heads, key, value, width or format"
                )
            if key != "format":
                options[key] = _number(options[key], "int", key)
        self.declare(self.states, State(match[1], int(match[2]), match[3], **options))

    def declare(self, table: dict[str, Any], item: Any) -> None:
        if item.name in self.weights or item.name in self.states:
            raise ProgramError(f"{item.name} is declared twice")
        table[item.name] = item

    def section(self, rest: str) -> None:
        if rest not in SECTIONS or rest in self.sections:
            raise ProgramError(f"section {rest!r} must be {choices(SECTIONS)}, and only once")
        self.current = self.sections[rest] = []

    def instruction(self, op: str, rest: str) -> Instruction:
        attrs: dict[str, Any] = {}
        while match := re.search(r"\s(\w+)=(\S+)$", f" {rest}"):
            if match[1] in attrs:
                raise ProgramError(f"{op} {match[1]}= is given twice")
            attrs[match[1]] = _attr(op, match[1], match[2])
            rest = f" {rest}"[: match.start()].strip()
        row = OPCODES[op]
        names = [_name(part.strip()) for part in rest.split(",")] if rest.strip() else []
        outs, others = names[: len(row.outs)], names[len(row.outs) :]
        states = [n for n in others if n.partition("[")[0] in self.states]
        weights = [n for n in others if n in self.weights]
        ins = [n for n in others if n not in states and n not in weights]
        if len(outs) < len(row.outs) or len(states) > 1:
            wanted = ", ".join([*row.outs, *row.ins, *row.weights])
            raise ProgramError(f"{op} takes {wanted}, not {rest.strip()!r}")
        return make(
            op, tuple(outs), tuple(ins), tuple(weights), states[0] if states else None, **attrs
        )

    def program(self) -> Program:
        if self.title is None:
            raise ProgramError('the listing has no `program FAMILY "NAME"` line')
        sections = tuple(Section(name, tuple(body)) for name, body in self.sections.items())
        family, name, context = self.title
        return Program(family, name, tuple(self.inputs), tuple(self.weights.values()),
                       tuple(self.states.values()), sections, context)  # fmt: skip


def _name(text: str) -> str:
    if not _NAME.match(text):
        raise ProgramError(f"{text!r} is not a name; names are letters, digits and . _ ' ~ / -")
    return text


def _attr(op: str, name: str, text: str) -> Any:
    OPCODES[op].default(name)
    kind = ATTRS[name].kind
    return text if kind in ("enum", "value", "weight") else _number(text, kind, name)


def _number(text: str, kind: str, name: str) -> Any:
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        raise ProgramError(f"{name}={text!r} is not a number") from None
