"""Every opcode of the array machine against something written without it, on NumPy and PyTorch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmclock.batch import Batch, Rows
from lmclock.errors import ContextError, LmclockError, OptionError, ProgramError
from lmclock.formats import round_q8_32
from lmclock.isa import ACTIVATIONS, OPCODES
from lmclock.machines import create
from lmclock.machines.array_ops import OPERATIONS
from lmclock.passes import optimise
from tests.helpers import (
    SPANS,
    TOTAL,
    Runner,
    batch_of,
    close,
    computed,
    loaded,
    numbers,
    on_both,
    op_program,
    random_weights,
    stored,
)
from tests.random_programs import random_program


def test_every_core_opcode_has_a_meaning_and_no_fused_one() -> None:
    fused = {"qkv", "glu"}
    assert set(OPERATIONS) == set(OPCODES) - fused
    assert all(OPCODES[name].expand for name in fused)


# --- row by row


@on_both
def test_embed(namespace: str) -> None:
    table, ids = numbers(6, 3), np.array([[0], [4], [1], [2]] * 2 + [[3]] * 2, np.int32)
    m = computed("embed y, ids, t   scale=2.5 offset=1", "weight t 6x3 f32", namespace,
                 weights={"t": stored("t", table)}, ids=ids)  # fmt: skip
    close(m.read("y"), 2.5 * table[ids[:, 0] + 1])
    for wrong in (5, -2):
        ids[3] = wrong
        with pytest.raises(ProgramError, match=f"row {wrong + 1} of t does not exist.*0 to 5"):
            computed("embed y, ids, t   offset=1", "weight t 6x3 f32", namespace, ids=ids)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@on_both
def test_norm(namespace: str, kind: str, groups: int) -> None:
    x, w, b = numbers(TOTAL, 12), numbers(1, 12 // groups, seed=1), numbers(1, 12 // groups, seed=2)
    declare = f"weight w 1x{12 // groups} f32\nweight b 1x{12 // groups} f32"
    m = computed(f"norm y, x, w   kind={kind} bias=b eps=0.01 groups={groups}\nnorm z, x",
                 declare, namespace, weights={"w": stored("w", w), "b": stored("b", b)},
                 x=x)  # fmt: skip
    parts = x.astype(np.float64).reshape(TOTAL, groups, -1)
    if kind == "layer":
        parts = parts - parts.mean(-1, keepdims=True)
    want = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 0.01) * w + b
    close(m.read("y"), want.reshape(x.shape))
    close(m.read("z"), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5))


@pytest.mark.parametrize("act", ["none", "q8_32", "bf16"])
@on_both
def test_linear_rounds_its_input_as_told(namespace: str, act: str) -> None:
    x, w, b = numbers(TOTAL, 64), numbers(5, 64, seed=1), numbers(1, 5, seed=2)
    m = computed(f"linear y, x, w   bias=b scale=0.25 act={act}",
                 "weight w 5x64 f32\nweight b 1x5 f32", namespace,
                 weights={"w": stored("w", w), "b": stored("b", b)}, x=x)  # fmt: skip
    rounded = {
        "none": x,
        "q8_32": round_q8_32(x),
        "bf16": torch.tensor(x).to(torch.bfloat16).to(torch.float32).numpy(),
    }
    close(m.read("y"), 0.25 * (rounded[act].astype(np.float64) @ w.T) + b, 1e-5)


@on_both
def test_linear_takes_a_residual_after_its_norm(namespace: str) -> None:
    x, r = numbers(TOTAL, 8), numbers(TOTAL, 4, seed=1)
    declare = "weight w 4x8 f32\nweight n 1x8 f32\nweight b 1x4 f32"
    one = computed("linear y, x, w   norm=n add=r bias=b", declare, namespace, x=x, r=r)
    many = computed("norm h, x, n\nlinear s, h, w   bias=b\nbinary y, s, r", declare, namespace,
                    x=x, r=r)  # fmt: skip
    np.testing.assert_array_equal(one.read("y"), many.read("y"))
    with pytest.raises(ProgramError, match="y~norm"):
        one.read("y~norm")  # of an expansion only the result is a value


REFERENCE_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softcap": lambda x: 3 * torch.tanh(x / 3),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@on_both
def test_activations_are_finite_everywhere(namespace: str, kind: str) -> None:
    x = np.concatenate([numbers(TOTAL, 40) * 4, np.tile([0, 100, -100, 1e4, -1e4], (TOTAL, 1))], 1)
    m = computed(f"act y, x   kind={kind} cap=3.0", "", namespace, x=x.astype(np.float32))
    want = REFERENCE_ACTIVATIONS[kind](torch.tensor(x, dtype=torch.float64)).numpy()
    close(m.read("y"), want)


@on_both
def test_binary_concat_softmax(namespace: str) -> None:
    a, b = numbers(TOTAL, 6) * 20, numbers(TOTAL, 6, seed=1)
    m = computed("binary s, a, b\nbinary d, a, b   kind=sub\nbinary p, a, b   kind=mul\n"
                 "concat c, a, b\nsoftmax y, a   groups=2\nsoftmax z, a   log=1",
                 "", namespace, a=a, b=b)  # fmt: skip
    for name, want in (("s", a + b), ("d", a - b), ("p", a * b), ("c", np.hstack([a, b]))):
        np.testing.assert_array_equal(m.read(name), want)
    wide = torch.tensor(a, dtype=torch.float64)
    close(m.read("y"), torch.softmax(wide.reshape(-1, 2, 3), -1).reshape(-1, 6).numpy(), 5e-6)
    close(m.read("z"), torch.log_softmax(wide, -1).numpy(), 5e-6)


# --- sequences


@pytest.mark.parametrize("kind", ["mean", "first", "last", "max"])
@on_both
def test_pool_over_valid_rows(namespace: str, kind: str) -> None:
    program = op_program(f"pool y, x   kind={kind}", "input x tok f32 width=3")
    machine, x = loaded(program, {}, namespace), numbers(TOTAL, 3)
    batch = batch_of(program, SPANS, x=x)
    batch.rows["tok"].valid[[0, 3, 4]] = False  # two rows of sequence 0, all of sequence 1
    machine.bind(batch)
    machine.run("step")
    reduce = {"mean": lambda p: p.mean(0), "first": lambda p: p[0], "last": lambda p: p[-1],
              "max": lambda p: p.max(0)}[kind]  # fmt: skip
    close(machine.read("y"), [reduce(x[1:3]), [0] * 3, [0] * 3, reduce(x[5:10])])


@on_both
def test_lstm_in_both_directions_is_that_of_torch(namespace: str) -> None:
    layer = torch.nn.LSTM(3, 5, bidirectional=True)
    names = {"a": "", "b": "_reverse"}
    weights = {
        f"{kind}.{ours}": stored(f"{kind}.{ours}", np.atleast_2d(
            getattr(layer, f"{kind}_l0{theirs}").detach().numpy()))
        for ours, theirs in names.items()
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }  # fmt: skip
    declare = "\n".join(f"weight {n} {w.shape[0]}x{w.shape[1]} f32" for n, w in weights.items())
    body = "\n".join(
        f"lstm {d}, x, weight_ih.{d}, weight_hh.{d}   bias=bias_ih.{d} bias_k=bias_hh.{d} {more}"
        for d, more in (("a", ""), ("b", "reverse=1"))
    )
    x = numbers(TOTAL, 3)
    m = computed(f"{body}\nconcat y, a, b", declare, namespace, weights=weights, x=x)
    starts = Rows.of(SPANS).starts
    with torch.no_grad():
        want = [layer(torch.tensor(x[a:b]))[0] for a, b in pairwise(starts) if b > a]
    close(m.read("y"), torch.cat(want).numpy())


@on_both
def test_a_fixed_state_changes_at_commit_only(namespace: str) -> None:
    program = op_program(
        "lstm y, x, hc[0], a, b",
        "input x tok f32 width=2\nweight a 12x2 f32\nweight b 12x3 f32\nstate hc[1] fixed width=6",
    )
    machine = loaded(program, random_weights(program), namespace)
    for at in range(3):
        before = machine.scope.numpy(machine.scope.states["hc[0]"]).copy()
        machine.bind(batch_of(program, [(at, 1)], x=numbers(1, 2, seed=at)))
        machine.run("step")
        np.testing.assert_array_equal(machine.scope.numpy(machine.scope.states["hc[0]"]), before)
        machine.commit()
        after = machine.scope.numpy(machine.scope.states["hc[0]"])
        np.testing.assert_array_equal(after[0, :3], machine.read("y")[0])
        assert (after[0] != before[0]).any()
        assert not after[1:].any()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renorm", [0, 1])
@on_both
def test_route_prefers_the_lower_expert_among_equals(
    namespace: str, kind: str, renorm: int
) -> None:
    # One-hot router rows: the scores of experts are the inputs themselves.
    x = np.array([[1, 3, 3, 1], [0, 0, 0, 0], [5, -1, 2, 7], [2, 2, 9, 9]] * 2 + [[0, 1, 0, 1]] * 2)
    m = computed(f"route p, e, x, w   experts=4 top=2 kind={kind} renorm={renorm}",
                 "weight w 4x4 f32", namespace,
                 weights={"w": stored("w", np.eye(4))}, x=x.astype(np.float32))  # fmt: skip
    want = [[1, 2], [0, 1], [3, 0], [2, 3]] * 2 + [[1, 3]] * 2
    np.testing.assert_array_equal(m.read("e"), want)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True) if kind == "softmax" else 1 / (1 + np.exp(-x))
    p = np.take_along_axis(p, np.array(want), 1)
    close(m.read("p"), p / p.sum(1, keepdims=True) if renorm else p)


@pytest.mark.parametrize("act", ["none", "q8_32", "bf16"])
@on_both
def test_experts_round_before_every_product(namespace: str, act: str) -> None:
    x = numbers(TOTAL, 32)
    declare = "weight r 3x32 f32\nweight g 96x32 f32\nweight u 96x32 f32\nweight d 96x32 f32"
    m = computed(f"route p, e, x, r   experts=3 top=2\n"
                 f"experts y, x, p, e, g, u, d   experts=3 kind=gelu act={act}", declare,
                 namespace, x=x)  # fmt: skip
    body = "\n".join(
        f"linear g{e}, x, g.{e}   act={act}\nlinear u{e}, x, u.{e}   act={act}\n"
        f"act a{e}, g{e}   kind=gelu\nbinary h{e}, a{e}, u{e}   kind=mul\n"
        f"linear y{e}, h{e}, d.{e}   act={act}" for e in range(3)
    )  # fmt: skip
    whole = {n: m.scope.numpy(m.weights[n]) for n in "gud"}
    parts = {f"{n}.{e}": stored(f"{n}.{e}", whole[n][32 * e : 32 * (e + 1)])
             for n in "gud" for e in range(3)}  # fmt: skip
    each = computed(body, "\n".join(f"weight {n} 32x32 f32" for n in parts), namespace,
                    weights=parts, x=x)  # fmt: skip
    p, e = m.read("p"), m.read("e")
    outs = np.stack([each.read(f"y{n}") for n in range(3)], 1)
    want = (p[:, :, None] * np.take_along_axis(outs, e[:, :, None], 1)).sum(1)
    close(m.read("y"), want, 1e-5)


# --- the contract


@pytest.mark.parametrize("seed", range(12))
def test_both_namespaces_and_both_levels_agree(seed: int) -> None:
    program = random_program(np.random.default_rng(100 + seed), length=16)
    weights = random_weights(program, seed)
    runners = [
        Runner(optimise(program, level), weights, namespace=namespace)
        for namespace in ("numpy", "torch")
        for level in (0, 1)
    ]
    for work in ({"a": [1, 2, 3, 4, 5, 6], "b": [7, 8]}, {"b": [9], "c": [10, 11], "a": [12]}):
        first, *others = [np.concatenate(list(r.cycle(work).values())) for r in runners]
        assert np.isfinite(first).all()
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-5, atol=1e-5)


@on_both
def test_no_rows_at_all(namespace: str) -> None:
    program = op_program(
        "embed x, ids, t\nnorm n, x, w\nlinear q, n, a\nrope r, q   heads=2\nstore kv[0], r, r\n"
        "attend y, r, kv[0]   heads=2\nlstm z, y, hc[0], i, s\nroute p, e, z, m   experts=2 top=1\n"
        "experts f, z, p, e, g, g, d   experts=2\npick l, f\nlinear logits, l, t   act=bf16\n"
        "softmax o, logits   groups=2\nsample next, o\npool v, f   kind=max",
        "input ids tok ids\nweight t 6x4 f32\nweight w 1x4 f32\nweight a 4x4 f32\n"
        "weight i 16x4 f32\nweight s 16x4 f32\nweight m 2x4 f32\nweight g 6x4 f32\n"
        "weight d 8x3 f32\nstate kv[1] paged heads=2 key=2 value=2 format=f16\n"
        "state hc[1] fixed width=8",
    )
    machine = loaded(program, random_weights(program), namespace)
    for spans in ([], [(0, 0)], [(0, 0), (3, 0)], [(0, 2)]):
        rows = sum(count for _, count in spans)
        machine.bind(batch_of(program, spans, ids=np.zeros((rows, 1), np.int32)))
        machine.run("step")
        machine.commit()
        assert machine.read("f").shape == (rows, 4)
        assert machine.read("next").shape == (0, 1)
        assert machine.read("v").shape == (len(spans), 4)


@on_both
def test_ticks_bound_every_instruction(namespace: str) -> None:
    x = numbers(TOTAL, 4)
    m = computed("act a, x\nact b, a\nact c, b", "", namespace, x=x)
    ticks = m.run("step", 1)
    assert ticks.first == 1
    assert ticks.table.shape == (2, 1, 2)
    stamps = [ticks.begin, *ticks.table.reshape(-1), ticks.end]
    assert stamps == sorted(stamps)
    assert (m.traits.tick_source, m.traits.tick_rate, m.traits.threads) == ("wall", 1e9, 1)
    assert m.traits.gradients == (namespace == "torch")


@on_both
def test_copy_takes_pages_of_every_state_of_the_name(namespace: str) -> None:
    program = op_program(
        "store kv[0], x, x\nstore kv[1], y, y",
        "input x tok f32 width=2\ninput y tok f32 width=2\nstate kv[2] paged heads=1 key=2 value=2",
    )
    machine = loaded(program, {}, namespace)
    machine.bind(batch_of(program, [(0, 3)], x=numbers(3, 2), y=numbers(3, 2, seed=1)))
    machine.run("step")
    machine.commit()
    machine.copy("kv", [(0, 9), (9, 7)])
    for n in range(2):
        for held in machine.scope.states[f"kv[{n}]"]:
            held = np.asarray(held)
            assert held[0].any()
            np.testing.assert_array_equal(held[7], held[0])


@on_both
def test_float64_is_the_same_machine(namespace: str) -> None:
    program = op_program(
        "norm h, x, n\nlinear y, h, w   act=q8_32",
        "input x tok f32 width=32\nweight n 1x32 f32\nweight w 3x32 f32",
    )
    weights, x = random_weights(program), numbers(TOTAL, 32)
    results = []
    for dtype in ("float32", "float64"):
        machine = loaded(program, weights, namespace, dtype)
        machine.bind(batch_of(program, SPANS, x=x))
        machine.run("step")
        assert machine.read("y").dtype == dtype
        results.append(machine.read("y"))
    close(*results, 1e-5)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(OptionError, match="namespace='cupy' is unknown; valid: numpy or torch"):
        create("array", namespace="cupy")
    with pytest.raises(OptionError, match="dtype='bf16' is unknown; valid: float32 or float64"):
        create("array", dtype="bf16")
    with pytest.raises(OptionError, match="device='cuda' needs namespace=torch"):
        create("array", device="cuda")
    program = op_program(
        "linear y, x, w",
        "input x tok f32 width=2\nweight w 3x2 f32\nstate kv[1] paged heads=1 key=2 value=2",
    )
    with pytest.raises(ProgramError, match="weight w is declared but not given"):
        loaded(program, {}, "numpy")
    with pytest.raises(ProgramError, match=r"weight w is declared as \(3, 2\), but given as"):
        loaded(program, {"w": stored("w", numbers(3, 3))}, "numpy")
    machine = loaded(program, random_weights(program), "numpy")
    good = batch_of(program, [(0, 3)], x=numbers(3, 2))
    bad: dict[str, tuple[Batch, type[LmclockError]]] = {
        "input x must be": (replace(good, inputs={"x": numbers(4, 2)}), ProgramError),
        "kv page 16 does not exist": (replace(good, pages={"kv": [np.array([16])]}), ProgramError),
        "kv page -1 does not exist": (replace(good, pages={"kv": [np.array([-1])]}), ProgramError),
        "slot 8 does not exist": (replace(good, slots=np.array([8])), ProgramError),
        "pages of 8, not of 4": (replace(good, page_size=8), ProgramError),
        "600 tok rows exceeds the capacity, 512": (
            batch_of(program, [(0, 600)], x=numbers(600, 2)), ContextError),
    }  # fmt: skip
    for message, (batch, kind) in bad.items():
        with pytest.raises(kind, match=message):
            machine.bind(batch)
    machine.bind(good)
    with pytest.raises(ProgramError, match=r"span 0\.\.2 is not within the 1 instructions"):
        machine.run("step", 0, 2)
    with pytest.raises(ProgramError, match="value y is not defined; defined are x"):
        machine.read("y")


def test_a_position_without_a_page_is_refused() -> None:
    program = op_program(
        "store kv[0], x, x", "input x tok f32 width=2\nstate kv[1] paged heads=1 key=2 value=2"
    )
    machine = loaded(program, {}, "numpy")
    batch = batch_of(program, [(0, 5)], x=numbers(5, 2))
    machine.bind(replace(batch, pages={"kv": [np.array([3])]}))
    with pytest.raises(ProgramError, match=r"reaches page 1 .* gives it 1 pages"):
        machine.run("step")


def test_a_machine_on_numpy_does_not_load_torch() -> None:
    code = ("import sys; from lmclock.machines import create; create('array'); "
            "sys.exit('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_runner_reads_the_rows_of_each_sequence() -> None:
    """The helper other tests lean on: rows come back under the right names."""
    program = op_program("embed x, ids, t\npick logits, x", "input ids tok ids\nweight t 9x1 f32")
    runner = Runner(program, {"t": stored("t", np.arange(9.0)[:, None])})
    rows = runner.cycle({"b": [1, 2, 3], "none": [], "a": [4]}, pick="all", padding=2)
    assert {k: v.ravel().tolist() for k, v in rows.items()} == {"b": [1, 2, 3], "none": [],
                                                                "a": [4]}  # fmt: skip
    assert runner.cycle({"a": [5, 6]})["a"].tolist() == [[6]]
