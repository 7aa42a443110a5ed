"""Attention of the array machine: the paged and frozen states, `store`, `attend`.

A state of attention is a pair of arrays (pages, page_size, heads, dim), for keys and for values;
position p of a sequence lies at offset p % page_size of the sequence's page number p // page_size.
"""

from __future__ import annotations

import math

import numpy as np

from lmclock.errors import ProgramError
from lmclock.isa import Instruction
from lmclock.machines.array_scope import Array, Scope, scatter, split


def store(m: Scope, i: Instruction, k: Array, v: Array) -> tuple[()]:
    """Writes the valid rows at their positions; rows of section `train` are only remembered."""
    if m.section == "train":
        m.fresh[str(i.state)] = (k, v, i.ins[0])
        return ()
    state, _ = m.program.state(str(i.state))
    rows = m.rows(i.ins[0])
    for sequence in range(rows.sequences):
        here = rows.of(sequence)
        page, offset = _addresses(m, state.name, sequence, rows.positions[here])
        for cache, x in zip(m.states[str(i.state)], (k, v), strict=True):
            part = m.rounded(split(m.xp, m.take(x, here), state.heads), state.format)
            cache[m.index(page), m.index(offset)] = part
    return ()


def _addresses(
    m: Scope, name: str, sequence: int, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(page, offset) of each position."""
    pages = np.asarray(m.batch.pages[name][sequence], np.int64)
    last = int(positions.max(initial=-1)) // m.capacity.page_size
    if last >= len(pages):
        raise ProgramError(
            f"sequence {sequence} reaches page {last} of its positions in state {name}, "
            f"but the batch gives it {len(pages)} pages"
        )
    return pages[positions // m.capacity.page_size], positions % m.capacity.page_size


def attend(m: Scope, i: Instruction, q: Array, *kv: Array) -> Array:
    """Rows see positions of their own sequence only; a row that sees nothing is zero."""
    heads, kv_heads = i["heads"], i["kv_heads"] or i["heads"]
    rows = m.rows(i.ins[0])
    parts, indices = [], []
    for sequence in range(rows.sequences):
        here = rows.of(sequence)
        if not len(here):
            continue
        at = rows.positions[here]
        k, v, positions = _visible(m, i, kv, sequence, at)
        if len(positions):
            queries = split(m.xp, m.take(q, here), heads)
            parts.append(_attend_rows(m, i, queries, k, v, at, positions))
            indices.append(here)
    if not parts:
        width = kv[1].shape[1] // kv_heads if kv else m.program.state(str(i.state))[0].value
        return m.zeros((len(rows), heads * width))
    return scatter(m.xp, parts, indices, q)


def _visible(
    m: Scope, i: Instruction, kv: tuple[Array, ...], sequence: int, at: np.ndarray
) -> tuple[Array, Array, np.ndarray]:
    """Keys and values (length, heads, dim) of one sequence, and their positions."""
    space = i.ins[1] if kv else None
    if m.section == "train" and i.state:
        *kv, space = m.fresh[i.state]  # type: ignore[assignment]
    if space:
        rows = m.rows(space)
        there = rows.of(sequence)
        k, v = (split(m.xp, m.take(x, there), i["kv_heads"] or i["heads"]) for x in kv)
        return k, v, rows.positions[there]
    state, _ = m.program.state(str(i.state))
    frozen = state.kind == "frozen"
    length = int(m.batch.lengths[state.name][sequence]) if frozen else int(at.max()) + 1
    positions = np.arange(length)
    page, offset = (m.index(a) for a in _addresses(m, state.name, sequence, positions))
    k, v = (cache[page, offset] for cache in m.states[str(i.state)])
    return k, v, positions


def _attend_rows(
    m: Scope,
    i: Instruction,
    q: Array,
    k: Array,
    v: Array,
    at: np.ndarray,
    positions: np.ndarray,
) -> Array:
    """q (rows, heads, key), k and v (length, kv_heads, dim) to (rows, heads x value).

    `at` and `positions` say where queries and keys stand. Query head h reads key head
    h // (heads / kv_heads).
    """
    xp = m.xp
    rows, heads, key = q.shape
    length, kv_heads, _ = k.shape
    group = heads // kv_heads
    # (kv_heads, group x rows, key) @ (kv_heads, key, length): one product for each key head
    q = xp.reshape(xp.permute_dims(q, (1, 0, 2)), (kv_heads, group * rows, key))
    scores = xp.matmul(q, xp.permute_dims(k, (1, 2, 0))) * (i["qk_scale"] or 1 / math.sqrt(key))
    if i["softcap"]:
        scores = i["softcap"] * xp.tanh(scores / i["softcap"])
    scores = xp.reshape(scores, (heads, rows, length))
    distance = positions[None, :] - at[:, None]  # (rows, length): how far ahead the key stands
    if i["rel_bias"]:
        scores = scores + _position_bias(m, i, distance)
    weights = xp.reshape(_masked_softmax(m, i, scores, distance), (kv_heads, group * rows, length))
    y = xp.reshape(xp.matmul(weights, xp.permute_dims(v, (1, 0, 2))), (heads, rows, -1))
    return xp.reshape(xp.permute_dims(y, (1, 0, 2)), (rows, -1))


def _masked_softmax(m: Scope, i: Instruction, scores: Array, distance: np.ndarray) -> Array:
    """Softmax over the last axis of (heads, rows, length); a row that sees nothing is zero."""
    xp = m.xp
    visible = np.ones(distance.shape, bool)
    if i["mask"] == "causal":
        visible &= distance <= 0
    if i["window"]:
        visible &= distance > -i["window"]
    scores = xp.where(m.index(visible), scores, m.number(-math.inf))
    peak = xp.max(scores, axis=-1, keepdims=True)
    weights = xp.exp(scores - xp.where(peak == -math.inf, m.number(0), peak))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total == 0, m.number(1), total)


def _position_bias(m: Scope, i: Instruction, distance: np.ndarray) -> Array:
    """(heads, rows, length): the learned bias of each key's bucket."""
    table = m.weights[i["rel_bias"]]
    buckets = position_buckets(
        distance, table.shape[0], i["max_distance"], both_ways=i["mask"] == "full"
    )
    bias = m.take(table, buckets.reshape(-1))
    return m.xp.permute_dims(m.xp.reshape(bias, (*distance.shape, -1)), (2, 0, 1))


def position_buckets(
    distance: np.ndarray, buckets: int, max_distance: int, both_ways: bool
) -> np.ndarray:
    """T5's rule: key position minus query position to a bucket (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one small distance each, the other half share the distances up to
    `max_distance` on a logarithmic scale, and everything beyond it falls in the last. With
    `both_ways`, keys ahead of the query use the upper half of all buckets.
    """
    offset = np.zeros_like(distance)
    if both_ways:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        back = np.abs(distance)
    else:
        back = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 as in the published models: distances on the border of two buckets must fall alike
    ratio = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + scaled.astype(np.int64), buckets - 1)
    return offset + np.where(back < exact, back, far)
