"""The arithmetic behind the reports of bench/: ratios, fits, knees, goals, stages; no engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bench import (
    batch,
    depth,
    peers,
    plots,
    prefill,
    quality,
    random_models,
    scale,
    stages,
    summary,
)
from bench.engines import rate_of
from bench.stages import Goal, Plan, Stage, Store
from lmclock.formats import FORMATS, first_bad_block, unpack
from lmclock.model import load


def round_of(**values: float) -> dict[str, float]:
    """One round, `worker__job=value`."""
    return {name.replace("__", "|").replace("_", " "): value for name, value in values.items()}


# --- stages


class Fake:
    """A worker whose jobs return how often any was asked."""

    def __init__(self, *jobs: str) -> None:
        self.jobs, self.about, self.asked, self.closed = list(jobs), {"notes": ["hello"]}, 0, False

    def ask(self, job: str) -> float:
        self.asked += 1
        return float(self.asked)

    def close(self) -> None:
        self.closed = True


def begin(**workers: Fake) -> stages.Start:
    return lambda: (dict(workers), ["nobody was skipped: it is not there."])  # type: ignore[arg-type]


def test_rounds_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    store, one = Store("peers", tmp_path), Fake("a", "b")
    store.measure("x", Plan(rounds=2), begin(one=one))
    assert one.closed and one.asked == 6, "a warm round is not kept"
    again = Store("peers", tmp_path)
    assert len(again.stage("x").rounds) == 2 and again.stage("x").about == {"one": one.about}
    other = Fake("a", "b")
    again.measure("x", Plan(rounds=3, resume=True), begin(one=other))
    assert other.asked == 4 and len(Store("peers", tmp_path).stage("x").rounds) == 3
    again.measure("x", Plan(rounds=3, resume=True), begin(one=Fake()))
    assert len(again.stage("x").rounds) == 3, "nothing is left to do"
    again.measure("x", Plan(rounds=1), begin(one=Fake("a")))
    assert len(again.stage("x").rounds) == 1, "without --resume it begins anew"


def test_time_that_is_up_begins_no_round(tmp_path: Path) -> None:
    store = Store("peers", tmp_path)
    store.measure("x", Plan(deadline=time.monotonic() - 1), begin(one=Fake("a")))
    store.measure("y", Plan(only=("x",)), begin(one=Fake("a")))
    assert not store.stage("x").rounds and not store.stage("y").rounds
    assert not store.path.exists()


def test_a_job_may_be_left_out(tmp_path: Path) -> None:
    store = Store("peers", tmp_path)
    store.measure("x", Plan(rounds=1), begin(one=Fake("a", "b")), jobs=lambda w, j: j == "b")
    assert list(store.stage("x").samples()) == [("one", "b")]


def test_ratios_are_of_the_faster_setting_and_paired() -> None:
    stage = Stage([
        {"us|decode": 1.0, "peer|decode": 9.0, "peer|decode -fa": 3.0},
        {"us|decode": 2.0, "peer|decode": 9.0, "peer|decode -fa": 8.0},
        {"us|decode": 4.0, "peer|decode": 9.0, "peer|decode -fa": 4.0},
    ])  # fmt: skip
    samples = stage.samples()
    key = stages.best(samples, [("peer", "decode"), ("peer", "decode -fa"), ("peer", "none")])
    assert key == ("peer", "decode -fa")
    assert stages.quotient(samples, key, ("us", "decode")) == 3.0
    assert stages.quotient(samples, None, ("us", "decode")) is None
    assert stages.quotient(samples, key, ("us", "prefill")) is None
    assert stage.median("peer", "decode -fa") == 4.0 and stage.median("peer", "x") is None


@pytest.mark.parametrize(
    ("goal", "reached", "shown"),
    [
        (Goal("a", 2.5, 2.0), True, "2.50x"),
        (Goal("a", 0.5, 0.6, "%"), False, "50.0 %"),
        (Goal("a", 0.3, 0.35, "s", most=True), True, "0.30 s"),
        (Goal("a", 189e6, 120e6, "B", most=True), False, "189 MB"),
        (Goal("a", None, 2.0), None, "not measured"),
    ],
)
def test_goals_say_what_was_reached(goal: Goal, reached: bool | None, shown: str) -> None:
    assert goal.reached is reached and goal.cells()[1] == shown


def test_summary_counts(tmp_path: Path) -> None:
    goals = [Goal("a", 3, 2), Goal("b", 1, 2), Goal("c", None, 2)]
    assert "1 of 3 reached, 1 not, 1 not measured" in summary.report({"peers": goals})
    store = Store("peers", tmp_path)
    store.goals = goals
    store.save()
    assert Store("peers", tmp_path).goals == goals


# --- peers


def test_peers_goals_take_the_fastest_peer() -> None:
    one: dict[str, float] = {
        "lmclock|decode": 1.0, "lmclock|prefill": 1.0, "lmclock|matmul": 0.7,
        "llama.cpp Q4_1|decode": 4.0, "llama.cpp Q4_1|decode -fa": 3.5,
        "llama.cpp Q4_1|prefill": 9.0, "llama.cpp Q4_0|decode": 2.5, "llama.cpp Q4_0|prefill": 4.0,
        "ctranslate2 int8|decode": 9.0, "ctranslate2 int8|prefill": 3.0,
        "transformers bf16|prefill": 0.5, "limit|decode": 0.8, "limit|prefill": 0.8,
        "limit|stream": 1e9, "limit|int8": 1e12,
    }  # fmt: skip
    about = {name: {} for name in dict.fromkeys(key.split("|")[0] for key in one)}
    about["limit"] = {"bytes": 1e6, "operations": 1e9}
    stage = Stage([one, one], about)  # type: ignore[arg-type]
    values = {goal.what: goal.value for goal in peers.goals(stage.samples())}
    assert values["decode, llama.cpp on the same file"] == 3.5
    assert values["decode, fastest peer of 8 bits or fewer"] == 2.5
    assert values["decode, share of a matvec-only pass"] == 0.8
    assert values["prefill, fastest peer of 8 bits or fewer"] == 3.0, "bf16 has more than 8 bits"
    assert values["prefill, llama.cpp's best format"] == 4.0
    text = "\n".join(peers.parts(stage, peers.Sizes(2)))
    assert "llama.cpp Q4_1 decode -fa" in text and "| onnx" not in text
    assert all(goal.value is None for goal in peers.goals({}))


# --- prefill


def test_growth_of_memory() -> None:
    def samples(values: list[float]) -> Any:
        return {(f"memory {n}", "peak"): [v] for n, v in zip(prefill.MEMORY, values, strict=True)}

    lengths = np.array(prefill.MEMORY, float)
    assert prefill.growth(samples((1e8 + 1e4 * lengths).tolist())) == pytest.approx(1)
    quadratic = prefill.growth(samples((1e8 + lengths**2).tolist()))
    assert quadratic == pytest.approx((8128 + 2048) / (2048 + 512))
    assert prefill.growth({}) is None


# --- scale


def test_the_line_is_found_and_its_residuals() -> None:
    sizes = np.array([1e8, 8e8, 5e9])
    seconds = 1e-4 + sizes / 25e9
    line = scale.fit(sizes.tolist(), seconds.tolist())
    assert line.start == pytest.approx(1e-4) and line.rate == pytest.approx(25e9)
    assert np.abs(line.residuals).max() < 1e-9
    off = scale.fit([1e8, 2e8, 3e8, 4e8], [1.0, 2.0, 3.3, 4.0])
    assert max(off.residuals) == off.residuals[2] > 0.04


def test_mixes_are_llama_cpps() -> None:
    """Q4_K_M of 32 layers: Q6_K in the first and last four and in every third between."""
    more = [n for n in range(32) if random_models.more_bits(n, 32)]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    listed = {name: fmt.name for name, fmt, _ in
              random_models.tensors(random_models.SHAPES["8b"], "q4_k_m")}  # fmt: skip
    assert listed["output"] == listed["blk.6.attn_v"] == listed["blk.6.ffn_down"] == "q6_k"
    assert listed["token_embd"] == listed["blk.7.ffn_down"] == listed["blk.6.ffn_up"] == "q4_k"


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "q6_k", "bf16"])
def test_random_blocks_are_finite_and_small(name: str) -> None:
    fmt = FORMATS[name]
    raw = random_models.blocks(fmt, 4096, np.random.default_rng(0)).reshape(-1)
    assert first_bad_block(fmt, raw) is None
    values = unpack(fmt, raw, 4096, fmt.block)
    assert np.isfinite(values).all() and 0.2 < values.std() / random_models.SPREAD < 5
    assert abs(values.mean()) < 0.5 * values.std()


def test_a_random_model_runs(tmp_path: Path) -> None:
    """The gguf package reads the file, lmclock runs it, and its logits are finite."""
    shape = random_models.Shape(512, 256, 512, 2, 4, 2, 64, tied=True)
    path = tmp_path / "x.gguf"
    random_models.write(path, shape, "q4_k_m", "x")
    read = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.0.attn_q.weight"] == "Q4_K"
    with load(str(path), context=64, picks=32) as model:
        assert np.isfinite(quality.logits(model, list(range(8)))).all()
        reply = model.generate([1, 2, 3], max_new_tokens=4, temperature=0, ignore_eos=True)
        rate = rate_of(model, reply.cycles, ("linear", "qkv", "glu"))
    assert 0 < rate < 1e13


# --- batch


def test_the_predicted_knee_is_where_the_two_cross() -> None:
    work = [[n, 1e8 + 1e4 * n, 2.7e8 * n, 1e6 * n] for n in range(1, 65)]
    rows = batch.predict(work, 30e9, (900e9, 100e9))
    assert rows[0] == pytest.approx([1, 1.0001e8 / 30e9, 2.7e8 / 900e9 + 1e6 / 100e9])
    exact = (1e8 / 30e9) / (2.7e8 / 900e9 + 1e6 / 100e9 - 1e4 / 30e9)
    assert batch.predicted_knee(rows) == pytest.approx(exact, rel=1e-6)
    assert batch.predicted_knee(rows[:5]) is None


def test_the_measured_knee_is_where_the_lines_meet() -> None:
    counts = [1, 2, 4, 8, 16, 32]
    assert batch.measured_knee(counts, [max(3e-3, 3e-4 * n) for n in counts]) == pytest.approx(10)
    assert batch.measured_knee(counts, [3e-3] * 6) is None, "still bound by memory"
    assert batch.measured_knee(counts[:2], [1.0, 2.0]) is None


def test_work_grows_with_sequences_but_weights_do_not(tmp_path: Path) -> None:
    shape = random_models.Shape(512, 256, 512, 2, 4, 2, 64, tied=True)
    path = tmp_path / "x.gguf"
    random_models.write(path, shape, "q8_0", "x")
    with load(str(path), context=128) as model:
        one, two = batch.work_of(model, (1, 2))
        weights = model.program.bytes_per_cycle
    assert two[2] == 2 * one[2] > 0 and two[3] == 2 * one[3] > 0
    assert weights <= one[1] < two[1] < 1.1 * weights


# --- depth, quality, plots


def test_depth_reports_every_cache(tmp_path: Path) -> None:
    store = Store("depth", tmp_path)
    one = {f"lmclock {cache}|{job}": value for cache in depth.CACHES
           for job, value in (("decode", 0.1), ("limit", 0.9))}  # fmt: skip
    one |= {"llama.cpp f16|decode": 0.5, "llama.cpp f16|decode -fa": 0.3,
            "llama.cpp q8_0|decode -fa": 0.4}  # fmt: skip
    store.stages["1024"] = Stage([one])
    values = {goal.what: goal.value for goal in depth.goals(store)}
    assert values["decode at 1024, cache f32, llama.cpp with f16"] == pytest.approx(3)
    assert values["decode at 1024, cache q8_0, llama.cpp with q8_0"] == pytest.approx(4)
    assert values["decode at 1024, cache f16, share of the limit"] == 0.9
    assert values["decode at 4096, cache f16, share of the limit"] is None
    text = "\n".join(depth.parts(store, Plan(dry=True)))
    assert "| 1024 | f16 | 160 | 90 % | 53 -fa | 3.00 |" in text


def scores(divergence: np.ndarray) -> quality.Scores:
    return quality.Scores(divergence, *[np.ones(len(divergence))] * 4)


def test_differences_of_divergence_are_paired() -> None:
    draw = np.random.default_rng(0)
    shared, noise = draw.exponential(1, 2000), draw.normal(0, 1e-3, 2000)
    found = {"llama.cpp": scores(shared), "lmclock": scores(shared + noise + 2e-4)}
    both = quality.paired(found, "lmclock")
    assert both and both[0] == pytest.approx(2e-4, abs=1e-4)
    assert both[1] == pytest.approx(1e-3 / np.sqrt(2000), rel=0.1), "what they share cancels"
    assert quality.paired(found, "lmclock --precise") is None
    (goal, *_) = [g for g in quality.goals({"Q4_1": found}) if g.value is not None]
    assert goal.value == pytest.approx(both[0] / both[1])


def test_scores_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "FOLDER", tmp_path)
    assert quality.read("Q4_1") == {}
    quality.write("Q4_1", {"lmclock --precise": scores(np.arange(5.0))})
    assert quality.read("Q4_1")["lmclock --precise"].divergence.tolist() == [0, 1, 2, 3, 4]


def test_plots_are_small_and_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    axes = plots.Axes("Curve", "x", "y", log_x=True, marks={"knee": 10})
    series = [
        plots.Series.of("a", [(1, 2), (32, 5)]),
        plots.Series("b", [1, 2, 3], [1, 2, 3], "--"),
    ]
    assert plots.draw("curve", axes, series) == "![Curve](plots/curve.svg)"
    first = (tmp_path / "curve.svg").read_bytes()
    plots.draw("curve", axes, series)
    assert (tmp_path / "curve.svg").read_bytes() == first and len(first) < 60_000
    assert plots.draw("none", axes, series, dry=True) and not (tmp_path / "none.svg").exists()


def test_stores_are_json(tmp_path: Path) -> None:
    store = Store("peers", tmp_path)
    store.stages["x"] = Stage([round_of(a__b=1.0)], {"a": {"weights": "Q4_1"}}, ["c"], "here")
    store.save()
    assert json.loads(store.path.read_text())["stages"]["x"]["rounds"] == [{"a|b": 1.0}]
