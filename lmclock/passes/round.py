"""`round_activations` and `round_attention`: which instructions round what they read, and how.

Quantised weights meet activations rounded to int8 per 32 elements (act=q8_32), so that the product
is an integer dot product. Rounding is part of the program: every machine does the same.

Attention of a program that rounds its products may round too, where a sequence has many rows in a
cycle (act=bf16): a permission, for processors that multiply 16-bit pairs twice as fast. How long
the chunks of a prompt are then matters to its bits, so a program that must be invariant goes
without; a machine that gains nothing computes in f32. A model of float weights keeps its precision.
"""

from __future__ import annotations

from dataclasses import replace

from lmclock.isa import Instruction, make
from lmclock.program import Program, Section

FLOAT_FORMATS = ("f32", "f16", "bf16")


def round_activations(program: Program) -> Program:
    """A copy whose products over quantised weights have act=q8_32; others stay as they are."""

    def rounded(i: Instruction) -> Instruction:
        if not i.weights or "act" not in i.row.attrs or i["act"] != "none":
            return i
        weights = [program.weight_table[name] for name in i.weights]
        quantised = all(w.format not in FLOAT_FORMATS for w in weights)
        if not quantised or any(w.shape[1] % 32 for w in weights):
            return i
        return make(i.op, i.outs, i.ins, i.weights, i.state, **{**dict(i.attrs), "act": "q8_32"})

    sections = tuple(
        # Training keeps exact activations: a rounded one has no useful gradient.
        s if s.name == "train" else Section(s.name, tuple(rounded(i) for i in s.instructions))
        for s in program.sections
    )
    return replace(program, sections=sections, registers=())


def round_attention(program: Program) -> Program:
    """A copy whose attention has act=bf16, where products are rounded; `train` apart."""
    every = [i for section in program.sections for i in section.instructions]
    if not any("act" in i.row.attrs and i["act"] == "q8_32" for i in every):
        return program

    def rounded(i: Instruction) -> Instruction:
        if i.op != "attend":
            return i
        return make(i.op, i.outs, i.ins, i.weights, i.state, **{**dict(i.attrs), "act": "bf16"})

    sections = tuple(
        s if s.name == "train" else Section(s.name, tuple(rounded(i) for i in s.instructions))
        for s in program.sections
    )
    return replace(program, sections=sections, registers=())
