"""Float32 numbers rounded to a number format: for tests, converters and the `quantize` pass.

Each value goes to the nearest one its stored scale allows. K-quants are read, never written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lmclock.errors import UnsupportedError, choices
from lmclock.formats import ELEMENTS_AT_ONCE, Array, Format, first_bad_block, unpack


def pack(fmt: Format, values: Any) -> Array:
    """float32 `(rows, width)` rounded to `fmt`: uint8 `(rows, fmt.row_bytes(width))`.

    UnsupportedError where the format cannot hold the numbers: K-quants (read only), NaN or infinity
    in a block format, a finite number that would become infinite.
    """
    encode = _ENCODERS.get(fmt.name)
    if encode is None:
        raise UnsupportedError(
            f"numbers cannot be stored as {fmt.name}; valid: {choices(_ENCODERS)}"
        )
    numbers = np.ascontiguousarray(values, np.float32)
    rows, width = numbers.shape
    out = np.empty((rows, fmt.row_bytes(width)), np.uint8)
    blocks, target = numbers.reshape(-1, fmt.block), out.reshape(-1, fmt.bytes)
    step = max(1, ELEMENTS_AT_ONCE // fmt.block)
    for first in range(0, len(blocks), step):
        some = blocks[first : first + step]
        with np.errstate(over="ignore", invalid="ignore"):
            target[first : first + step] = encode(some)
        if _lost(fmt, some, target[first : first + step]):
            peak = float(np.abs(some).max())
            raise UnsupportedError(f"a value of magnitude {peak:g} cannot be stored as {fmt.name}")
    return out


def _lost(fmt: Format, blocks: Array, packed: Array) -> bool:
    """Whether a scale, or a number that was finite, is so no more."""
    if fmt.block > 1:
        return first_bad_block(fmt, packed) is not None
    if first_bad_block(fmt, packed) is None:
        return False
    return not np.array_equal(np.isfinite(blocks), np.isfinite(unpack(fmt, packed, len(packed), 1)))


def _encode_f32(x: Array) -> Array:
    return x.astype("<f4").view(np.uint8)


def _encode_f16(x: Array) -> Array:
    return x.astype("<f2").view(np.uint8)


def _encode_bf16(x: Array) -> Array:
    """Half to even on the bits; NaN keeps its upper half, quiet, lest it round to infinity."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2").view(np.uint8)


def _halves(*scales: Array) -> tuple[Array, list[Array]]:
    """Float32 scales `(n, 1)` as float16 bytes `(n, 2 * len)`, and as the float32 these mean."""
    stored = [scale.astype("<f2") for scale in scales]
    packed = np.concatenate([scale.view(np.uint8) for scale in stored], axis=1)
    return packed, [scale.astype(np.float32) for scale in stored]


def _levels(x: Array, d: Array, low: int, high: int) -> Array:
    """`x / d` rounded half to even and clipped to the levels; 0 where the stored scale is 0."""
    usable = d != 0
    q = np.where(usable, x / np.where(usable, d, 1), 0)
    return np.clip(np.rint(q), low, high).astype(np.int32)


def _join_nibbles(q: Array) -> Array:
    """The low 4 bits of levels `(n, 32)` as bytes `(n, 16)`: element i below element 16 + i."""
    low = (q & 15).astype(np.uint8)
    return low[:, :16] | (low[:, 16:] << 4)


def _fifth_bits(q: Array) -> Array:
    return np.packbits((q >> 4).astype(np.uint8), axis=1, bitorder="little")


def _symmetric(x: Array, levels: int) -> tuple[Array, Array]:
    """Scale bytes and levels 0..2 `levels` - 1; the largest magnitude gets level 0, the far end."""
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scales, (d,) = _halves(peak / -levels)
    return scales, _levels(x, d, -levels, levels - 1) + levels


def _from_minimum(x: Array, top: int) -> tuple[Array, Array]:
    """Scale and minimum bytes, and levels 0..`top` above the minimum."""
    least, most = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    scales, (d, m) = _halves((most - least) / top, least)
    return scales, _levels(x - m, d, 0, top)


def _encode_q8_0(x: Array) -> Array:
    scales, (d,) = _halves(np.abs(x).max(axis=1, keepdims=True) / 127)
    q = _levels(x, d, -127, 127).astype(np.int8)
    return np.concatenate((scales, q.view(np.uint8)), axis=1)


def _encode_q4_0(x: Array) -> Array:
    scales, q = _symmetric(x, 8)
    return np.concatenate((scales, _join_nibbles(q)), axis=1)


def _encode_q4_1(x: Array) -> Array:
    scales, q = _from_minimum(x, 15)
    return np.concatenate((scales, _join_nibbles(q)), axis=1)


def _encode_q5_0(x: Array) -> Array:
    scales, q = _symmetric(x, 16)
    return np.concatenate((scales, _fifth_bits(q), _join_nibbles(q)), axis=1)


def _encode_q5_1(x: Array) -> Array:
    scales, q = _from_minimum(x, 31)
    return np.concatenate((scales, _fifth_bits(q), _join_nibbles(q)), axis=1)


_ENCODERS: dict[str, Callable[[Array], Array]] = {
    "f32": _encode_f32,
    "f16": _encode_f16,
    "q4_0": _encode_q4_0,
    "q4_1": _encode_q4_1,
    "q5_0": _encode_q5_0,
    "q5_1": _encode_q5_1,
    "q8_0": _encode_q8_0,
    "bf16": _encode_bf16,
}
