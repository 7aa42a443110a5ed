"""The sampling rule: step by step against a literal transcription, and as a distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lmclock.batch import ADJUST
from lmclock.errors import LmclockError, ProgramError
from lmclock.machines.array_sample import adjusted, draw_id, kept_ids, sample_row, uniform
from tests.helpers import Runner, greedy, on_both, op_program, sampling, stored


def one(**settings: float) -> Any:
    return sampling(1, **settings)[0]


def records(*rows: tuple[int, int, int, float]) -> np.ndarray:
    """(row, id, count, bias) each."""
    return np.array(list(rows), ADJUST)


NONE = records()


def test_the_generator_is_splitmix64() -> None:
    """Outputs for state 1234567 as published with the generator's reference code."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423,
                 4593380528125082431, 16408922859458223821]  # fmt: skip
    got = [uniform(1234567, draw) for draw in range(5)]
    assert got == [(number >> 11) / 2**53 for number in published]
    assert uniform(2**64 - 1, 2**64 - 1) < 1


def sampled_literally(x: list[float], settings: Any) -> int:
    """The rule word for word, on Python numbers, without penalties."""
    ids = list(range(len(x)))
    if settings["temperature"] == 0:
        return max(ids, key=lambda n: (x[n], -n))
    if settings["top_k"]:
        ids = sorted(ids, key=lambda n: (-x[n], n))[: settings["top_k"]]
    top = max(x[n] for n in ids)
    weight = {n: math.exp(x[n] - top) for n in ids}
    p = {n: weight[n] / sum(weight.values()) for n in ids}
    ids.sort(key=lambda n: (-p[n], n))
    if settings["top_p"] < 1:
        total, kept = 0.0, []
        for n in ids:
            kept.append(n)
            total += p[n]
            if total >= settings["top_p"]:
                break
        ids = kept
    ids = sorted(n for n in ids if p[n] >= float(settings["min_p"]) * max(p.values()))
    heat = float(settings["temperature"])
    weights = [math.exp((x[n] - top) / heat) for n in ids]
    u, total = uniform(int(settings["seed"]), int(settings["draw"])), 0.0
    for n, w in zip(ids, weights, strict=True):
        total += w
        if total > u * sum(weights):
            return n
    return ids[-1]


@given(
    # Few distinct logits, so that ties are the rule.
    x=st.lists(st.integers(-4, 4).map(lambda n: n / 2), min_size=1, max_size=9),
    top_k=st.integers(0, 10),
    top_p=st.sampled_from([0.0, 0.1, 0.37, 0.7, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.61, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 5),
)
def test_every_step_is_the_literal_one(x: list[float], **settings: float) -> None:
    record = one(**settings)
    assert sample_row(np.array(x, np.float32), record, NONE) == sampled_literally(x, record)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3]),  # 0 and 4 are equal: the lower id
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [1]),  # exactly enough
        ({"top_p": 0.50001}, [1, 3]),
        ({"top_p": 0.8}, [0, 1, 3]),
        ({"top_p": 0.0}, [1]),
        ({"min_p": 0.25}, [0, 1, 3, 4]),
        ({"min_p": 0.6}, [1]),
        ({"top_k": 4, "top_p": 0.99, "min_p": 0.3}, [1, 3]),
    ],
)
def test_what_the_filters_keep(settings: dict[str, float], want: list[int]) -> None:
    x = np.log(np.array([2, 8, 1, 3.0, 2]) / 16)
    assert list(kept_ids(x, one(**settings))) == want


def test_equal_probabilities_of_different_logits_are_a_tie() -> None:
    x = np.array([0.0, 1e-17])
    assert list(kept_ids(x, one(top_k=1))) == [1]
    assert list(kept_ids(x, one(top_p=0.5))) == [0]


