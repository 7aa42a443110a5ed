"""Number formats: decoders against the `gguf` package, bounds on packing, activation rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from array_api_compat import torch as xp_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmclock.errors import UnsupportedError
from lmclock.formats import (
    ELEMENTS_AT_ONCE,
    FORMATS,
    SCALE_WORDS,
    Format,
    first_bad_block,
    get_format,
    round_q8_32,
    unpack,
)
from lmclock.packing import pack

PACKED = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
# Levels between the smallest and the largest value a block can hold.
STEPS = {"q8_0": 254, "q4_0": 15, "q4_1": 15, "q5_0": 31, "q5_1": 31}


def random_blocks(fmt: Format, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Random bytes `(rows, row_bytes)` with finite scales, subnormal and negative ones too."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, rows * fmt.row_bytes(width), np.uint8)
    blocks = raw.reshape(-1, fmt.bytes)
    if fmt.name == "f32":
        blocks.view("<u4")[...] &= 0xBFFFFFFF
    elif fmt.name in ("f16", "bf16"):
        blocks.view("<u2")[...] &= 0xBFFF
    for word in SCALE_WORDS.get(fmt.name, ()):
        blocks.view("<u2")[:, word] &= 0xBFFF
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", FORMATS)
def test_unpack_equals_the_gguf_package(name: str) -> None:
    fmt = FORMATS[name]
    raw = random_blocks(fmt, 7, 3 * 256)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(fmt.code))
    got = unpack(fmt, raw.reshape(-1), 7, 3 * 256)
    assert got.shape == (7, 3 * 256) and got.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got.view(np.uint32), expected.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_table_agrees_with_the_gguf_package(name: str) -> None:
    fmt = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(fmt.code)] == (fmt.block, fmt.bytes)


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "f16"])
def test_unpack_in_pieces_equals_row_by_row(name: str) -> None:
    fmt = FORMATS[name]
    width = 256
    rows = ELEMENTS_AT_ONCE // width + 3
    raw = random_blocks(fmt, rows, width)
    whole = unpack(fmt, raw, rows, width)
    for row in (0, 1, rows - 4, rows - 1):
        np.testing.assert_array_equal(whole[row : row + 1], unpack(fmt, raw[row], 1, width))


def test_unpack_takes_bytes_and_checks_their_number() -> None:
    q8 = get_format("q8_0")
    assert unpack(q8, bytes(68), 2, 32).tolist() == [[0.0] * 32] * 2
    assert unpack(q8, b"", 0, 32).shape == (0, 32)
    with pytest.raises(ValueError, match="take 68 bytes, not 67"):
        unpack(q8, bytes(67), 2, 32)
    with pytest.raises(ValueError, match="33 is not a multiple"):
        unpack(q8, bytes(68), 2, 33)
    with pytest.raises(UnsupportedError, match=r"'i64' is not supported; valid: f32, f16"):
        unpack(Format("i64", 27, 1, 8), bytes(8), 1, 1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
def test_infinite_and_nan_scales_are_found(name: str, bits: int) -> None:
    fmt = FORMATS[name]
    raw = random_blocks(fmt, 5, 256)
    assert first_bad_block(fmt, raw.reshape(-1)) is None
    blocks = raw.reshape(-1, fmt.bytes)
    bad = len(blocks) - 2
    for word in SCALE_WORDS.get(fmt.name, (0,)):
        damaged = blocks.copy()
        if name == "f32":
            damaged.view("<f4")[bad] = np.uint16(bits).view(np.float16)
        else:
            damaged.view("<u2")[bad, word] = bits if name != "bf16" else 0x7F80
        assert first_bad_block(fmt, damaged.reshape(-1)) == bad
        assert not np.isfinite(unpack(fmt, damaged, 5, 256)).all()


@pytest.mark.parametrize("name", STEPS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_packing_error_is_bounded_by_the_step(name: str, data: st.DataObject) -> None:
    fmt = FORMATS[name]
    x = data.draw(arrays(np.float32, (2, 64), elements=st.floats(-1000, 1000, width=32)))
    got = unpack(fmt, pack(fmt, x), 2, 64)
    blocks = x.reshape(-1, 32)
    error = np.abs(got.reshape(-1, 32).astype(np.float64) - blocks)
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    reach = np.abs(blocks).max(axis=1).astype(np.float64)
    spread = high - low if name in ("q4_1", "q5_1") else 2 * reach
    # Half a step; a whole one where a symmetric format lacks a level. Then the float16 scales.
    steps = 1.1 if name in ("q4_0", "q5_0") else 0.51
    bound = spread / STEPS[name] * steps + reach * 2**-9 + 2e-5
    assert (error.max(axis=1) <= bound).all()


@pytest.mark.parametrize("name", STEPS)
def test_packing_is_as_good_as_the_gguf_package(name: str) -> None:
    fmt = FORMATS[name]
    x = np.random.default_rng(5).standard_normal((64, 256), np.float32)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(fmt.code))
    ours = pack(fmt, x)
    assert ours.shape == theirs.shape
    loss = [np.square(unpack(fmt, raw, 64, 256) - x).mean() for raw in (ours, theirs)]
    assert loss[0] <= loss[1] * 1.0001


@pytest.mark.parametrize("name", PACKED)
def test_packing_zeros_and_lone_values(name: str) -> None:
    fmt = FORMATS[name]
    x = np.zeros((3, 32), np.float32)
    x[1, 3] = -2.0
    x[2, 30:] = (5e-8, -3e-9)  # below what a float16 scale resolves
    got = unpack(fmt, pack(fmt, x), 3, 32)
    assert not got[0].any()
    np.testing.assert_allclose(got[1:], x[1:], atol=1e-3)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_formats_round_to_nearest_even_and_keep_nan(name: str) -> None:
    fmt = FORMATS[name]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 999), np.float32)
    x[0, :4] = (np.nan, np.inf, -np.inf, -0.0)
    torch_type = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[name]
    expected = xp_torch.asarray(x).to(getattr(xp_torch, torch_type)).to(xp_torch.float32).numpy()
    np.testing.assert_array_equal(unpack(fmt, pack(fmt, x), 3, 999), expected)


def test_packing_refuses_what_a_format_cannot_hold() -> None:
    x = np.zeros((1, 32), np.float32)
    too_large = {"f16": 1e5, "bf16": 3.4e38, "q8_0": 1e8, "q4_1": 1e6, "q4_0": -1e7}
    for name, value in too_large.items():
        x[0, 5] = value
        with pytest.raises(UnsupportedError, match=f"magnitude .* cannot be stored as {name}"):
            pack(FORMATS[name], x)
    for value in (np.nan, np.inf):
        x[0, 5] = value
        for name in STEPS:
            with pytest.raises(UnsupportedError, match=f"magnitude .* cannot be stored as {name}"):
                pack(FORMATS[name], x)
    with pytest.raises(UnsupportedError, match="cannot be stored as q4_k; valid: f32"):
        pack(FORMATS["q4_k"], np.zeros((1, 256), np.float32))


def rounded_plainly(x: np.ndarray) -> np.ndarray:
    """The definition of activation rounding, one element at a time."""
    out = np.empty_like(x)
    for at in range(0, x.size, 32):
        block = x.flat[at : at + 32]
        d = np.float32(np.abs(block).max() / np.float32(127))
        inverse = np.float32(1) / d if d >= np.float32(2.0**-126) else np.float32(0)
        for k, value in enumerate(block):
            out.flat[at + k] = d * np.rint(np.float32(value * inverse))
    return out


@given(
    arrays(
        np.float32,
        (2, 3, 64),
        elements=st.one_of(
            st.floats(-50, 50, width=32), st.floats(-(2.0**-100), 2.0**-100, width=32)
        ),
    )
)
@settings(max_examples=60, deadline=None)
def test_activation_rounding_is_its_definition_in_numpy_and_torch(x: np.ndarray) -> None:
    expected = rounded_plainly(x)
    np.testing.assert_array_equal(round_q8_32(x), expected)
    np.testing.assert_array_equal(round_q8_32(xp_torch.asarray(x), xp_torch).numpy(), expected)


def test_activation_rounding_at_the_edges() -> None:
    x = np.zeros((5, 32), np.float32)
    x[0, 0] = 127.0
    x[0, 1:4] = (0.5, 1.5, 2.5)  # half to even
    x[1, 0] = np.float32(1e-42)
    x[2, 3] = np.nan
    x[3, 4] = np.inf
    x[4, :2] = (3e38, -1e38)
    with np.errstate(all="ignore"):
        got = round_q8_32(x)
    assert got.dtype == np.float32
    assert got[0, :4].tolist() == [127.0, 0.0, 2.0, 2.0]
    assert not got[1].any()
    assert np.isnan(got[2]).all() and np.isnan(got[3]).all()
    assert np.isfinite(got[4]).all() and abs(got[4, 1] + 1e38) < 2e36
    with pytest.raises(ValueError, match="33 is not a multiple of 32"):
        round_q8_32(np.zeros((2, 33), np.float32))
