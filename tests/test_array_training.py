"""Loss, dropout and gradients of the array machine."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmclock.batch import Rows
from lmclock.isa import ACTIVATIONS
from tests.helpers import (
    SPANS,
    TOTAL,
    batch_of,
    close,
    computed,
    loaded,
    numbers,
    on_both,
    op_program,
    random_weights,
)


@on_both
def test_cross_entropy_leaves_out_ignored_rows(namespace: str) -> None:
    y = numbers(TOTAL, 7) * 30
    target = np.array([[1], [-100], [6], [0], [-100], [2], [2], [5], [-100], [3]], np.int32)
    m = computed("loss l, y, t", "", namespace, section="train", y=y, t=target)
    starts = Rows.of(SPANS).starts
    for n, (a, b) in enumerate(pairwise(starts)):
        counted = (target[a:b] != -100).any()
        want = (
            F.cross_entropy(
                torch.tensor(y[a:b], dtype=torch.float64),
                torch.tensor(target[a:b, 0], dtype=torch.long),
            )
            if counted
            else 0
        )
        close(m.read("l")[n, 0], float(want), 1e-5)


def test_dropout_follows_the_seed() -> None:
    x = np.ones((400, 50), np.float32)
    seen = {}
    for namespace in ("numpy", "torch"):
        m = computed("dropout y, x   p=0.25\ndropout z, x   p=0.25", "", namespace,
                     spans=[(0, 400)], section="train", x=x)  # fmt: skip
        first, other = m.read("y"), m.read("z")
        m.run("train")
        np.testing.assert_array_equal(m.read("y"), first)
        m.seed = 1
        m.run("train")
        assert (m.read("y") != first).any()
        assert (first != other).any()
        seen[namespace] = first
    np.testing.assert_array_equal(seen["numpy"], seen["torch"])
    assert set(np.unique(first)) == {np.float32(0), np.float32(1 / 0.75)}
    # 20 000 draws: five standard deviations are 0.0153
    assert abs((first == 0).mean() - 0.25) < 0.0153
    still = computed("dropout y, x   p=0.25", "", "numpy", spans=[(0, 400)], x=x)
    np.testing.assert_array_equal(still.read("y"), x)


DIFFERENTIABLE = {
    "norm": "norm y, x, n   kind=layer bias=b",
    "linear": "linear y, x, w   bias=b scale=0.5",
    "rope": "rope y, x   heads=2 pairs=adjacent",
    "state": "linear k, x, w\nstore kv[0], k, x\nattend y, x, kv[0]   heads=3 softcap=2.0",
    "bias": "linear k, x, w\nattend y, x, k, k   heads=3 rel_bias=t mask=full",
    "act": "\n".join(f"act a{n}, {f'a{n - 1}' if n else 'x'}   kind={kind} cap=2.0"
                     for n, kind in enumerate(ACTIVATIONS)) + "\nbinary y, a7, x   kind=mul",
    "softmax": "softmax s, x   groups=3\nsoftmax y, s   log=1",
    "lstm": "lstm y, x, hc[0], in, st   bias=lb reverse=1",
    "experts": "route p, e, x, r   experts=2 top=1 renorm=0\n"
               "experts y, x, p, e, g, g, d   experts=2",
    "embed": "embed e, ids, w   scale=3.0\nbinary y, e, x",
    "dropout": "dropout y, x   p=0.5",
    "concat": "concat c, x, x\nsoftmax s, c\nlinear y, s, wide",
}  # fmt: skip


@pytest.mark.parametrize("body", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("end", ["mse", "pool"])
def test_gradients_are_the_slopes(body: str, end: str) -> None:
    """Directional derivatives in float64 against central differences of the same program."""
    last = {
        "mse": "loss l, y, target   kind=mse",
        "pool": "pool m, y   kind=mean\npool o, y   kind=max\nbinary q, m, o   kind=mul\n"
                "loss l, q, class",
    }[end]  # fmt: skip
    program = op_program(
        f"linear x, given, first\n{body}\n{last}",
        "input given tok f32 width=3\ninput ids tok ids\ninput target tok f32 width=12\n"
        "input class seq ids\nweight first 12x3 f32\nweight n 1x12 f32\nweight b 1x12 f32\n"
        "weight w 12x12 f32\nweight wide 12x24 f32\nweight t 4x3 f32\nweight in 48x12 f32\n"
        "weight st 48x12 f32\nweight lb 1x48 f32\nweight r 2x12 f32\nweight g 10x12 f32\n"
        "weight d 24x5 f32\nstate kv[1] paged heads=3 key=4 value=4\nstate hc[1] fixed width=24",
        "train",
    )
    machine = loaded(program, random_weights(program), "torch", "float64")
    machine.bind(
        batch_of(
            program,
            SPANS,
            given=numbers(TOTAL, 3),
            target=numbers(TOTAL, 12),
            ids=np.arange(TOTAL)[:, None],
            **{"class": np.array([[3]] * 4)},
        )
    )

    def total() -> Any:
        machine.run("train")
        return machine.value("l").sum()

    total().backward()
    used = {n for i in program.section("train").instructions for n in i.all_weights()}
    rng = np.random.default_rng(5)
    for name in used:
        w = machine.weights[name]
        direction = torch.tensor(rng.standard_normal(tuple(w.shape)))
        slope = float((w.grad * direction).sum())
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                w += step * direction
            ends.append(float(total().detach()))
            with torch.no_grad():
                w -= step * direction
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7), name


@on_both
def test_an_lstm_in_training_starts_from_zeros_and_leaves_its_state(namespace: str) -> None:
    program = op_program("lstm y, x, hc[0], a, b\nlstm z, x, a, b",
                         "input x tok f32 width=2\nweight a 12x2 f32\nweight b 12x3 f32\n"
                         "state hc[1] fixed width=6", "train")  # fmt: skip
    machine = loaded(program, random_weights(program), namespace)
    machine.scope.states["hc[0]"][...] = 0.5
    machine.bind(batch_of(program, [(3, 4)], x=numbers(4, 2)))
    machine.run("train")
    machine.commit()
    np.testing.assert_array_equal(machine.read("y"), machine.read("z"))
    assert (machine.scope.states["hc[0]"] == 0.5).all()


def test_rounding_lets_the_gradient_through() -> None:
    for act in ("q8_32", "bf16"):
        grads = []
        for how in (act, "none"):
            m = computed(f"linear h, x, a\nlinear y, h, b   act={how}\npool p, y\n"
                         "loss l, p, p   kind=mse", "weight a 32x4 f32\nweight b 1x32 f32",
                         "torch", section="train", x=numbers(TOTAL, 4))  # fmt: skip
            m.value("y").sum().backward()
            grads.append(m.weights["a"].grad.numpy())
        assert abs(grads[0]).max() > 0
        np.testing.assert_array_equal(*grads)
