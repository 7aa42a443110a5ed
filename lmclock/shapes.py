"""Shape rules: what each opcode makes of the types of its operands.

A rule takes (instruction, types of ins, shapes of weights, state or None) and returns the types of
the outs; it raises ProgramError with a reason. The table in isa.py names the rule of each opcode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmclock.errors import ProgramError


@dataclass(frozen=True)
class Type:
    """What is known of a value before any batch: its row space, width, and whether it holds ids or
    f32.
    """

    space: str
    width: int
    ids: bool = False


Types = Sequence[Type]
Shapes = Sequence[tuple[int, int]]
Outs = tuple[Type, ...]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProgramError(message)


def _product(x: Type, shape: tuple[int, int], name: str) -> Type:
    _require(x.width == shape[1], f"weight {name} takes rows of width {shape[1]}, not {x.width}")
    return Type(x.space, shape[0])


def same(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    for other in ins[1:]:
        _require(other == ins[0], f"operands differ: {ins[0]} and {other}")
    return (ins[0],)


def embed(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    _require(ins[0].ids and ins[0].width == 1, "embed needs one column of ids")
    return (Type(ins[0].space, weights[0][1]),)


def norm(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    _require(
        ins[0].width % i["groups"] == 0,
        f"width {ins[0].width} is not a multiple of groups={i['groups']}",
    )
    part = ins[0].width // i["groups"]
    for shape in weights:
        _require(
            shape[0] * shape[1] == part,
            f"norm weight has {shape[0] * shape[1]} elements, the row part {part}",
        )
    return (ins[0],)


def products(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    outs = tuple(_product(ins[0], w, n) for w, n in zip(weights, i.weights, strict=False))
    return outs if i.op == "qkv" else outs[:1]


def glu(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    _require(weights[0] == weights[1], f"gate {weights[0]} and up {weights[1]} differ in shape")
    return (_product(ins[0], weights[0], i.weights[0]),)


def rope(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    _require(
        ins[0].width % i["heads"] == 0,
        f"width {ins[0].width} is not a multiple of heads={i['heads']}",
    )
    head = ins[0].width // i["heads"]
    dims = i["dims"] or head
    _require(
        dims <= head and dims % 2 == 0,
        f"dims={dims} must be even and at most the head width {head}",
    )
    return (ins[0],)


def store(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    for x, width, name in zip(
        ins, (state.heads * state.key, state.heads * state.value), "kv", strict=False
    ):
        _require(
            x.width == width, f"state {i.state} holds {name} rows of width {width}, not {x.width}"
        )
    return ()


def attend(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    heads, kv_heads = i["heads"], i["kv_heads"] or i["heads"]
    _require(heads % kv_heads == 0, f"heads={heads} is not a multiple of kv_heads={kv_heads}")
    _require(ins[0].width % heads == 0, f"width {ins[0].width} is not a multiple of heads={heads}")
    _require((state is None) == (len(ins) == 3), "attend takes a state, or a key and a value")
    key = ins[0].width // heads
    if state is not None:
        _require(
            state.heads == kv_heads, f"state {i.state} has {state.heads} heads, not {kv_heads}"
        )
        _require(state.key == key, f"state {i.state} has keys of {state.key}, the query {key}")
        return (Type(ins[0].space, heads * state.value),)
    _require(
        ins[1].width == kv_heads * key, f"key rows are {ins[1].width} wide, not {kv_heads} x {key}"
    )
    return (Type(ins[0].space, heads * (ins[2].width // kv_heads)),)


def pick(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    return (Type("pick", ins[0].width, ins[0].ids),)


def pool(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    return (Type("seq", ins[0].width),)


def concat(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    return (Type(ins[0].space, ins[0].width + ins[1].width),)


def lstm(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    hidden = weights[1][1]
    _product(ins[0], weights[0], i.weights[0])
    _require(
        weights[0][0] == weights[1][0] == 4 * hidden, f"lstm weights must have {4 * hidden} rows"
    )
    return (Type(ins[0].space, hidden),)


def route(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    _require(0 < i["top"] <= i["experts"], f"top={i['top']} must be 1 to experts={i['experts']}")
    _require(
        weights[0][0] == i["experts"],
        f"router has {weights[0][0]} rows, not experts={i['experts']}",
    )
    _product(ins[0], weights[0], i.weights[0])
    return Type(ins[0].space, i["top"]), Type(ins[0].space, i["top"], ids=True)


def experts(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    _require(
        weights[0][0] % i["experts"] == 0,
        f"gate rows {weights[0][0]} do not split into {i['experts']} experts",
    )
    return (ins[0],)


def sample(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    return (Type(ins[0].space, 1, ids=True),)


def loss(i: Any, ins: Types, weights: Shapes, state: Any) -> Outs:
    return (Type("seq", 1),)
