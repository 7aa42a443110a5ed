"""What the engine must know of a program, read off it once: which section runs, what the inputs
take, where sampling happens, and whether a prompt may come in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmclock.errors import UnsupportedError, choices
from lmclock.isa import Instruction
from lmclock.program import Input, Program

# Inputs the engine fills itself; any other one is the request's to give (Request.inputs).
TOKENS = ("ids", "src_ids")
POSITIONS = ("pos", "src_pos")


@dataclass(frozen=True)
class Defined:
    """Where a value comes into being."""

    section: str
    index: int  # of the instruction
    space: str


@dataclass(frozen=True)
class Facts:
    """See `read_facts`. `main` is the section that takes the prompt; `encodes` says that another
    one, `encode`, runs first on the source rows. `logits` and `next` are None when the program
    does not sample. `vocabulary` is how many token ids the tables take, `context` how many
    positions model and tables do; None without a limit. `source_...`: the same of encoder rows.
    """

    main: str
    space: str  # of the prompt's rows
    encodes: bool
    inputs: tuple[Input, ...]  # read by the sections that run
    paged: tuple[str, ...]
    frozen: tuple[str, ...]
    fixed: tuple[str, ...]
    logits: str | None
    next: str | None
    picks: bool  # some value has a row per picked row
    logits_width: int  # ids that can be sampled
    vocabulary: int | None
    context: int | None
    source_vocabulary: int | None
    source_context: int | None
    values: dict[str, Defined]
    routed: dict[str, tuple[str, ...]]  # by section: values of expert ids, where there is a choice
    carries: bool  # states carry what earlier rows left, so that a sequence can go on
    causal: bool  # and no row depends on later ones, so that a prompt may come in pieces


def read_facts(program: Program) -> Facts:
    """The facts of a program that has a section `step` or `encode`; UnsupportedError otherwise."""
    sections = [name for name in ("encode", "step") if program.has(name)]
    if not sections:
        raise UnsupportedError(
            f"program {program.name!r} has neither a section step nor encode to run; it has "
            f"{choices(s.name for s in program.sections) or 'none'}"
        )
    main = sections[-1]
    body = program.section(main).instructions
    run = [(name, k, i) for name in sections
           for k, i in enumerate(program.section(name).instructions)]  # fmt: skip
    read = {value for _, _, i in run for value in i.reads()}
    inputs = tuple(i for i in program.inputs if i.name in read)
    types = {name: program.types(name) for name in sections}
    values = {out: Defined(name, k, types[name][out].space) for name, k, i in run for out in i.outs}
    here = {value for i in body for value in i.reads()}
    spaces = {i.space for i in inputs if i.name in here} | {types[main][o].space for i in body
                                                            for o in i.outs}  # fmt: skip
    space = "tok" if "tok" in spaces else "src"
    sample = next((i for i in body if i.op == "sample"), None)
    states = {kind: tuple(s.name for s in program.states if s.kind == kind)
              for kind in ("paged", "frozen", "fixed")}  # fmt: skip
    encodes = len(sections) == 2
    strangers = [i.name for i in inputs if i.name in here and i.space != space]
    if strangers:
        raise UnsupportedError(
            f"section {main} of program {program.name!r} reads {strangers[0]}, which is not of its "
            f"space {space}; valid: encoder rows are read by encode only"
        )
    positions = _table_rows(program, run, inputs, space, POSITIONS)
    if sample and types[main][sample.ins[0]].space != "pick":
        raise UnsupportedError(
            f"program {program.name!r} samples {sample.ins[0]}, whose rows are not picked ones; "
            "valid: a sample after pick"
        )
    carries = main == "step" and all(
        i.state is not None for i in body if i.op in ("attend", "lstm")
    )
    return Facts(
        main, space, encodes, inputs, **states,
        logits=sample.ins[0] if sample else None, next=sample.outs[0] if sample else None,
        picks=any(i.op == "pick" for i in body),
        logits_width=types[main][sample.ins[0]].width if sample else 0,
        vocabulary=_table_rows(program, run, inputs, space, TOKENS),
        context=min(filter(None, (program.context, positions)), default=None),
        source_vocabulary=_table_rows(program, run, inputs, "src", TOKENS),
        source_context=_table_rows(program, run, inputs, "src", POSITIONS),
        values=values, routed=_routed(program, sections), carries=carries,
        causal=carries and all(_is_causal(program, i) for i in body),
    )  # fmt: skip


def _routed(program: Program, sections: list[str]) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(
            i.outs[1]
            for i in program.section(name).instructions
            if i.op == "route" and i["top"] < i["experts"]
        )
        for name in sections
    }


def _table_rows(
    program: Program,
    run: list[tuple[str, int, Instruction]],
    inputs: tuple[Input, ...],
    space: str,
    meant: tuple[str, ...],
) -> int | None:
    """Rows of the smallest table that the inputs `meant` of `space` are looked up in."""
    names = {i.name for i in inputs if i.space == space and i.name in meant}
    sizes = [
        program.weight_table[i.weights[0]].shape[0] - i["offset"]
        for _, _, i in run
        if i.op == "embed" and i.ins[0] in names
    ]
    return min(sizes, default=None)


def _is_causal(program: Program, i: Instruction) -> bool:
    """Whether the instruction gives a row the same when its sequence comes in pieces."""
    if i.op == "attend" and i.state:
        return i["mask"] == "causal" or program.state(i.state)[0].kind == "frozen"
    if i.op == "lstm":
        return not i["reverse"]
    return i.op != "pool" or i["kind"] == "last"
