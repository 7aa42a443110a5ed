"""Settings, and the tokens machines draw by them: exact distributions, order of filters, seeds.

The exact probabilities are computed here from the definitions, sharing no code with a machine.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from lmclock import listing
from lmclock.batch import ADJUST, SAMPLING, Batch, Rows
from lmclock.engine import Sampling
from lmclock.engine.sampling import Tally
from lmclock.errors import OptionError
from lmclock.machines import Capacity, Machine, create
from lmclock.verify import verify
from tests.helpers import stored

LOGITS = np.array([1.2, -0.5, 2.0, 0.3, 2.0, -1.5, 0.9, 1.8, -3.0, 0.0], np.float32)
VOCABULARY = len(LOGITS)
DRAWS = 2500
MACHINES = ("array", "native")


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Any:
    """A machine whose logits are LOGITS in every row."""
    program = verify(
        listing.parse(
            f"""program  draws "draws"
            input    ids tok ids
            weight   table 1x{VOCABULARY} f32
            section  step
            embed    x, ids, table
            pick     logits, x
            sample   next, logits"""
        )
    )
    made: Machine = create(request.param)
    weights: dict[str, Any] = {"table": stored("table", LOGITS[None])}
    made.load(program, weights, Capacity(rows=DRAWS, picks=DRAWS, slots=1, page_size=4))
    yield made
    made.close()


def drawn(machine: Machine, sampling: Sampling, seen: list[int] | None = None) -> np.ndarray:
    """(DRAWS,) tokens: draw 0, 1, ... of the sampling's seed, after the tokens `seen`."""
    records = np.repeat(sampling.record(), DRAWS)
    records["draw"] = np.arange(DRAWS)
    tally = Tally(sampling, seen or [])
    adjust = np.concatenate([tally.of_row(row) for row in range(DRAWS)])
    machine.bind(
        Batch(
            rows={"tok": Rows.of([(0, DRAWS)])},
            inputs={"ids": np.zeros((DRAWS, 1), np.int32)},
            slots=np.zeros(1, np.int32),
            page_size=4,
            pick=np.arange(DRAWS, dtype=np.int32),
            sampling=records,
            adjust=adjust,
        )
    )
    machine.run("step")
    tokens = machine.read("next").reshape(-1).astype(int)
    machine.commit()
    return tokens


def exact(s: Sampling, seen: list[int]) -> np.ndarray:
    """(VOCABULARY,) probabilities by the documented order of filters."""
    x = LOGITS.astype(np.float64)
    counts = Counter(seen[-s.window :] if s.window else seen)
    for token, count in counts.items():
        x[token] = x[token] / s.repetition if x[token] > 0 else x[token] * s.repetition
        x[token] -= s.presence + s.frequency * count
    for token, bias in s.logit_bias.items():
        x[token] += bias
    if s.temperature == 0:
        return np.eye(VOCABULARY)[min(range(VOCABULARY), key=lambda t: (-x[t], t))]
    order = sorted(range(VOCABULARY), key=lambda t: (-x[t], t))
    order = order[: s.top_k or VOCABULARY]
    p = np.exp(x - x.max())
    p /= p[order].sum()
    kept: list[int] = []
    for token in order:
        if sum(p[kept]) >= s.top_p - 1e-12:
            break
        kept.append(token)
    kept = [t for t in kept if p[t] >= s.min_p * p[order[0]]]
    tempered = np.zeros(VOCABULARY)
    tempered[kept] = np.exp((x[kept] - x.max()) / s.temperature)
    return tempered / tempered.sum()


CASES = {
    "temperature": Sampling(0.7),
    "hot": Sampling(2.5),
    "top_k": Sampling(1.0, top_k=4),
    "top_p": Sampling(1.0, top_p=0.8),
    "min_p": Sampling(1.0, min_p=0.2),
    "repetition": Sampling(1.0, repetition=1.8),
    "presence": Sampling(1.0, presence=1.1),
    "frequency": Sampling(1.0, frequency=0.6),
    "window": Sampling(1.0, frequency=0.9, window=3),
    "bias": Sampling(1.0, logit_bias={4: -float("inf"), 5: 3.0}),
    "everything": Sampling(0.8, 6, 0.9, 0.1, 1.2, 0.3, 0.2, window=5, logit_bias={1: 2.0, 2: -1.0}),
}
SEEN = [2, 2, 8, 4, 2, 6, 8]


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(machine: Machine, name: str) -> None:
    """Chi-square over a seed's first draws, which are fixed, so the outcome is too."""
    p = exact(CASES[name], SEEN)
    seen = np.bincount(drawn(machine, CASES[name], SEEN), minlength=VOCABULARY)
    assert not seen[p == 0].any()
    assert chisquare(seen[p > 0], DRAWS * p[p > 0]).pvalue > 0.001
    plain = exact(Sampling(1.0), [])
    assert chisquare(seen, DRAWS * plain).pvalue < 1e-6, "the setting has no effect"


