"""Passes keep the arithmetic: fused instructions expand to what they replaced."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import gguf
import numpy as np
import pytest

from lmclock import passes
from lmclock.errors import OptionError, ProgramError
from lmclock.isa import expand, make
from lmclock.listing import parse
from lmclock.passes import fuse, optimise, place, round_activations
from lmclock.passes.quantize import quantize
from lmclock.program import Program
from lmclock.verify import verify
from tests.helpers import random_weights
from tests.tiny import llama


def ops(program: Program) -> list[str]:
    return [i.op for i in program.section("step").instructions]


def test_a_llama_layer_becomes_eight_instructions() -> None:
    layer = ops(fuse(llama(layers=2)))[1:9]
    assert layer == ["qkv", "rope", "rope", "store", "attend", "linear", "glu", "linear"]


def test_expansion_gives_back_the_arithmetic() -> None:
    """Names of inner values aside, a fused program expands to the instructions it was made of."""
    plain, fused = llama(), fuse(llama())
    steps = [s for i in fused.section("step").instructions for s in expand(i)]
    assert Counter(s.op for s in steps) == Counter(ops(plain))
    assert sorted(w for s in steps for w in s.all_weights()) == sorted(
        w for i in plain.section("step").instructions for w in i.all_weights()
    )


def test_a_pass_that_breaks_a_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(program: Program) -> Program:
        """Leaves the first instruction out."""
        step = program.section("step")
        return program.with_sections((replace(step, instructions=step.instructions[1:]),))

    monkeypatch.setitem(passes.LEVELS, 1, (forgetful, fuse, place))
    with pytest.raises(ProgramError, match=r"after pass forgetful: step 0: .*before it is defined"):
        optimise(llama(), 1)


def test_an_inner_value_with_another_reader_is_not_fused() -> None:
    text = """program t "t"
input x tok f32 width=32
weight n 1x32 f32
weight w 32x32 f32
section step
norm h, x, n
linear y, h, w
binary z, y, x
binary again, y, h
"""
    assert ops(fuse(parse(text))) == ["norm", "linear", "binary", "binary"]


def test_a_residual_defined_after_the_product_is_not_fused() -> None:
    text = """program t "t"
input x tok f32 width=32
weight w 32x32 f32
section step
linear y, x, w
act r, x kind=relu
binary z, y, r
"""
    assert ops(fuse(parse(text))) == ["linear", "act", "binary"]
    residual_first = text.replace(
        "linear y, x, w\nact r, x kind=relu", "act r, x kind=relu\nlinear y, x, w"
    )
    assert ops(fuse(parse(residual_first))) == ["act", "linear"]


def test_rounding_follows_the_weights() -> None:
    program = round_activations(llama(layers=3, formats=("q4_1", "f16", "bf16")))
    acts = [i["act"] for i in program.section("step").instructions if i.op == "linear"]
    layers = ["q8_32"] * 7 + ["none"] * 7 + ["bf16"] * 7
    assert acts == [*layers, "q8_32"], "three layers, then the q8_0 head"


def test_registers_never_hold_two_live_values() -> None:
    for level in (0, 1, 2):
        program = optimise(llama(layers=4), level)
        register = dict(program.registers)
        body = program.section("step").instructions
        types = program.types("step")
        last = {name: k for k, i in enumerate(body) for name in i.reads()}
        holder: dict[int, str] = {}
        for k, i in enumerate(body):
            for name in i.reads():
                if name in register:
                    assert holder[register[name]] == name, f"{name} was overwritten before {k}"
            for name in i.outs:
                before = holder.get(register[name])
                assert before is None or last.get(before, len(body)) < k
                if before:
                    assert types[before].space == types[name].space
                    assert types[before].ids == types[name].ids
                holder[register[name]] = name


def test_a_whole_llama_runs_in_few_registers() -> None:
    registers = {r for _, r in optimise(llama(layers=30), 2).registers}
    assert len(registers) <= 12
    assert registers == set(range(len(registers)))


def test_kept_values_have_a_register_of_their_own() -> None:
    program = place(llama(layers=4), keep=("x.1", "a.2"))
    counts = Counter(r for _, r in program.registers)
    register = dict(program.registers)
    assert counts[register["x.1"]] == counts[register["a.2"]] == 1


def test_an_unknown_level_names_the_valid_ones() -> None:
    with pytest.raises(OptionError, match="level 7 is unknown; valid: 0, 1 or 2"):
        optimise(llama(), 7)


def test_training_stays_unfused() -> None:
    program = llama(layers=1)
    text = program.section("step").instructions
    train = program.with_sections((type(program.sections[0])("train", text),))
    assert fuse(train).section("train").instructions == text
    assert make("norm", "y", "x", eps=1e-5) == make("norm", "y", "x")


# --- quantize


@pytest.mark.parametrize("target", ["bf16", "q8_0"])
def test_quantize_rounds_what_products_read(target: str) -> None:
    program = llama()
    weights = random_weights(program)
    before = {name: w.unpack().copy() for name, w in weights.items()}
    changed, rounded = quantize(program, weights, target)
    verify(changed)
    products = {w for i in changed.section("step").instructions
                if i.op in ("linear", "qkv", "glu") for w in i.weights}  # fmt: skip
    kind = gguf.GGMLQuantizationType[target.upper()]
    for w in changed.weights:
        if w.values is not None:
            continue
        whole = w.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        if program.weight_table[w.name].format != "f32" or w.name not in products or not whole:
            assert w == program.weight_table[w.name] and rounded[w.name] is weights[w.name]
            continue
        assert w.format == target == rounded[w.name].format.name
        x = before[w.name].reshape(w.shape)
        other = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
        off, theirs = (np.sqrt(((y - x) ** 2).mean())
                       for y in (rounded[w.name].unpack().reshape(w.shape), other))  # fmt: skip
        assert 0 < off <= 1.01 * theirs
    assert any(w.format == target for w in changed.weights)


def test_quantize_to_what_is_no_format() -> None:
    with pytest.raises(OptionError, match="valid: bf16 or q8_0"):
        quantize(llama(), {}, "q2_0")
