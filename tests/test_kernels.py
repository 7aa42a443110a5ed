"""The matmul kernels alone: every format, activation rounding and SIMD path against float64.

Reference weights are `formats.unpack`, reference activations `formats.round_q8_32` or bf16 rounding
in numpy. Beside the error bound, bits are compared: rows alone and together, split over threads,
and between paths.
"""

from __future__ import annotations

import numpy as np
import pytest

from lmclock import _native
from lmclock.formats import FORMATS, SCALE_WORDS, Format, round_q8_32, unpack
from tests.helpers import arithmetic_error

PATHS = [*_native.simd_paths(), *_native.emulated_paths()]
ACTS = ("none", "q8_32", "bf16")
ROWS = (1, 2, 3, 15, 16, 17)
MOST_ROWS = 33
OUTPUTS = (1, 15, 16, 17, 100)
TOLERANCE = 1e-11  # the product promises 1e-7; sums of f32 products are far better

each_path = pytest.mark.parametrize("path", PATHS)
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
each_act = pytest.mark.parametrize("act", ACTS)


def random_weights(fmt: Format, outputs: int, width: int, seed: int = 0) -> np.ndarray:
    """Valid bytes (outputs, row bytes): random levels, finite scales; plain numbers for floats."""
    rng = np.random.default_rng([fmt.code, outputs, width, seed])
    if fmt.block == 1:
        values = rng.normal(size=(outputs, width)).astype(np.float32)
        if fmt.name == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if fmt.name == "f16" else np.float32).view(np.uint8)
    raw = rng.integers(0, 256, (outputs, fmt.row_bytes(width)), np.uint8)
    words = raw.reshape(-1, fmt.bytes).view("<f2")
    for word in SCALE_WORDS[fmt.name]:
        words[:, word] = rng.normal(size=len(words)) * 0.02
    return raw


def packed(fmt: Format, outputs: int, width: int, path: str | None = None) -> _native.Packed:
    raw = random_weights(fmt, outputs, width)
    return _native.pack(fmt.code, outputs, width, raw.reshape(-1), path=path)


def values(fmt: Format, outputs: int, width: int) -> np.ndarray:
    return unpack(fmt, random_weights(fmt, outputs, width), outputs, width)


