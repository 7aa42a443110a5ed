"""`round_activations` and `round_attention`: which instructions round what they read, and how.

Quantised weights meet activations rounded to int8 per 32 elements (act=q8_32), so that the product
is an integer dot product. Weights in bf16 meet activations rounded to bf16, as everywhere else that
runs such models: their products are of 16-bit pairs, and AVX-512 and AMX do two to ten times as
many of these as of f32. Rounding is part of the program: every machine does the same.

Attention of a program that rounds its products may round too, where a sequence has many rows in a
cycle (act=bf16): a permission, for processors that multiply 16-bit pairs twice as fast. How long
the chunks of a prompt are then matters to its bits, so a program that must be invariant goes
without; a machine that gains nothing computes in f32. A model of f16 or f32 weights keeps its
precision.
"""

from __future__ import annotations

from dataclasses import replace

from lmclock.isa import Instruction, make
from lmclock.program import Program, Section, Weight

FLOAT_FORMATS = ("f32", "f16", "bf16")


def round_activations(program: Program) -> Program:
    """A copy whose products over quantised weights have act=q8_32, those over bf16 act=bf16; others
    stay as they are.
    """

    def rounded(i: Instruction) -> Instruction:
        if not i.weights or "act" not in i.row.attrs or i["act"] != "none":
            return i
        act = _act([program.weight_table[name] for name in i.weights])
        return make(i.op, i.outs, i.ins, i.weights, i.state, **{**dict(i.attrs), "act": act})

    sections = tuple(
        # Training keeps exact activations: a rounded one has no useful gradient.
        s if s.name == "train" else Section(s.name, tuple(rounded(i) for i in s.instructions))
        for s in program.sections
    )
    return replace(program, sections=sections, registers=())


def _act(weights: list[Weight]) -> str:
    """The rounding that all these weights can be multiplied with fast."""
    if all(w.format == "bf16" for w in weights):
        return "bf16"
    quantised = all(w.format not in FLOAT_FORMATS and w.shape[1] % 32 == 0 for w in weights)
    return "q8_32" if quantised else "none"


def round_attention(program: Program) -> Program:
    """A copy whose attention has act=bf16, where products are rounded; `train` apart."""
    every = [i for section in program.sections for i in section.instructions]
    if not any("act" in i.row.attrs and i["act"] != "none" for i in every):
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
