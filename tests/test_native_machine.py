"""The native machine against the array machine, opcode by opcode, at shapes meant to hurt.

`same` runs a small program on both, instruction by instruction: before each one the native machine
gets the reference's operands, so that an error shows where it is made and nowhere else.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from lmclock import _native
from lmclock.batch import ADJUST, Batch, Rows
from lmclock.formats import get_format
from lmclock.machines import Capacity, create
from lmclock.machines.native import NativeMachine
from lmclock.program import Program
from tests.helpers import arithmetic_error, numbers, op_program, random_weights, sampling, stored

PATHS = [*_native.simd_paths(), *_native.emulated_paths()]
TOLERANCE = 1e-7  # normalised mean square error of one instruction
PAGES = 256
ROWS = [0, 1, 2, 5, 16, 17, 33, 70]
SPANS = [(3, 4), (0, 1), (7, 0), (0, 5)]  # (first position, rows)


def machines(threads: Sequence[int] = (2,)) -> Iterator[NativeMachine]:
    """One machine per SIMD path and number of threads."""
    for path, count in itertools.product(PATHS, threads):
        machine = create("native", threads=count, path=path)
        assert isinstance(machine, NativeMachine)
        yield machine
        machine.close()


def batch(
    program: Program,
    spans: Sequence[tuple[int, int]],
    inputs: Mapping[str, np.ndarray],
    page_size: int = 16,
    src: Sequence[tuple[int, int]] | None = None,
    lengths: Sequence[int] | None = None,
    padding: Sequence[int] = (),
    **more: Any,
) -> Batch:
    """Sequence n has slot n and scattered pages of every state; rows `padding` of tok are none."""
    n = len(spans)
    tok, other = Rows.of(list(spans)), Rows.of(list(src or [(0, 0)] * n))
    tok.valid[list(padding)] = False
    each = 1 + max(a + b for a, b in [*spans, *(src or []), (0, 0)]) // page_size
    # 7 is prime to PAGES: neighbours in a sequence are no neighbours in memory.
    numbers_of = [(7 * (np.arange(each) + 32 * k) % PAGES).astype(np.int32) for k in range(n)]
    pages = {s.name: numbers_of for s in program.states if s.kind != "fixed"}
    frozen = [s.name for s in program.states if s.kind == "frozen"]
    kept = {name: np.array(lengths or [0] * n, np.int32) for name in frozen}
    return Batch({"tok": tok, "src": other}, dict(inputs), np.arange(n, dtype=np.int32), pages,
                 kept, page_size=page_size, **more)  # fmt: skip


def capacity(program: Program, page_size: int = 16, rows: int = 128) -> Capacity:
    return Capacity(rows, 64, 8, page_size, {s.name: PAGES for s in program.states})


def same(
    program: Program,
    batches: Sequence[Batch],
    threads: Sequence[int] = (2,),
    tolerance: float = TOLERANCE,
    weights: Mapping[str, Any] | None = None,
    sections: Sequence[str] | None = None,
) -> None:
    """Every value of every cycle, bits where it holds ids."""
    weights = random_weights(program) if weights is None else weights
    sections = sections or [s.name for s in program.sections]
    outs = [o for s in program.sections for i in s.instructions for o in i.outs]
    room = capacity(program, batches[0].page_size)
    for native in machines(threads):
        reference = create("array")
        reference.load(program, weights, room)
        native.load(program, weights, room, keep=outs)
        for b in batches:
            reference.bind(b)
            native.bind(b)
            for section in sections:
                for number, i in enumerate(program.section(section).instructions):
                    reference.run(section, number, number + 1)
                    for name in i.reads():
                        native.write(name, reference.read(name))
                    native.run(section, number, number + 1)
                    for name in i.outs:
                        where = f"{i.op} {name} on {native.path}, {native.traits.threads} threads"
                        compare(native.read(name), reference.read(name), tolerance, where)
            reference.commit()
            native.commit()


def compare(got: np.ndarray, want: np.ndarray, tolerance: float, where: str) -> None:
    assert got.shape == want.shape, where
    assert got.dtype == want.dtype, where
    if want.dtype.kind == "i":
        np.testing.assert_array_equal(got, want, err_msg=where)
        return
    assert np.isfinite(got).all(), where
    error = arithmetic_error(got, want)
    assert error <= tolerance, f"{where}: error {error:.2g}"


def inputs_program(body: str, declare: str = "", **inputs: np.ndarray) -> Program:
    """A program over inputs given as arrays of tok rows."""
    kinds = {name: "ids" if x.dtype.kind == "i" else f"f32 width={x.shape[1]}"
             for name, x in inputs.items()}  # fmt: skip
    lines = [f"input {name} tok {kind}" for name, kind in kinds.items()]
    return op_program(body, "\n".join([*lines, declare]))


def rowwise(
    body: str, declare: str, rows: int, threads: Sequence[int] = (2,), **inputs: Any
) -> None:
    """One cycle of `rows` rows of one sequence."""
    inputs = {name: x[:rows] for name, x in inputs.items()}
    program = inputs_program(body, declare, **inputs)
    same(program, [batch(program, [(0, rows)], inputs)], threads)


# --- element by element


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh",
                                  "sigmoid", "softcap"])  # fmt: skip
def test_act(kind: str) -> None:
    for rows, width in ((1, 1), (3, 15), (2, 64), (5, 33), (0, 7)):
        x = 4 * numbers(rows, width)
        cap = "cap=2.5" if kind == "softcap" else ""
        rowwise(f"act y, x   kind={kind} {cap}", "", rows, (1, 3), x=x)


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
def test_binary(kind: str) -> None:
    for rows, width in ((1, 1), (3, 17), (2, 64), (0, 7)):
        a, b = numbers(rows, width), numbers(rows, width, seed=1)
        rowwise(f"binary y, a, b   kind={kind}", "", rows, (1, 3), a=a, b=b)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_softmax_concat_and_pick(rows: int) -> None:
    x = 5 * numbers(rows, 30)
    body = ("softmax s, x\nsoftmax g, x   groups=3\nsoftmax l, x   log=1\nconcat c, x, s\n"
            "pick p, c\npick i, ids")  # fmt: skip
    ids = np.arange(rows, dtype=np.int32)[:, None]
    program = inputs_program(body, "", x=x, ids=ids)
    picked = np.arange(rows, dtype=np.int32)[::2]
    same(program, [batch(program, [(0, rows)], {"x": x, "ids": ids}, pick=picked)], (1, 3))


@pytest.mark.parametrize("kind", ["mean", "first", "last", "max"])
def test_pool_leaves_padding_and_empty_sequences_out(kind: str) -> None:
    x = numbers(10, 21)
    program = inputs_program(f"pool y, x   kind={kind}", "", x=x)
    same(program, [batch(program, SPANS, {"x": x}, padding=(0, 3, 9))], (1, 3))


@pytest.mark.parametrize("form", ["f32", "bf16", "q4_1", "q8_0", "q6_k"])
def test_embed(form: str) -> None:
    ids = np.array([[2], [0], [18], [7], [-9]], np.int32)
    width = 256 if form.endswith("_k") else 96
    program = inputs_program("embed y, ids, t   scale=2.5 offset=1", f"weight t 20x{width} {form}",
                             ids=ids)  # fmt: skip
    same(program, [batch(program, [(0, 5)], {"ids": ids}, padding=[4])], (1, 3))


@pytest.mark.parametrize("options", ["", "kind=layer", "kind=layer bias=b", "bias=b eps=0.01",
                                     "groups=3"])  # fmt: skip
def test_norm(options: str) -> None:
    for width in (3, 48, 51, 192, 330):
        part = width // 3 if "groups" in options else width
        for weight in ("", ", w"):
            rowwise(f"norm y, x{weight}   {options}", f"weight w 1x{part} f32\n"
                    f"weight b 1x{part} f32", 5, (1, 3), x=3 + numbers(5, width))  # fmt: skip


@pytest.mark.parametrize("options", ["", "dims=4", "scale=1.25 base=500.0", "freqs=f"])
@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
def test_rope(pairs: str, options: str) -> None:
    freqs = np.array([[1.0, 0.3, 0.05, 0.007]], np.float32)
    for head, spans in itertools.product((8, 40), (SPANS, [(31000, 10)])):
        if "freqs" in options and head != 8:
            continue
        x = numbers(10, 3 * head)
        program = inputs_program(f"rope y, x   heads=3 pairs={pairs} {options}",
                                 "weight f 1x4 f32", x=x)  # fmt: skip
        same(program, [batch(program, spans, {"x": x}, page_size=512)], (1, 3),
             weights={"f": stored("f", freqs)})  # fmt: skip


# --- products

FORMATS = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q4_k", "q6_k", "q5_1", "q2_k"]


@pytest.mark.parametrize("act", ["none", "q8_32", "bf16"])
@pytest.mark.parametrize("form", FORMATS)
def test_linear_in_every_format(form: str, act: str) -> None:
    width = 512 if form.endswith("_k") else 96
    x = numbers(5, width)
    rowwise(f"linear y, x, w   act={act}", f"weight w 37x{width} {form}", 5, (1, 3), x=x)


@pytest.mark.parametrize("rows", ROWS)
def test_linear_fused_with_everything(rows: int) -> None:
    x, r = numbers(rows, 64), numbers(rows, 50, seed=1)
    body = """
