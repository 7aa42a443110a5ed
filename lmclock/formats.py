"""Number formats of stored weights and caches: name, GGUF type number, block layout, decoders.

A format stores a row of numbers as blocks of `block` elements in `bytes` bytes each; a row's width
must be a multiple of `block`. Layouts are those of GGUF (ggml), little-endian. `unpack` reads every
format and is exact; `packing.py` is the other direction. `round_q8_32` is the rounding of
activations that a program asks for with `act=q8_32`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmclock.errors import UnsupportedError, choices

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Format:
    """One number format. `code` is the GGUF type number, also used by the native machine."""

    name: str
    code: int
    block: int  # elements per block
    bytes: int  # bytes per block, scales included

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of `width` elements; ValueError when the width splits a block."""
        if width % self.block:
            message = f"width {width} is not a multiple of the {self.name} block, {self.block}"
            raise ValueError(message)
        return width // self.block * self.bytes


FORMATS: dict[str, Format] = {
    row[0]: Format(*row)
    for row in (
        ("f32", 0, 1, 4),
        ("f16", 1, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q4_1", 3, 32, 20),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q8_0", 8, 32, 34),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("bf16", 30, 1, 2),
    )
}
BY_CODE: dict[int, Format] = {f.code: f for f in FORMATS.values()}


def get_format(name: str) -> Format:
    """The format called `name`; UnsupportedError names the valid ones."""
    if name not in FORMATS:
        message = f"number format {name!r} is not supported; valid: {choices(FORMATS)}"
        raise UnsupportedError(message)
    return FORMATS[name]


# Where the float16 scales of a block lie, in 16-bit words: they decide whether it is finite.
SCALE_WORDS: dict[str, tuple[int, ...]] = {
    "q4_0": (0,),
    "q4_1": (0, 1),
    "q5_0": (0,),
    "q5_1": (0, 1),
    "q8_0": (0,),
    "q2_k": (40, 41),
    "q3_k": (54,),
    "q4_k": (0, 1),
    "q5_k": (0, 1),
    "q6_k": (104,),
}
SMALLEST_NORMAL = 2.0**-126  # of float32
ELEMENTS_AT_ONCE = 1 << 18  # bounds the temporaries of unpack, and keeps them in cache