def activations(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([rows, width, seed]).normal(size=(rows, width)).astype(np.float32)


# Whether this processor keeps rows that were rounded to bf16 in f32.
WIDE_BF16 = _native.round_records(np.zeros((1, 480), np.float32), "bf16").shape[1] >= 4 * 480


def rounded(x: np.ndarray, act: str) -> np.ndarray:
    """What an activation kind makes of x, as float32."""
    if act == "q8_32":
        return round_q8_32(x)
    if act == "bf16":
        bits = x.view(np.uint32)
        nearest_even = bits + 0x7FFF + (bits >> 16 & 1)
        return (nearest_even & np.uint32(0xFFFF0000)).view(np.float32)
    return x


def widths(fmt: Format, act: str) -> tuple[int, ...]:
    """One block, several, odd counts; widths off every lane multiple where the format allows."""
    if fmt.block == 256:
        return (256, 768)
    if fmt.block == 32 or act == "q8_32":
        return (32, 96, 576)
    return (1, 7, 33, 320)


@each_path
@each_format
@each_act
def test_linear_is_the_matrix_product(path: str, fmt: Format, act: str) -> None:
    for width in widths(fmt, act):
        x = activations(MOST_ROWS, width)
        exact = rounded(x, act).astype(np.float64)
        for outputs in OUTPUTS:
            w = packed(fmt, outputs, width, path)
            y = _native.linear(w, x, act)
            reference = exact @ values(fmt, outputs, width).astype(np.float64).T
            assert y.shape == reference.shape
            assert arithmetic_error(y, reference) <= TOLERANCE


@each_path
@each_format
@each_act
def test_bits_of_a_row_depend_on_no_other_row(path: str, fmt: Format, act: str) -> None:
    width, outputs = widths(fmt, act)[-1], 37
    w, x = packed(fmt, outputs, width, path), activations(MOST_ROWS, width)
    together = _native.linear(w, x, act)
    for rows in ROWS:
        assert np.array_equal(_native.linear(w, x[:rows], act), together[:rows])
        assert np.array_equal(_native.linear(w, x[rows:], act), together[rows:])
    for threads in (2, 3, 5):
        assert np.array_equal(_native.linear(w, x, act, threads=threads), together)


@each_path
@pytest.mark.parametrize("name", ("q4_1", "q4_k", "q6_k", "q2_k", "bf16"))
def test_many_rows_of_a_long_width(path: str, name: str) -> None:
    """More rows than a many-row kernel takes at once, more of k than it expands at once."""
    fmt, act, width = FORMATS[name], "bf16" if name == "bf16" else "q8_32", 2304
    w, x = packed(fmt, 21, width, path), activations(150, width)
    y = _native.linear(w, x, act)
    assert np.array_equal(y[11:86], _native.linear(w, x[11:86], act))
    reference = rounded(x, act).astype(np.float64) @ values(fmt, 21, width).astype(np.float64).T
    assert arithmetic_error(y, reference) <= TOLERANCE


@each_path
@pytest.mark.parametrize("wide", (False, True))
def test_bf16_rows_as_pairs_and_in_f32(path: str, wide: bool) -> None:
    """Whichever this processor would take."""
    before = _native.set_wide_bf16(wide)
    try:
        test_many_rows_of_a_long_width(path, "bf16")
    finally:
        _native.set_wide_bf16(before)


@each_format
@each_act
def test_paths_agree_bit_for_bit(fmt: Format, act: str) -> None:
    if fmt.name == "bf16" and act == "bf16" and not WIDE_BF16:
        pytest.skip("AVX-512 has an instruction for pairs of bf16 with a rounding of its own")
    width, outputs = widths(fmt, act)[-1], 37
    x = activations(MOST_ROWS, width)
    results = [_native.linear(packed(fmt, outputs, width, path), x, act) for path in PATHS]
    for other in results[1:]:
        assert np.array_equal(other, results[0])


@each_path
def test_no_rows_no_outputs(path: str) -> None:
    fmt = FORMATS["q4_1"]
    assert _native.linear(packed(fmt, 5, 64, path), activations(0, 64), "q8_32").shape == (0, 5)
    assert _native.linear(packed(fmt, 0, 64, path), activations(3, 64), "q8_32").shape == (3, 0)


@each_path
def test_bias_comes_before_add(path: str) -> None:
    rng = np.random.default_rng(1)
    w, x = packed(FORMATS["q4_1"], 37, 96, path), activations(19, 96)
    bias = rng.normal(size=37).astype(np.float32)
    add = rng.normal(size=(19, 37)).astype(np.float32)
    plain = _native.linear(w, x, "q8_32")
    assert np.array_equal(_native.linear(w, x, "q8_32", bias=bias), plain + bias)
    assert np.array_equal(_native.linear(w, x, "q8_32", add=add), plain + add)
    assert np.array_equal(_native.linear(w, x, "q8_32", bias=bias, add=add), plain + bias + add)


@each_path
@pytest.mark.parametrize("kind", ("silu", "gelu_tanh", "gelu", "relu"))
def test_glu_is_the_activated_gate_times_up(path: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    fmt, outputs, width = FORMATS["q8_0"], 37, 96
    gate, up = packed(fmt, outputs, width, path), packed(FORMATS["q4_1"], outputs, width, path)
    biases = rng.normal(size=(2, outputs)).astype(np.float32)
    x = activations(19, width)
    g = _native.linear(gate, x, "q8_32", bias=biases[0])
    u = _native.linear(up, x, "q8_32", bias=biases[1])
    y = _native.glu(gate, up, x, "q8_32", kind, gate_bias=biases[0], up_bias=biases[1])
    activated = _native.apply(kind, g.reshape(-1), path).reshape(g.shape)
    assert np.array_equal(y, activated * u)
    for rows in (1, 2, 7):
        one = _native.glu(
            gate, up, x[:rows], "q8_32", kind, gate_bias=biases[0], up_bias=biases[1], threads=2
        )
        assert np.array_equal(one, y[:rows])


@each_path
@each_format
def test_unpacked_rows_are_the_stored_numbers(path: str, fmt: Format) -> None:
    for width in widths(fmt, "none"):
        w, expected = packed(fmt, 37, width, path), values(fmt, 37, width)
        ids = np.array([36, 0, 15, 16, 36, 31], np.int32)
        assert np.array_equal(w.unpack_rows(ids), expected[ids])


@each_format
def test_layout_is_named_and_lossless_in_size(fmt: Format) -> None:
    w = packed(fmt, 32, 512)
    own = fmt.name not in ("q5_1", "q2_k", "q3_k", "q5_k")
    assert w.layout == fmt.name if own else w.layout in ("generic16", "generic32")
    assert not own or w.nbytes == 32 * fmt.row_bytes(512)
    assert w.layout == _native.layout_name(fmt.code)


@each_path
@each_format
def test_packing_tells_finite_from_not(path: str, fmt: Format) -> None:
    width = max(64, fmt.block)
    raw = random_weights(fmt, 37, width)
    assert _native.pack(fmt.code, 37, width, raw.reshape(-1), path, threads=3).finite
    infinity = {"f32": 0x7F800000, "bf16": 0x7F80}.get(fmt.name, 0x7C00)
    for word in SCALE_WORDS.get(fmt.name, (0,)):
        bad = raw.copy()
        view = bad.reshape(37, -1, fmt.bytes).view("<u4" if fmt.name == "f32" else "<u2")
        view[36, -1, word] = infinity | 1
        assert not _native.pack(fmt.code, 37, width, bad.reshape(-1), path, threads=3).finite


def test_packed_bytes_do_not_depend_on_path_or_threads() -> None:
    x = activations(3, 768)
    for fmt in FORMATS.values():
        raw = random_weights(fmt, 100, 768).reshape(-1)
        first = _native.linear(_native.pack(fmt.code, 100, 768, raw), x)
        for path in PATHS:
            again = _native.pack(fmt.code, 100, 768, raw, path, threads=3)
            assert np.array_equal(_native.linear(again, x, path=PATHS[0]), first)


SPECIAL_BLOCKS = {
    "zeros": np.zeros(32),
    "one": np.eye(32)[3],
    "ties": np.r_[127.0, np.arange(31) - 15.5],
    "subnormal scale": np.full(32, 1e-40),
    "smallest scale": np.linspace(-127, 127, 32) * 2.0**-126,
    "huge": np.linspace(-3e38, 3e38, 32),
}


@each_path
@pytest.mark.parametrize("name", SPECIAL_BLOCKS)
def test_rounding_of_special_blocks(path: str, name: str) -> None:
    x = np.tile(SPECIAL_BLOCKS[name].astype(np.float32), (1, 9))  # eight at once, and one
    record = _native.round_records(x, "q8_32", path)[0]
    expected = round_q8_32(x)[0]
    for block in range(9):
        line = record[64 * block : 64 * block + 64]
        codes, (d, s) = line[:32].view(np.int8), line[32:40].view(np.float32)
        assert np.array_equal(codes * d, expected[32 * block : 32 * block + 32])
        assert s == d * np.float32(codes.astype(int).sum())


@pytest.mark.parametrize("act", ("q8_32", "bf16"))
def test_rounding_is_the_same_on_every_path(act: str) -> None:
    scale = 10.0 ** np.random.default_rng(3).uniform(-44, 37, (64, 1))
    x = (activations(64, 480) * scale).astype(np.float32)
    records = [_native.round_records(x, act, path) for path in PATHS]
    wide = act == "bf16" and WIDE_BF16
    lines = records[0][:, : 1920 if wide else 960]
    if wide:
        assert np.array_equal(lines.view(np.float32), rounded(x, act))
    elif act == "bf16":
        assert np.array_equal(lines.view(np.uint16), rounded(x, act).view(np.uint32) >> 16)
    for other in records[1:]:
        assert np.array_equal(other[:, : lines.shape[1]], lines)


@each_path
@each_act
@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
def test_what_is_not_a_number_stays_so(path: str, act: str, poison: float) -> None:
    x = activations(3, 288)
    x[1, 40] = poison
    w = packed(FORMATS["q8_0"], 16, 288, path)
    y = _native.linear(w, x, act)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


@each_path
@each_format
@each_act
def test_extreme_activations(path: str, fmt: Format, act: str) -> None:
    width = max(64, fmt.block)
    w, weights = packed(fmt, 17, width, path), values(fmt, 17, width).astype(np.float64)
    for scale in (0.0, 1e-42, 1e-30, 1e30):
        x = (activations(3, width) * np.float32(scale)).astype(np.float32)
        y = _native.linear(w, x, act)
        reference = rounded(x, act).astype(np.float64) @ weights.T
        if scale in (0.0, 1e-42):  # bf16 dot products may flush subnormals
            assert np.abs(y).max() <= np.abs(reference).max() + 1e-37
        else:
            assert arithmetic_error(y, reference) <= TOLERANCE


@each_path
def test_functions_are_accurate(path: str) -> None:
    special = pytest.importorskip("scipy.special")
    x = np.linspace(-30, 30, 60001, dtype=np.float32)
    x = np.concatenate([x, np.float32(10.0) ** np.linspace(-30, 0, 3001, dtype=np.float32)])
    exact = x.astype(np.float64)
    references = {
        "exp": (np.exp(exact), 2.0),
        "tanh": (np.tanh(exact), 2.0),
        "sigmoid": (special.expit(exact), 3.0),
        "normal_cdf": (special.ndtr(exact), 8.0),
        "silu": (exact * special.expit(exact), 3.0),
        "gelu": (exact * special.ndtr(exact), 8.0),
    }
    for name, (reference, ulps) in references.items():
        y = _native.apply(name, x, path)[0]
        normal = np.abs(reference) >= 2.0**-126
        spacing = np.spacing(np.abs(reference[normal]).astype(np.float32)).astype(np.float64)
        error = np.abs(y[normal] - reference[normal]) / spacing
        assert error.max() <= ulps, (name, error.max(), x[normal][error.argmax()])
    inner = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    gelu = _native.apply("gelu_tanh", x, path)[0]
    assert arithmetic_error(gelu, exact * special.expit(2 * inner)) <= 1e-13
    assert np.array_equal(_native.apply("relu", x, path)[0], np.maximum(x, 0))


@each_path
def test_functions_at_the_ends(path: str) -> None:
    x = np.array([0.0, -0.0, 89, -110, np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32)

    def f(name: str) -> list[float]:
        return [float(v) for v in _native.apply(name, x, path)[0]]

    inf, nan = np.inf, np.nan
    assert f("exp") == pytest.approx([1, 1, inf, 0, inf, 0, nan, inf, 0], nan_ok=True)
    assert f("tanh") == pytest.approx([0, 0, 1, -1, 1, -1, nan, 1, -1], nan_ok=True)
    assert f("sigmoid") == pytest.approx([0.5, 0.5, 1, 0, 1, 0, nan, 1, 0], nan_ok=True)
    assert f("normal_cdf") == pytest.approx([0.5, 0.5, 1, 0, 1, 0, nan, 1, 0], nan_ok=True)
    assert f("gelu")[7:] == f("gelu_tanh")[7:] == f("silu")[7:] == pytest.approx([3e38, 0])
    assert all(np.isnan(f(name)[6]) for name in ("silu", "gelu", "gelu_tanh", "relu"))


def test_mistakes_are_named() -> None:
    w = packed(FORMATS["q4_1"], 16, 64)
    x = activations(1, 64)
    with pytest.raises(ValueError, match="'q8_64'; valid: none, q8_32 or bf16"):
        _native.linear(w, x, "q8_64")
    with pytest.raises(ValueError, match=r"'sse9' is not available here; valid: .*scalar"):
        _native.linear(w, x, path="sse9")
    with pytest.raises(ValueError, match=r"\(rows, 64\)"):
        _native.linear(w, activations(1, 32))
    with pytest.raises(ValueError, match="multiple of 32, not 33"):
        _native.linear(packed(FORMATS["f32"], 16, 33), activations(1, 33), "q8_32")
    with pytest.raises(ValueError, match="row 16 is outside"):
        w.unpack_rows(np.array([16], np.int32))
    with pytest.raises(ValueError, match="are not 16 rows of 64"):
        _native.pack(3, 16, 64, np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match="format 99"):
        _native.pack(99, 16, 64, np.zeros(7, np.uint8))


@each_path
def test_calibration_kernels_count_what_they_do(path: str) -> None:
    data = np.ones(4096, np.uint8)
    assert _native.stream(data, 3, path) == 3 * 4096
    for kind in ("int8", "int16", "bf16", "f32"):
        if kind == "int16" and not _native.peak(kind, 1, path):
            continue  # no pairs of 16 bits on this path
        few, many = _native.peak(kind, 10, path), _native.peak(kind, 20, path)
        assert 0 < few < many
        assert all(rate > 0 for rate in _native.time_peak(kind, 4, 2, 2, path))
    assert 0 < _native.time_tick(1000) < 1e-4