linear a, x, w   act=q8_32 bias=b
linear c, x, w   add=r norm=n norm_kind=layer norm_bias=nb eps=0.01
linear d, x, w   scale=0.3 bias=b add=r act=q8_32 norm=n
linear e, x, v   act=bf16 norm=n add=x
"""
    declare = """
weight w 50x64 q4_1
weight v 64x64 bf16
weight b 1x50 f32
weight n 1x64 f32
weight nb 1x64 f32
"""
    rowwise(body, declare, rows, (1, 2, 3), x=x, r=r)


@pytest.mark.parametrize("rows", ROWS)
def test_qkv_and_glu(rows: int) -> None:
    body = """
qkv  q, k, v, x, wq, wk, wv   act=q8_32 norm=n
qkv  q2, k2, v2, x, wq, wk, wv   bias=bq bias_k=bk bias_v=bv
glu  s, x, g, u   act=q8_32 norm=n
glu  t, x, g, u   kind=gelu bias=bg bias_k=bu
glu  z, x, g, u2  kind=gelu_tanh norm=n norm_kind=layer
glu  o, x, u, u2  kind=relu act=bf16
"""
    declare = """
weight wq 48x64 q4_0
weight wk 20x64 q8_0
weight wv 20x64 q5_0
weight bq 1x48 f32
weight bk 1x20 f32
weight bv 1x20 f32
weight g 70x64 q4_1
weight u 70x64 q4_1
weight u2 70x64 f32
weight bg 1x70 f32
weight bu 1x70 f32
weight n 1x64 f32
"""
    rowwise(body, declare, rows, (1, 2, 3), x=numbers(rows, 64))


# --- attention

OPTIONS = ["", "mask=full", "window=3", "softcap=0.7 qk_scale=1.5", "mask=full window=70"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("heads", [(6, 2, 4, 5), (3, 3, 1, 1), (2, 1, 33, 17), (4, 4, 64, 64)])
def test_attend_over_plain_values(heads: tuple[int, int, int, int], options: str) -> None:
    h, g, key, value = heads
    spans = [(3, 4), (0, 1), (7, 0), (0, 70), (0, 9)]
    rows = sum(count for _, count in spans)
    q, k, v = (
        numbers(rows, h * key),
        numbers(rows, g * key, seed=1),
        numbers(rows, g * value, seed=2),
    )
    program = inputs_program(f"attend y, q, k, v   heads={h} kv_heads={g} {options}",
                             q=q, k=k, v=v)  # fmt: skip
    same(program, [batch(program, spans, {"q": q, "k": k, "v": v}, padding=(2, 3, 40))], (1, 3))


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_attend_with_a_relative_bias(mask: str) -> None:
    rows = 150
    q, k, v = (numbers(rows, 6, seed=s) for s in range(3))
    for buckets, distance in ((8, 20), (32, 128)):
        program = inputs_program(
            f"attend y, q, k, v   heads=2 mask={mask} rel_bias=t max_distance={distance}",
            f"weight t {buckets}x2 f32", q=q, k=k, v=v,
        )  # fmt: skip
        table = {"t": stored("t", 2 * numbers(buckets, 2, seed=3))}
        b = batch(program, [(0, 9), (0, rows - 9)], {"q": q, "k": k, "v": v})
        room = Capacity(256, 8, 8, 16, {})
        reference = create("array")
        reference.load(program, table, room)
        reference.bind(b)
        reference.run("step")
        for native in machines((1, 3)):
            native.load(program, table, room)
            native.bind(b)
            native.run("step")
            compare(native.read("y"), reference.read("y"), TOLERANCE, f"{native.path} {buckets}")


def paged(heads: tuple[int, int, int, int], options: str, form: str) -> Program:
    h, g, key, value = heads
    return op_program(
        f"store kv[1], k, v\nattend y, q, kv[1]   heads={h} kv_heads={g} {options}",
        f"input q tok f32 width={h * key}\ninput k tok f32 width={g * key}\n"
        f"input v tok f32 width={g * value}\n"
        f"state kv[2] paged heads={g} key={key} value={value} format={form}",
    )


def paged_inputs(program: Program, rows: int, seed: int) -> dict[str, np.ndarray]:
    widths = {i.name: i.width for i in program.inputs}
    return {
        name: numbers(rows, width, seed=seed + n) for n, (name, width) in enumerate(widths.items())
    }


CUTS = [
    [(0, 5), (0, 1), (0, 0), (0, 70)],
    [(5, 1), (1, 1), (0, 2), (70, 1)],
    [(6, 30), (2, 0), (2, 1), (71, 20)],
]


@pytest.mark.parametrize("page_size", [5, 16, 64])
@pytest.mark.parametrize("form", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    "heads", [(6, 2, 64, 32), (2, 2, 32, 96), (20, 1, 32, 32), (3, 1, 128, 64)]
)
def test_attend_over_pages(heads: tuple[int, int, int, int], form: str, page_size: int) -> None:
    """Decoding, short and long prompts in one batch; tiles of one query and of many."""
    program = paged(heads, "", form)
    batches = [
        batch(program, cuts, paged_inputs(program, sum(c for _, c in cuts), 10 * n), page_size)
        for n, cuts in enumerate(CUTS)
    ]
    same(program, batches, (1, 3))


@pytest.mark.parametrize("heads", [(3, 3, 1, 1), (4, 2, 7, 3), (2, 1, 33, 17)])
@pytest.mark.parametrize("options", ["", "window=10", "softcap=2.0", "mask=full"])
def test_attend_over_pages_at_odd_widths(heads: tuple[int, int, int, int], options: str) -> None:
    for form in ("f32", "f16"):
        program = paged(heads, options, form)
        batches = [batch(program, cuts, paged_inputs(program, sum(c for _, c in cuts), 10 * n),
                         padding=[1] if n == 0 else []) for n, cuts in enumerate(CUTS)]  # fmt: skip
        same(program, batches, (1, 3))


def test_cross_attention_over_frozen_states_and_values() -> None:
    program = op_program(
        "attend a, q, cross[0]   heads=4 kv_heads=2 mask=full\n"
        "attend b, q, k, v   heads=4 kv_heads=2 mask=full",
        "input k src f32 width=16\ninput v src f32 width=20\ninput q tok f32 width=32\n"
        "state cross[1] frozen heads=2 key=8 value=10\n"
        "section encode\nstore cross[0], k, v",
    )
    src = [(0, 40), (0, 3), (0, 0), (0, 17)]
    inputs = {"q": numbers(10, 32), "k": numbers(60, 16, seed=1), "v": numbers(60, 20, seed=2)}
    b = batch(program, SPANS, inputs, src=src, lengths=[40, 3, 0, 16])
    same(program, [b, b], (1, 3), sections=["encode", "step"])


# --- recurrences and experts


@pytest.mark.parametrize("hidden", [1, 5, 16, 40])
@pytest.mark.parametrize("options", ["", "bias=b", "bias=b bias_k=c"])
def test_lstm(hidden: int, options: str) -> None:
    x = numbers(10, 12)
    declare = (f"weight wi {4 * hidden}x12 f32\nweight ws {4 * hidden}x{hidden} f16\n"
               f"weight b 1x{4 * hidden} f32\nweight c 1x{4 * hidden} f32\n"
               f"state hc[2] fixed width={2 * hidden}")  # fmt: skip
    program = inputs_program(f"lstm y, x, hc[1], wi, ws   {options}\n"
                             f"lstm z, x, wi, ws   reverse=1 {options}", declare, x=x)  # fmt: skip
    spans = [[(0, 4), (0, 1), (0, 0), (0, 5)], [(4, 3), (1, 6), (0, 1), (5, 0)]]
    same(program, [batch(program, s, {"x": x}, padding=[5]) for s in spans], (1, 3))


@pytest.mark.parametrize("form", ["q8_0", "q4_1", "q6_k"])
def test_lstm_of_rounded_rows(form: str) -> None:
    """Few sequences, which each thread rounds for itself, and many. A last bit of h can change one
    of its levels.
    """
    declare = (f"weight wi 256x256 {form}\nweight ws 256x64 {'q8_0' if form == 'q6_k' else form}\n"
               "weight b 1x256 f32\nstate hc[1] fixed width=128")  # fmt: skip
    for spans in ([(0, 4), (0, 1), (0, 0), (0, 5)], [(0, n % 3) for n in range(8)]):
        x = numbers(sum(n for _, n in spans), 256)
        body = ("lstm y, x, hc[0], wi, ws   act=q8_32 bias=b\n"
                "lstm z, x, wi, ws   act=q8_32 reverse=1")  # fmt: skip
        program = inputs_program(body, declare, x=x)
        later = [(n, 1) for _, n in spans]
        more = batch(program, later, {"x": numbers(len(spans), 256, seed=1)})
        same(program, [batch(program, spans, {"x": x}), more], (1, 3), tolerance=1e-5)


@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_a_recurrent_state_is_rounded_to_its_format(form: str) -> None:
    x = numbers(6, 8)
    declare = f"weight wi 128x8 f32\nweight ws 128x32 f32\nstate hc[1] fixed width=64 format={form}"
    program = inputs_program("lstm y, x, hc[0], wi, ws", declare, x=x)
    same(program, [batch(program, [(0, 6)], {"x": x}), batch(program, [(6, 6)], {"x": x})])


@pytest.mark.parametrize("rows", [0, 1, 9, 40])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_route_and_experts(kind: str, rows: int) -> None:
    for act, form in (("none", "f32"), ("q8_32", "q4_0")):
        body = (f"route p, e, x, r   experts=6 top=2 kind={kind}\n"
                f"route p1, e1, x, r   experts=6 top=1 renorm=0 kind={kind}\n"
                f"experts y, x, p, e, g, u, d   experts=6 act={act}\n"
                f"experts z, x, p1, e1, g, u, d   experts=6 kind=gelu act={act}")  # fmt: skip
        declare = (f"weight r 6x64 f32\nweight g 192x64 {form}\nweight u 192x64 {form}\n"
                   f"weight d 384x32 {form}")  # fmt: skip
        rowwise(body, declare, rows, (1, 3), x=numbers(rows, 64))


# --- sampling


def sampling_cases(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Settings of every kind, some of them off."""
    records = sampling(rows)
    for r in records:
        r["temperature"] = rng.choice([0, 0.1, 0.7, 1, 3])
        r["top_k"] = rng.choice([0, 0, 1, 5, 40, 5000])
        r["top_p"] = rng.choice([1, 1, 0.01, 0.5, 0.95, 0.999])
        r["min_p"] = rng.choice([0, 0, 0.05, 0.5])
        r["repetition"] = rng.choice([1, 1.3])
        r["presence"], r["frequency"] = rng.choice([0, 0.5, -0.2], 2)
        r["seed"], r["draw"] = rng.integers(0, 2**63, 2)
    return records


