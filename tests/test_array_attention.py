"""`rope`, `store` and `attend` of the array machine against complex numbers and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmclock.batch import Batch, Rows
from lmclock.formats import get_format, unpack
from lmclock.machines.array_attend import position_buckets
from lmclock.packing import pack
from tests.helpers import (
    PAGE_SIZE,
    SPANS,
    TOTAL,
    batch_of,
    close,
    computed,
    loaded,
    numbers,
    on_both,
    op_program,
    stored,
)


@pytest.mark.parametrize("options", ["", "dims=4", "scale=1.25 base=500.0", "freqs=f"])
@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
@on_both
def test_rope_is_a_turn_in_the_complex_plane(namespace: str, pairs: str, options: str) -> None:
    x, freqs = numbers(TOTAL, 3 * 8), np.array([[1.0, 0.3, 0.05, 0.007]], np.float32)
    m = computed(f"rope y, x   heads=3 pairs={pairs} {options}", "weight f 1x4 f32", namespace,
                 spans=[(1000, 4), (0, 1), (0, 0), (31000, 5)],
                 weights={"f": stored("f", freqs)}, x=x)  # fmt: skip
    dims = 4 if "dims" in options else 8
    base = 500.0 if "base" in options else 10000.0
    speed = freqs[0] if "freqs" in options else base ** (-np.arange(dims // 2) * 2 / dims)
    position = np.concatenate([np.arange(1000, 1004), [0], np.arange(31000, 31005)])
    turn = np.exp(1j * position[:, None] * speed.astype(np.float64)) * (
        1.25 if "scale" in options else 1
    )
    first = np.arange(dims // 2) * (1 if pairs == "halves" else 2)
    second = first + (dims // 2 if pairs == "halves" else 1)
    heads = x.astype(np.float64).reshape(TOTAL, 3, 8)
    turned = (heads[:, :, first] + 1j * heads[:, :, second]) * turn[:, None, :]
    heads[:, :, first], heads[:, :, second] = turned.real, turned.imag
    close(m.read("y"), heads.reshape(TOTAL, 24), 1e-6)


def attend_plainly(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, at: np.ndarray, positions: np.ndarray, i: Any
) -> np.ndarray:
    """One sequence, head by head and key by key in float64; q (rows, heads, key) and so on."""
    y = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for row, here in enumerate(at):
        for head in range(q.shape[1]):
            h = head // (q.shape[1] // k.shape[1])
            scores, seen = [], []
            for j, there in enumerate(positions):
                s = float(q[row, head].astype(np.float64) @ k[j, h]) * i["qk_scale"]
                s = i["softcap"] * np.tanh(s / i["softcap"]) if i["softcap"] else s
                if "bias" in i:
                    s += i["bias"](there - here)[head]
                if (i["mask"] == "full" or there <= here) and there > here - (i["window"] or 1e9):
                    scores.append(s)
                    seen.append(v[j, h])
            if seen:
                weights = np.exp(np.array(scores) - max(scores))
                y[row, head] = weights / weights.sum() @ np.array(seen)
    return y.reshape(q.shape[0], q.shape[1] * v.shape[2])


ATTEND = [
    {},
    {"mask": "full"},
    {"window": 3},
    {"softcap": 0.7, "qk_scale": 1.5},
    {"mask": "full", "window": 2},
]


@pytest.mark.parametrize("options", ATTEND, ids=str)
@on_both
def test_attend_over_plain_values(namespace: str, options: dict[str, Any]) -> None:
    q, k, v = numbers(TOTAL, 6 * 4), numbers(TOTAL, 2 * 4, seed=1), numbers(TOTAL, 2 * 5, seed=2)
    words = " ".join(f"{name}={value}" for name, value in options.items())
    m = computed(f"attend y, q, k, v   heads=6 kv_heads=2 {words}", "", namespace, q=q, k=k, v=v)
    i = {"mask": "causal", "window": 0, "softcap": 0, "qk_scale": 0.5} | options
    rows = Rows.of(SPANS)
    want = []
    for n in range(len(SPANS)):
        here = slice(rows.starts[n], rows.starts[n + 1])
        parts = (x[here].reshape(-1, heads, width)
                 for x, heads, width in ((q, 6, 4), (k, 2, 4), (v, 2, 5)))  # fmt: skip
        want.append(attend_plainly(*parts, rows.positions[here], rows.positions[here], i))
    close(m.read("y"), np.concatenate(want), 5e-6)


@pytest.mark.parametrize("form", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("options", [*ATTEND[:1], ATTEND[2]], ids=str)
@on_both
def test_attend_over_pages_rounded_like_their_format(
    namespace: str, options: dict[str, Any], form: str
) -> None:
    """Three cycles of two sequences; what a row sees is what the format keeps."""
    words = " ".join(f"{name}={value}" for name, value in options.items())
    program = op_program(
        f"store kv[0], k, v\nattend y, q, kv[0]   heads=2 kv_heads=1 {words}",
        "input q tok f32 width=64\ninput k tok f32 width=32\ninput v tok f32 width=64\n"
        f"state kv[1] paged heads=1 key=32 value=64 format={form}",
    )
    machine = loaded(program, {}, namespace)
    q, k, v = (numbers(2, 12, width, seed=s) for s, width in ((0, 64), (1, 32), (2, 64)))
    i = {"mask": "causal", "window": 0, "softcap": 0, "qk_scale": 32**-0.5} | options
    fmt = get_format(form)
    for cuts in (((0, 5), (0, 1)), ((5, 1), (1, 1)), ((6, 6), (2, 9))):
        parts = [np.concatenate([x[n, at : at + count] for n, (at, count) in enumerate(cuts)])
                 for x in (q, k, v)]  # fmt: skip
        machine.bind(batch_of(program, list(cuts), q=parts[0], k=parts[1], v=parts[2]))
        machine.run("step")
        machine.commit()
        want = []
        for n, (at, count) in enumerate(cuts):
            kept = [unpack(fmt, pack(fmt, x[n, : at + count]), at + count, x.shape[2])[:, None, :]
                    for x in (k, v)]  # fmt: skip
            queries = q[n, at : at + count].reshape(count, 2, 32)
            positions = np.arange(at + count)
            want.append(attend_plainly(queries, *kept, positions[at:], positions, i))
        close(machine.read("y"), np.concatenate(want), 5e-6)


@pytest.mark.parametrize("mask", ["causal", "full"])
@on_both
def test_relative_position_bias(namespace: str, mask: str) -> None:
    q, k, v, table = numbers(9, 6), numbers(9, 6, seed=1), numbers(9, 6, seed=2), numbers(8, 2)
    m = computed(f"attend y, q, k, v   heads=2 mask={mask} rel_bias=t max_distance=20",
                 "weight t 8x2 f32", namespace, spans=[(0, 9)],
                 weights={"t": stored("t", table)}, q=q, k=k, v=v)  # fmt: skip

    def bias(distance: int) -> np.ndarray:
        return table[position_buckets(np.array([distance]), 8, 20, both_ways=mask == "full")[0]]

    i = {"mask": mask, "window": 0, "softcap": 0, "qk_scale": 3**-0.5, "bias": bias}
    parts = (x.reshape(9, 2, 3) for x in (q, k, v))
    close(m.read("y"), attend_plainly(*parts, np.arange(9), np.arange(9), i), 5e-6)


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (16, 1000)])
def test_position_buckets_are_those_of_t5(buckets: int, longest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-1500, 1500)
    for both in (True, False):
        want = T5Attention._relative_position_bucket(
            torch.tensor(distance), both, buckets, longest
        ).numpy()
        np.testing.assert_array_equal(position_buckets(distance, buckets, longest, both), want)


@on_both
def test_keys_of_another_space(namespace: str) -> None:
    """Cross-attention within one section; a sequence without source rows sees nothing."""
    program = op_program(
        "attend y, q, k, v   mask=full",
        "input q tok f32 width=3\ninput k src f32 width=3\ninput v src f32 width=2",
        "train",
    )
    q, k, v = numbers(4, 3), numbers(5, 3, seed=1), numbers(5, 2, seed=2)
    machine = loaded(program, {}, namespace)
    rows = {"tok": Rows.of([(0, 2), (0, 1), (0, 1)]), "src": Rows.of([(0, 3), (0, 0), (0, 2)])}
    machine.bind(Batch(rows, {"q": q, "k": k, "v": v}, np.arange(3), page_size=PAGE_SIZE))
    machine.run("train")
    y = machine.read("y")
    for row, keys in ((0, slice(0, 3)), (1, slice(0, 3)), (3, slice(3, 5))):
        weights = np.exp(k[keys] @ q[row] / np.sqrt(3))
        close(y[row], weights @ v[keys] / weights.sum())
    assert not y[2].any()


@on_both
def test_states_of_a_training_section_are_its_own(namespace: str) -> None:
    """`store` and `attend` through a state equal attention over plain values, and write nothing."""
    state = "state kv[1] paged heads=1 key=4 value=4"
    q, k, v = (numbers(TOTAL, width, seed=width) for width in (8, 4, 4))
    plain = computed("attend y, q, k, v   heads=2 kv_heads=1", state, namespace, section="train",
                     q=q, k=k, v=v)  # fmt: skip
    through = computed("store kv[0], k, v\nattend y, q, kv[0]   heads=2 kv_heads=1", state,
                       namespace, section="train", q=q, k=k, v=v)  # fmt: skip
    np.testing.assert_array_equal(through.read("y"), plain.read("y"))
    assert not any(np.asarray(x).any() for x in through.scope.states["kv[0]"])