def test_penalties_come_before_biases() -> None:
    x = np.array([3.0, -3.0, 1.0, 0.5], np.float32)
    adjust = records((0, 0, 2, 0.25), (0, 1, 1, 0), (0, 3, 0, -2))
    record = one(repetition=1.5, frequency=0.5, presence=0.125)
    want = [3 / 1.5 - 0.5 * 2 - 0.125 + 0.25, -3 * 1.5 - 0.5 - 0.125, 1, 0.5 - 2]
    np.testing.assert_allclose(adjusted(x, record, adjust), want, rtol=1e-15)
    assert x[0] == 3, "the logits themselves stay"
    assert sample_row(x, one(), NONE) == 0
    assert sample_row(x, one(), records((0, 0, 0, -np.inf))) == 2


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20 000 draws; their seeds are fixed, so the outcome is too."""
    x = np.array([1.0, 0.0, 2.0, 1.0, -1.0, 0.5], np.float32)
    heat, count = 0.8, 20_000
    for settings in ({}, {"top_k": 4, "min_p": 0.2}, {"top_p": 0.9}):
        record = one(temperature=heat, seed=42, **settings)
        ids = kept_ids(x.astype(np.float64), record)
        assert len(ids) == 6 if not settings else len(ids) < 6
        p = np.exp(x[ids].astype(np.float64) / heat)
        for vary in ("draw", "seed"):
            seen = np.zeros(6)
            for n in range(count):
                record[vary] = n
                seen[sample_row(x, record, NONE)] += 1
            assert seen[ids].sum() == count
            assert chisquare(seen[ids], count * p / p.sum()).pvalue > 0.001


def test_cold_draws_do_not_overflow() -> None:
    x = np.array([1e4, 1e4 - 1, -1e4], np.float32)
    assert sample_row(x, one(temperature=1e-3, seed=3), NONE) == 0


def test_the_end_of_the_range_falls_on_the_last_kept_id() -> None:
    p = np.array([0.25, 0.5, 0.25])
    ids = np.array([2, 5, 9])
    cases = ((0, 2), (0.2499, 2), (0.25, 5), (0.75, 9), (1.0, 9))
    assert [draw_id(ids, p, u) for u, _ in cases] == [want for _, want in cases]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(LmclockError, match=f"their maximum is {bad}"):
        sample_row(np.array([1, bad, 2], np.float32), one(temperature=temperature), NONE)
    with pytest.raises(LmclockError, match="their maximum is -inf"):
        sample_row(np.full(3, -np.inf, np.float32), one(temperature=temperature), NONE)


@on_both
def test_every_row_has_its_own_settings(namespace: str) -> None:
    program = op_program("embed x, ids, t\npick logits, x\nsample next, logits",
                         "input ids tok ids\nweight t 3x4 f32")  # fmt: skip
    table = np.array([[0, 1, 2, 3], [5, 4, 4, 5], [0, 0, 0, 1.0]])
    runner = Runner(program, {"t": stored("t", table)}, namespace=namespace)
    settings = greedy(3)
    settings[2] = one(temperature=1.0, seed=7, draw=1)
    adjust = records((0, 3, 0, -9), (1, 0, 3, 0.0), (1, 3, 0, -0.5))
    settings["presence"][1] = 2
    batch = runner.batch({"a": [0, 1, 2]}, pick="all", sampling=settings, adjust=adjust)
    runner.machine.bind(batch)
    for _ in range(2):
        runner.machine.run("step")
        third = sampled_literally([0, 0, 0, 1.0], settings[2])
        assert runner.machine.read("next").ravel().tolist() == [2, 3, third]
    for change, message in (
        ({"sampling": settings[:2]}, "3 rows need as many sampling records, not 2"),
        ({"adjust": records((1, 4, 0, 0.0))}, "token 4 to adjust is none; valid: 0 to 3"),
    ):
        runner.machine.bind(replace(batch, **change))
        with pytest.raises(ProgramError, match=message):
            runner.machine.run("step")


def test_u_has_53_bits() -> None:
    for draw in range(100):
        assert Fraction(uniform(9, draw)).denominator <= 2**53
