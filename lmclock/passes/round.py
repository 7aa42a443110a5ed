"""`round_activations`: which products round their input row, and how.

Quantised weights meet activations rounded to int8 per 32 elements (act=q8_32), so that the product
is an integer dot product. Rounding is part of the program: every machine does the same.
"""

from __future__ import annotations

from dataclasses import replace

from lmclock.isa import Instruction, make
from lmclock.program import Program, Section

FLOAT_FORMATS = ("f32", "f16", "bf16")


def round_activations(program: Program) -> Program:
    """A copy whose products over quantised weights have act=q8_32; others stay as they are."""

    def rounded(i: Instruction) -> Instruction:
        if "act" not in i.row.attrs or i["act"] != "none":
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