def unpack(fmt: Format, data: Any, rows: int, width: int) -> Array:
    """The `rows * width` stored numbers as float32 `(rows, width)`; a copy, native byte order.

    `data` is a uint8 array or bytes-like of exactly `rows * fmt.row_bytes(width)` bytes. Products
    and sums are rounded to float32 one by one in ggml's order, so that decoders agree bit for bit.
    """
    row_bytes = fmt.row_bytes(width)
    raw = np.frombuffer(data, np.uint8)
    if raw.size != rows * row_bytes:
        raise ValueError(
            f"{rows} rows of {width} {fmt.name} take {rows * row_bytes} bytes, not {raw.size}"
        )
    decode = _DECODERS.get(fmt.name)
    if decode is None:
        raise UnsupportedError(
            f"number format {fmt.name!r} is not supported; valid: {choices(FORMATS)}"
        )
    blocks = raw.reshape(-1, fmt.bytes)
    out = np.empty((len(blocks), fmt.block), np.float32)
    step = max(1, ELEMENTS_AT_ONCE // fmt.block)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinite scales stay what they are
        for first in range(0, len(blocks), step):
            out[first : first + step] = decode(blocks[first : first + step])
    return out.reshape(rows, width)


def first_bad_block(fmt: Format, data: Any) -> int | None:
    """The first block with a NaN or infinity in it, or None; only scales are read where it has any.

    `data` is what `unpack` takes.
    """
    raw = np.frombuffer(data, np.uint8)
    if fmt.name == "f32":
        columns, exponent = [raw.view("<u4")], 0x7F800000
    elif fmt.name in ("f16", "bf16"):
        columns, exponent = [raw.view("<u2")], 0x7C00 if fmt.name == "f16" else 0x7F80
    else:
        words = raw.view("<u2").reshape(-1, fmt.bytes // 2)
        columns, exponent = [words[:, at] for at in SCALE_WORDS[fmt.name]], 0x7C00
    bad = None
    for column in columns:
        for first in range(0, len(column), ELEMENTS_AT_ONCE):
            hits = (column[first : first + ELEMENTS_AT_ONCE] & exponent) == exponent
            if hits.any():
                found = first + int(hits.argmax())
                bad = found if bad is None else min(bad, found)
                break
    return bad


def round_q8_32(x: Any, xp: Any = np) -> Any:
    """Float32 activations `(..., width)` rounded to int8 per 32 of the last axis, as float32 again.

    Per block: d = amax / 127, q = x * (1 / d) rounded half to even, result d * q; every step is one
    float32 operation, so that a C++ machine can repeat it bit for bit. A d below the smallest
    normal float32 may have no finite reciprocal: such a block, like one of zeros, becomes zeros.
    A block with a NaN or infinity becomes NaN. `xp` is the array namespace of `x`: numpy, or torch
    through array_api_compat.
    """
    width = x.shape[-1]
    if width % 32:
        raise ValueError(f"width {width} is not a multiple of 32, the block of activation rounding")
    blocks = xp.reshape(x, (*x.shape[:-1], width // 32, 32))
    amax = xp.max(xp.abs(blocks), axis=-1, keepdims=True)
    # The divisor is an array: torch on CUDA multiplies by the reciprocal of a Python number.
    d = amax / xp.full_like(amax, 127.0)
    normal = d >= SMALLEST_NORMAL
    one = xp.ones_like(d)
    inverse = xp.where(normal, one / xp.where(normal, d, one), xp.zeros_like(d))
    return xp.reshape(d * xp.round(blocks * inverse), x.shape)


def _half(blocks: Array, at: int) -> Array:
    """The float16 at byte `at` of every block, as float32 `(blocks, 1)`."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(qs: Array) -> Array:
    """Bytes `(n, k)` to `(n, 2, k)`: low nibbles, then high nibbles."""
    return np.stack((qs & 15, qs >> 4), axis=1)


def _bits(qs: Array, width: int) -> Array:
    """Bytes `(n, k)` to `(n, 8 / width, k)`: fields of `width` bits, the lowest first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, -1, 1)
    return (qs[:, None, :] >> shifts) & np.uint8((1 << width) - 1)


def _decode_f32(blocks: Array) -> Array:
    return blocks.view("<f4").astype(np.float32)


def _decode_f16(blocks: Array) -> Array:
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks: Array) -> Array:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_q8_0(blocks: Array) -> Array:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _decode_q4_0(blocks: Array) -> Array:
    q = _nibbles(blocks[:, 2:]).reshape(-1, 32)
    return _half(blocks, 0) * (q.astype(np.float32) - 8)


def _decode_q4_1(blocks: Array) -> Array:
    q = _nibbles(blocks[:, 4:]).reshape(-1, 32)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _five_bits(high: Array, qs: Array) -> Array:
    """Nibble i of `qs` `(n, 16)` under bit i of the word `high` `(n, 4)`, as float32 `(n, 32)`."""
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return (_nibbles(qs).reshape(-1, 32) | (fifth << 4)).astype(np.float32)


def _decode_q5_0(blocks: Array) -> Array:
    return _half(blocks, 0) * (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - 16)


def _decode_q5_1(blocks: Array) -> Array:
    return _half(blocks, 0) * _five_bits(blocks[:, 4:8], blocks[:, 8:]) + _half(blocks, 2)


def _grouped(values: Array, groups: int) -> Array:
    """Quantised values of 256-element blocks as float32 `(n, groups, 256 / groups)`."""
    return values.reshape(-1, groups, 256 // groups).astype(np.float32)


def _decode_q2_k(blocks: Array) -> Array:
    """16 groups of 16: bytes of a 4-bit scale below a 4-bit minimum, 64 bytes of pairs, d, dmin."""
    scale = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    q = _grouped(_bits(blocks[:, 16:80].reshape(-1, 32), 2), 16)
    return (scale[:, :, None] * q - minimum[:, :, None]).reshape(-1, 256)


def _decode_q3_k(blocks: Array) -> Array:
    """16 groups of 16: 32 bytes of third bits, 64 of pairs, 12 of scales, d; levels are -4 to 3."""
    third = _bits(blocks[:, :32], 1).reshape(-1, 256)
    low = _bits(blocks[:, 32:96].reshape(-1, 32), 2).reshape(-1, 256)
    q = _grouped(low.astype(np.int8) + (third << 2).astype(np.int8) - 4, 16)
    # Scale k: nibble k of the first 8 bytes under pair k of the last 4, minus 32.
    nibbles = _nibbles(blocks[:, 96:104]).reshape(-1, 16)
    pairs = _bits(blocks[:, 104:108], 2).reshape(-1, 16)
    scale = _half(blocks, 108) * ((nibbles | (pairs << 4)).astype(np.float32) - 32)
    return (scale[:, :, None] * q).reshape(-1, 256)


def _scales_6_bit(packed: Array) -> tuple[Array, Array]:
    """The 12 bytes of Q4_K and Q5_K: 8 scales and 8 minimums of 6 bits, float32 `(n, 8)` each.

    The first four of each are whole in bytes 0-3 and 4-7; the last four have their low nibbles in
    bytes 8-11 (scale below minimum) and their high pairs on top of the first four.
    """
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate((first & 63, (last & 15) | ((first >> 6) << 4)), axis=1)
    minimum = np.concatenate((second & 63, (last >> 4) | ((second >> 6) << 4)), axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _decode_q4_k(blocks: Array, fifth: Array | None = None) -> Array:
    """8 groups of 32: d, dmin, 12 bytes of scales, then 32 bytes for every two groups."""
    scale, minimum = _scales_6_bit(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0) * scale, _half(blocks, 2) * minimum
    q = _nibbles(blocks[:, -128:].reshape(-1, 32)).reshape(-1, 256)
    q = _grouped(q if fifth is None else q | (fifth << 4), 8)
    return (scale[:, :, None] * q - minimum[:, :, None]).reshape(-1, 256)


def _decode_q5_k(blocks: Array) -> Array:
    """Q4_K with 32 bytes more: bit g of byte i is the fifth bit of element i of group g."""
    return _decode_q4_k(blocks, _bits(blocks[:, 16:48], 1).reshape(-1, 256))


def _decode_q6_k(blocks: Array) -> Array:
    """16 groups of 16: two halves of 64 bytes of nibbles, two of 32 of pairs, int8 scales, d."""
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    high = _bits(blocks[:, 128:192].reshape(-1, 32), 2).reshape(-1, 256)
    q = _grouped((low | (high << 4)).astype(np.int8) - 32, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * q).reshape(-1, 256)


_DECODERS: dict[str, Callable[[Array], Array]] = {
    "f32": _decode_f32,
    "f16": _decode_f16,
    "q4_0": _decode_q4_0,
    "q4_1": _decode_q4_1,
    "q5_0": _decode_q5_0,
    "q5_1": _decode_q5_1,
    "q8_0": _decode_q8_0,
    "q2_k": _decode_q2_k,
    "q3_k": _decode_q3_k,
    "q4_k": _decode_q4_k,
    "q5_k": _decode_q5_k,
    "q6_k": _decode_q6_k,
    "bf16": _decode_bf16,
}
