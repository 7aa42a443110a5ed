"""What every core opcode computes, one short function each, against the Python array API.

`OPERATIONS[op](m, i, *ins)` takes the scope (weights, rows of the bound batch, states), the
instruction and its input values, matrices with one row per row of their space, and returns the
value it defines, or a tuple of them. Nothing here writes into a value, so that PyTorch's autograd
runs through every function. Fused opcodes do not appear: `isa.expand` is their meaning.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lmclock.errors import ProgramError
from lmclock.isa import Instruction
from lmclock.machines.array_attend import attend, store
from lmclock.machines.array_sample import sample_row
from lmclock.machines.array_scope import Array, Scope, scatter, split


def embed(m: Scope, i: Instruction, ids: Array) -> Array:
    """Padding rows are zero, whatever their id."""
    table = m.weights[i.weights[0]]
    valid = m.rows(i.ins[0]).valid
    chosen = m.numpy(ids)[:, 0].astype(np.int64) + i["offset"]
    wrong = chosen[valid & ((chosen < 0) | (chosen >= table.shape[0]))]
    if len(wrong):
        raise ProgramError(
            f"embed {i.outs[0]}: row {wrong[0]} of {i.weights[0]} does not exist; "
            f"valid: 0 to {table.shape[0] - 1}"
        )
    here = np.flatnonzero(valid)
    return scatter(m.xp, [m.take(table, chosen[here]) * i["scale"]], [here], ids)


def norm(m: Scope, i: Instruction, x: Array) -> Array:
    parts = split(m.xp, x, i["groups"])
    if i["kind"] == "layer":
        parts = parts - m.xp.mean(parts, axis=-1, keepdims=True)
    square = m.xp.mean(parts * parts, axis=-1, keepdims=True)
    y = parts / m.xp.sqrt(square + i["eps"])
    if i.weights:
        y = y * m.row(i.weights[0])
    if i["bias"]:
        y = y + m.row(i["bias"])
    return m.xp.reshape(y, x.shape)


def linear(m: Scope, i: Instruction, x: Array) -> Array:
    y = product(m, i, x, m.weights[i.weights[0]])
    if i["scale"] != 1:
        y = y * i["scale"]
    return y + m.row(i["bias"]) if i["bias"] else y


def product(m: Scope, i: Instruction, x: Array, w: Array) -> Array:
    """x w^T, x rounded first as the instruction's `act` says."""
    if i["act"] == "q8_32" and x.shape[1] % 32:
        raise ProgramError(
            f"{i.op} {i.outs[0]}: act=q8_32 needs rows of a multiple of 32, not {x.shape[1]}"
        )
    return m.xp.matmul(x if i["act"] == "none" else m.rounded(x, i["act"]), w.T)


def rope(m: Scope, i: Instruction, x: Array) -> Array:
    """The first `dims` of each head rotate; pair j is (j, j + dims/2), or (2j, 2j + 1)."""
    heads = split(m.xp, x, i["heads"])
    dims = i["dims"] or heads.shape[2]
    if i["freqs"]:
        speed = m.numpy(m.row(i["freqs"])).astype(np.float64)
    else:
        speed = i["base"] ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    angle = (m.rows(i.ins[0]).positions[:, None] * speed)[:, None, :]  # (rows, 1, dims / 2)
    cos, sin = (m.floats(f(angle) * i["scale"]) for f in (np.cos, np.sin))
    turned, rest = heads[:, :, :dims], heads[:, :, dims:]
    if i["pairs"] == "halves":
        a, b = turned[:, :, : dims // 2], turned[:, :, dims // 2 :]
        y = m.xp.concat([a * cos - b * sin, a * sin + b * cos, rest], axis=2)
    else:
        a, b = turned[:, :, 0::2], turned[:, :, 1::2]
        y = m.xp.stack([a * cos - b * sin, a * sin + b * cos], axis=3)
        y = m.xp.concat([m.xp.reshape(y, turned.shape), rest], axis=2)
    return m.xp.reshape(y, x.shape)


def sigmoid(xp: Any, x: Array) -> Array:
    """Without an overflow for any x, in its gradient neither."""
    z = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, xp.ones_like(z), z) / (1 + z)