@pytest.mark.parametrize("vocabulary", [1, 7, 300, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_sample_draws_what_the_reference_draws(vocabulary: int, spread: float) -> None:
    rng = np.random.default_rng(vocabulary)
    rows = 40
    x = (spread * rng.standard_normal((rows, vocabulary))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0.5  # many ties
    x[::5, 1:] = np.where(rng.random(x[::5, 1:].shape) < 0.3, -np.inf, x[::5, 1:])
    program = inputs_program("pick p, x\nsample next, p", x=x)
    records = [
        (row, token, rng.choice([0, 0, 1, 4]), rng.choice([0, 0, 2, -3, -np.inf]))
        for row in range(0, rows, 3)
        for token in rng.permutation(vocabulary)[: rng.integers(1, 9)]
    ]
    adjust = np.array(records, ADJUST)
    adjust = adjust[np.lexsort((adjust["id"], adjust["row"]))]
    adjust = adjust[
        (adjust["id"] != 0) | (adjust["bias"] > -9)
    ]  # a token that can be drawn remains
    for settings in (sampling(rows), sampling_cases(rng, rows), sampling_cases(rng, rows)):
        b = batch(program, [(0, rows)], {"x": x}, pick=np.arange(rows, dtype=np.int32),
                  sampling=settings, adjust=adjust)  # fmt: skip
        drawn = [token for native in machines((1, 3)) for token in drawn_by(native, program, b, x)]
        reference = create("array")
        want = drawn_by(reference, program, b, x)
        assert drawn == want * (len(drawn) // rows)


def drawn_by(machine: Any, program: Program, b: Batch, x: np.ndarray) -> list[int]:
    machine.load(program, {}, capacity(program), keep=["p"])
    machine.bind(b)
    machine.run("step")
    first: list[int] = machine.read("next")[:, 0].tolist()
    np.testing.assert_array_equal(machine.read("p"), x)  # logits are looked at, not changed
    machine.run("step", 1)
    assert machine.read("next")[:, 0].tolist() == first
    return first


def test_format_codes_are_shared() -> None:
    """Machine and kernels take the codes of formats.py."""
    assert _native.layout_name(get_format("q4_1").code) == "q4_1"
    code = "import lmclock.machines.native, sys; print('lmclock.machines.array' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- attention that may round (act=bf16): values within 16 bits, and bits that company leaves alone

# Mean squares: bf16 weights and values are off by 0.2 % each, codes by 0.01 % of a block's largest.
ROUNDED = {"bf16": 2e-5, "codes": 1e-6}


@pytest.fixture(params=["bf16", "codes"])
def weighing(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to weigh values, whichever this processor would take."""
    before = _native.set_weigh_codes(request.param == "codes")
    yield request.param
    _native.set_weigh_codes(before)


@pytest.mark.parametrize("page_size", [5, 16, 64])
@pytest.mark.parametrize("form", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize(
    "heads", [(6, 2, 64, 32), (2, 2, 32, 96), (20, 1, 32, 32), (3, 1, 128, 64)]
)
def test_rounded_attend_over_pages(
    heads: tuple[int, int, int, int], form: str, page_size: int, weighing: str
) -> None:
    program = paged(heads, "act=bf16", form)
    batches = [
        batch(program, cuts, paged_inputs(program, sum(c for _, c in cuts), 10 * n), page_size)
        for n, cuts in enumerate(CUTS)
    ]
    same(program, batches, (1, 3), tolerance=ROUNDED[weighing])


@pytest.mark.parametrize("heads", [(3, 3, 1, 1), (4, 2, 7, 3), (2, 1, 33, 17)])
@pytest.mark.parametrize("options", OPTIONS)
def test_rounded_attend_at_odd_widths(
    heads: tuple[int, int, int, int], options: str, weighing: str
) -> None:
    program = paged(heads, f"act=bf16 {options}", "f16")
    batches = [batch(program, cuts, paged_inputs(program, sum(c for _, c in cuts), 10 * n),
                     padding=[1] if n == 0 else []) for n, cuts in enumerate(CUTS)]  # fmt: skip
    same(program, batches, (1, 3), tolerance=ROUNDED[weighing])
    h, g, key, value = heads
    q, k, v = (numbers(84, h * key), numbers(84, g * key, seed=1), numbers(84, g * value, seed=2))
    program = inputs_program(f"attend y, q, k, v   heads={h} kv_heads={g} act=bf16 {options}",
                             q=q, k=k, v=v)  # fmt: skip
    b = batch(program, [(3, 4), (0, 70), (0, 10)], {"q": q, "k": k, "v": v}, padding=(2, 3, 40))
    same(program, [b], (1, 3), tolerance=ROUNDED[weighing])


def test_rounded_attend_has_the_same_bits_in_any_company(weighing: str) -> None:
    """A prompt alone, beside a decoding and a longer sequence, on other pages and threads."""
    program = paged((6, 2, 64, 64), "act=bf16", "f16")
    inputs = paged_inputs(program, 200, 0)
    found = []
    for threads, page_size, spans in (
        (1, 64, [(0, 70)]),
        (2, 64, [(0, 70), (0, 1), (0, 100)]),
        (3, 16, [(0, 70), (0, 129)]),
    ):
        machine = create("native", threads=threads)
        machine.load(program, {}, capacity(program, page_size, rows=256))
        rows = sum(count for _, count in spans)
        machine.bind(batch(program, spans, {k: x[:rows] for k, x in inputs.items()}, page_size))
        machine.run("step")
        found.append(machine.read("y")[:70].copy())
        machine.close()
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_rounded_attend_hides_no_number_that_is_none(
    what: str, poison: float, weighing: str
) -> None:
    if not _native.peak("int16", 1):
        pytest.skip("no path here computes attention from pairs of 16 bits")
    program = paged((2, 2, 32, 32), "act=bf16", "f32")
    inputs = {name: x.copy() for name, x in paged_inputs(program, 100, 0).items()}
    inputs[what][70, 3] = poison  # of the first head
    machine = create("native")
    machine.load(program, {}, capacity(program, rows=128))
    machine.bind(batch(program, [(0, 100)], inputs))
    machine.run("step")
    y = machine.read("y")[:100]
    machine.close()
    sees = slice(70, 71) if what == "q" else slice(70, 100)
    assert not np.isfinite(y[sees, 3]).any()
    assert np.isfinite(y[:, 32:]).all()
    if what == "q":
        assert np.isfinite(np.delete(y, 70, axis=0)).all()