def test_top_p_looks_at_untempered_probabilities(machine: Machine) -> None:
    """At a high temperature top_p=0.49 still keeps the few tokens that hold half of the mass."""
    few = np.count_nonzero(exact(Sampling(1.0, top_p=0.49), []))
    assert len(set(drawn(machine, Sampling(50.0, top_p=0.49)))) == few == 2


def test_top_p_follows_top_k_and_min_p_looks_at_the_best(machine: Machine) -> None:
    """Of the best three, renormalised, the first two hold over 0.6; without top_k they do not."""
    assert set(drawn(machine, Sampling(1.0, top_k=3, top_p=0.6))) == {2, 4}
    assert set(drawn(machine, Sampling(1.0, top_p=0.6))) > {2, 4}


def test_greedy_takes_the_lowest_of_equals_after_penalties_and_biases(machine: Machine) -> None:
    assert set(drawn(machine, Sampling())) == {2}
    assert set(drawn(machine, Sampling(presence=0.1), [2])) == {4}
    assert set(drawn(machine, Sampling(logit_bias={7: 0.25}))) == {7}
    assert set(drawn(machine, Sampling(top_k=1, temperature=1.0))) == {2}


def test_seeds_are_independent_streams(machine: Machine) -> None:
    one, again, other = (drawn(machine, Sampling(1.0, seed=s)) for s in (1, 1, 2**64 - 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    p = exact(Sampling(1.0), [])
    pairs = np.bincount(one * VOCABULARY + other, minlength=VOCABULARY**2)
    together = np.outer(p, p).reshape(-1)
    often = together * DRAWS >= 5
    expected = np.append(together[often], together[~often].sum()) * DRAWS
    assert chisquare(np.append(pairs[often], pairs[~often].sum()), expected).pvalue > 0.001


@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    prompt=st.integers(1, 12),
    window=st.integers(0, 6),
    bias=st.dictionaries(st.integers(0, 7), st.integers(-3, 3)),
)
def test_a_tally_is_a_count_over_the_window(
    tokens: list[int], prompt: int, window: int, bias: dict[int, float]
) -> None:
    tally = Tally(Sampling(presence=1.0, window=window, logit_bias=bias), tokens[:prompt])
    for length in range(prompt + 1, len(tokens) + 1):
        tally.add(tokens[:length])
    records = tally.of_row(3)
    assert set(records["row"]) <= {3} and len(set(records["id"])) == len(records)
    counts = Counter(tokens[-window:] if window else tokens)
    for record in records:
        assert record["count"] == counts.pop(int(record["id"]), 0)
        assert record["bias"] == bias.get(int(record["id"]), 0)
    assert not counts and set(bias) <= set(records["id"].tolist())


def test_a_tally_of_many_distinct_tokens_grows() -> None:
    tokens = list(range(100))
    tally = Tally(Sampling(frequency=1.0, window=0), tokens)
    records = tally.of_row(0)
    assert records["id"].tolist() == tokens and (records["count"] == 1).all()
    assert records.dtype == ADJUST


def test_the_record_holds_the_settings() -> None:
    s = Sampling(0.5, 3, 0.9, 0.1, 1.1, 0.2, 0.3, seed=2**64 - 1)
    record = s.record()
    assert record.dtype == SAMPLING and record["draw"] == 0
    for name in set(SAMPLING.names or ()) - {"draw"}:
        assert record[name][0] == pytest.approx(getattr(s, name)), name


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", (-1, -1e-9, 1e30, float("nan"), float("inf"), "1", None, 1e-40)),
        ("top_k", (-1, 2**31, 1.5, float("nan"), True, None)),
        ("top_p", (0, -1, 2, float("nan"), "all")),
        ("min_p", (-0.1, 1.1, float("nan"))),
        ("repetition", (0, -1, 1e9, float("nan"))),
        ("presence", (-101, 1e9, float("inf"), float("nan"))),
        ("frequency", (-101, 1e9, float("inf"), float("nan"))),
        ("window", (-1, 2**31, 0.5)),
        ("seed", (-1, 2**64, 1.0)),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(field: str, bad: tuple[Any, ...]) -> None:
    for value in bad:
        with pytest.raises(OptionError) as error:
            Sampling(**{field: value})
        assert f"{field}={value!r} is out of range; valid: " in str(error.value)


@pytest.mark.parametrize("bias", [{-1: 0}, {2**31: 0}, {"a": 0}, {0: 101}, {0: float("nan")}])
def test_a_bias_out_of_range_is_named(bias: dict[Any, Any]) -> None:
    with pytest.raises(OptionError, match=r"logit_bias .*valid"):
        Sampling(logit_bias=bias)