def gelu_tanh(m: Scope, x: Array) -> Array:
    return 0.5 * x * (1 + m.xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS: dict[str, Callable[[Any, Array], Array]] = {
    "silu": lambda m, x: x * sigmoid(m.xp, x),
    "gelu": lambda m, x: 0.5 * x * (1 + m.erf(x * math.sqrt(0.5))),
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda m, x: x * sigmoid(m.xp, 1.702 * x),
    "relu": lambda m, x: m.xp.where(x > 0, x, m.xp.zeros_like(x)),
    "tanh": lambda m, x: m.xp.tanh(x),
    "sigmoid": lambda m, x: sigmoid(m.xp, x),
}


def act(m: Scope, i: Instruction, x: Array) -> Array:
    if i["kind"] == "softcap":
        return i["cap"] * m.xp.tanh(x / i["cap"])
    return ACTIVATIONS[i["kind"]](m, x)


def binary(m: Scope, i: Instruction, a: Array, b: Array) -> Array:
    if i["kind"] == "mul":
        return a * b
    return a + b if i["kind"] == "add" else a - b


def pick(m: Scope, i: Instruction, x: Array) -> Array:
    return m.take(x, m.batch.pick)


def pool(m: Scope, i: Instruction, x: Array) -> Array:
    """Over the valid rows of each sequence; a sequence without any is zero."""
    rows, parts = m.rows(i.ins[0]), [m.zeros((0, x.shape[1]))]
    for sequence in range(rows.sequences):
        here = rows.of(sequence)
        part = m.take(x, here)
        if not len(here):
            parts.append(m.zeros((1, x.shape[1])))
        elif i["kind"] in ("first", "last"):
            parts.append(part[:1, :] if i["kind"] == "first" else part[-1:, :])
        else:
            reduce = m.xp.mean if i["kind"] == "mean" else m.xp.max
            parts.append(reduce(part, axis=0, keepdims=True))
    return m.xp.concat(parts, axis=0)


def log_softmax(xp: Any, x: Array) -> Array:
    x = x - xp.max(x, axis=-1, keepdims=True)
    return x - xp.log(xp.sum(xp.exp(x), axis=-1, keepdims=True))


def plain_softmax(xp: Any, x: Array) -> Array:
    weights = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def softmax(m: Scope, i: Instruction, x: Array) -> Array:
    parts = split(m.xp, x, i["groups"])
    return m.xp.reshape((log_softmax if i["log"] else plain_softmax)(m.xp, parts), x.shape)


def concat(m: Scope, i: Instruction, a: Array, b: Array) -> Array:
    return m.xp.concat([a, b], axis=1)


def lstm(m: Scope, i: Instruction, x: Array) -> Array:
    """Row after row of each sequence, from (h, c) of its slot, or zeros where position 0 is due."""
    xp, rows = m.xp, m.rows(i.ins[0])
    w_state = m.weights[i.weights[1]]
    hidden = w_state.shape[1]
    gates_in = product(m, i, x, m.weights[i.weights[0]])
    for name in (i["bias"], i["bias_k"]):
        gates_in = gates_in + m.row(name) if name else gates_in
    parts, indices = [m.zeros((0, hidden))], [np.empty(0, np.int64)]
    for sequence in range(rows.sequences):
        here = rows.of(sequence)
        if not len(here):
            continue
        order = here[::-1] if i["reverse"] else here
        h, c = m.recurrent_state(i.state, sequence, rows.positions[here[0]], hidden)
        for row in order:
            gates = gates_in[int(row) : int(row) + 1, :] + product(m, i, h, w_state)
            into, forget, new, out = (gates[:, g * hidden : (g + 1) * hidden] for g in range(4))
            c = sigmoid(xp, forget) * c + sigmoid(xp, into) * xp.tanh(new)
            h = sigmoid(xp, out) * xp.tanh(c)
            parts.append(h)
        indices.append(order)
        m.set_recurrent_state(i.state, sequence, h, c)
    return scatter(xp, parts, indices, x)


def route(m: Scope, i: Instruction, x: Array) -> tuple[Array, Array]:
    """Scores over all experts, then the best of them; among equals the lower number."""
    scores = m.xp.matmul(x, m.weights[i.weights[0]].T)
    p = sigmoid(m.xp, scores) if i["kind"] == "sigmoid" else plain_softmax(m.xp, scores)
    order = np.argsort(-m.numpy(p), axis=1, kind="stable")[:, : i["top"]]
    p = m.xp.take_along_axis(p, m.index(order), axis=1)
    if i["renorm"]:
        p = p / m.xp.sum(p, axis=1, keepdims=True)
    return p, m.ids(order)


def experts(m: Scope, i: Instruction, x: Array, p: Array, e: Array) -> Array:
    """act= rounds the rows before each of the three products. Only experts that were chosen run."""
    gate, up, down = (m.weights[name] for name in i.weights)
    ffn, width = gate.shape[0] // i["experts"], down.shape[0] // i["experts"]
    chosen = m.numpy(e)
    parts, indices = [m.zeros((0, width))], [np.empty(0, np.int64)]
    for expert in np.unique(chosen):
        rows, choice = np.nonzero(chosen == expert)
        here, there = slice(expert * ffn, (expert + 1) * ffn), slice(expert * width, None)
        part = m.take(x, rows)
        inner = ACTIVATIONS[i["kind"]](m, product(m, i, part, gate[here, :]))
        inner = inner * product(m, i, part, up[here, :])
        parts.append(product(m, i, inner, down[there, :][:width, :]))
        indices.append(rows * chosen.shape[1] + choice)
    # (rows, chosen, width): the sum runs in the order of the choices, whatever ran first
    outs = scatter(m.xp, parts, indices, m.zeros((chosen.size, 1)))
    outs = m.xp.reshape(outs, (*chosen.shape, width))
    return m.xp.sum(p[:, :, None] * outs, axis=1)


def sample(m: Scope, i: Instruction, logits: Array) -> Array:
    """On the host: the rule of array_sample.py, row by row."""
    rows, adjust = m.numpy(logits), m.batch.adjust
    if len(m.batch.sampling) != len(rows):
        raise ProgramError(
            f"sample {i.outs[0]}: {len(rows)} rows need as many sampling records, "
            f"not {len(m.batch.sampling)}"
        )
    tokens = [
        sample_row(x, m.batch.sampling[r], adjust[adjust["row"] == r]) for r, x in enumerate(rows)
    ]
    return m.ids(np.array(tokens, np.int64).reshape(-1, 1))


def loss(m: Scope, i: Instruction, y: Array, target: Array) -> Array:
    """Mean per sequence: over rows whose target counts, or over all elements; 0 where none does."""
    rows, parts = m.rows(i.ins[0]), [m.zeros((0,))]
    for sequence in range(rows.sequences):
        here = rows.of(sequence)
        if i["kind"] == "cross_entropy":
            wanted = m.numpy(target)[here, 0].astype(np.int64)
            here, wanted = here[wanted != i["ignore"]], wanted[wanted != i["ignore"]]
            losses = m.xp.take_along_axis(
                -log_softmax(m.xp, m.take(y, here)), m.index(wanted[:, None]), axis=1
            )
        else:
            difference = m.take(y, here) - m.take(target, here)
            losses = difference * difference
        parts.append(m.xp.reshape(m.xp.mean(losses) if len(here) else m.number(0), (1,)))
    return m.xp.concat(parts)[:, None]


def dropout(m: Scope, i: Instruction, x: Array) -> Array:
    """The machine's seed and the value's name give the mask: a span run twice repeats it."""
    if m.section != "train" or not i["p"]:
        return x
    random = np.random.default_rng([m.seed, zlib.crc32(i.outs[0].encode())])
    kept = random.random(tuple(x.shape)) >= i["p"]
    return x * m.floats(kept / (1 - i["p"]))


OPERATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (embed, norm, linear, rope, store, attend, act, binary, pick, pool, softmax, concat,
              lstm, route, experts, sample, loss, dropout)
}  # fmt: skip
