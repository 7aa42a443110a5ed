"""`lmclock bench` on a tiny model, and the arithmetic behind the scripts of bench/."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from bench import common, limit, overhead, products, quality
from lmclock.cli import group
from lmclock.cli.bench import Numbers
from lmclock.errors import LmclockError, OptionError
from lmclock.hardware.calibrate import cache_file, save
from lmclock.hardware.limits import Limits, Measured
from lmclock.model import Model, load
from lmclock.reports.bench import Test as Case
from lmclock.reports.bench import measure

# What scripts read of llama-bench's JSON.
LLAMA_BENCH = {
    "build_commit", "cpu_info", "gpu_info", "model_type", "model_size", "model_n_params", "n_batch",
    "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen", "n_depth", "test_time",
    "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
}  # fmt: skip
VOCAB, WIDTH, HIDDEN, LAYERS = 96, 32, 48, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder of a one-layer Llama with random weights."""
    path = tmp_path_factory.mktemp("tiny")
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", "eos_token_id": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (VOCAB, WIDTH), "norm": (WIDTH,),
        "layers.0.input_layernorm": (WIDTH,), "layers.0.post_attention_layernorm": (WIDTH,),
        "layers.0.self_attn.q_proj": (WIDTH, WIDTH), "layers.0.self_attn.k_proj": (16, WIDTH),
        "layers.0.self_attn.v_proj": (16, WIDTH), "layers.0.self_attn.o_proj": (WIDTH, WIDTH),
        "layers.0.mlp.gate_proj": (HIDDEN, WIDTH), "layers.0.mlp.up_proj": (HIDDEN, WIDTH),
        "layers.0.mlp.down_proj": (WIDTH, HIDDEN),
    }  # fmt: skip
    draw = np.random.default_rng(5)
    tensors = {f"model.{n}.weight": draw.normal(0, 0.2, s) for n, s in shapes.items()}
    arrays = {name: values.astype(np.float32) for name, values in tensors.items()}
    save_file(arrays, path / "model.safetensors")
    return str(path)


@pytest.fixture
def calibrated(cache_folder: Path) -> Limits:
    """Limits of this host as if they had been measured, so that nothing need be."""

    def figure(rate: float) -> Measured:
        return Measured(rate, rate, 0.07)

    bandwidth = tuple((1 << bits, figure(1e10)) for bits in (18, 29))
    peaks = {kind: figure(1e11) for kind in ("int8", "bf16", "f32")}
    found = Limits(1, "any", "this processor", "today", bandwidth, peaks, figure(1e-6))
    return save(found, cache_file(1))


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(group, ["bench", *arguments, "--machine", "array"])


def records(*arguments: str) -> list[dict[str, Any]]:
    result = bench(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", (512,)),
        ("16,32,16", (16, 32, 16)),
        ("8-10", (8, 9, 10)),
        ("8-33+8", (8, 16, 24, 32)),
        ("8-64*2,5", (8, 16, 32, 64, 5)),
    ],
)
def test_lists_and_ranges(text: str, values: tuple[int, ...]) -> None:
    assert Numbers(0).convert(text, None, None) == values


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-3",
        "1.5",
        "8-4",
        "1-8+0",
        "0-8*2",
        "1-8*1",
        "1,,2",
        "1-2-3",
        "0-99999999",
        "9" * 20,
    ],
)
def test_bad_numbers_are_named(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"valid|none of|more than") as caught:
        Numbers(1).convert(text, None, None)
    assert "\n" not in caught.value.message


def test_records_are_llama_benchs(folder: str, calibrated: Limits) -> None:
    found = records(folder, "-p", "8,16", "-n", "3", "-pg", "5,2", "-d", "0,64", "-r", "3")
    names = [Case(r["n_prompt"], r["n_gen"], r["n_depth"]).name for r in found]
    shallow = ["pp8", "pp16", "tg3", "pp5+tg2"]
    assert names == shallow + [f"{name} @ d64" for name in shallow]
    for r in found:
        assert set(r) >= LLAMA_BENCH
        tokens = r["n_prompt"] + r["n_gen"]
        assert r["samples_ts"] == pytest.approx([1e9 * tokens / ns for ns in r["samples_ns"]])
        assert len(r["samples_ns"]) == 3
        assert r["avg_ts"] == pytest.approx(statistics.mean(r["samples_ts"]))
        assert r["stddev_ts"] == pytest.approx(statistics.stdev(r["samples_ts"]))
        tokens_per_second = r["hz"] / r["cycles_per_token"]
        assert r["bytes_per_second"] == pytest.approx(r["bytes_per_token"] * tokens_per_second)
        assert r["cycles_per_token"] == pytest.approx((bool(r["n_prompt"]) + r["n_gen"]) / tokens)
        assert 0 < r["of_bound"] < 1 and r["limits_spread"] == pytest.approx(0.07)
    weights = found[0]["model_size"]
    assert weights == 4 * found[0]["model_n_params"]
    assert found[2]["bytes_per_token"] > weights - 4 * 2 * WIDTH, "a decode reads every matrix"
    assert found[0]["bytes_per_token"] < weights / 4, "a prompt of eight reads them once"


def test_set_ups_are_multiplied(folder: str, calibrated: Limits) -> None:
    found = records(folder, "-p", "16", "-n", "0", "-b", "4,16", "-r", "1", "-ctk", "f32")
    assert [r["n_batch"] for r in found] == [4, 16]
    assert [r["cycles_per_token"] for r in found] == [1 / 4, 1 / 16]
    assert {r["type_k"] for r in found} == {"f32"} and found[0]["stddev_ts"] == 0


def test_markdown_columns(folder: str, calibrated: Limits) -> None:
    lines = bench(folder, "-p", "8", "-n", "2", "-r", "2").stdout.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    head = ["model", "size", "params", "backend", "threads", "test", "t/s", "Hz", "GB/s"]
    assert table[0] == [*head, "of limit"]
    assert all(len(row) == len(table[0]) for row in table)
    assert [row[5] for row in table[2:]] == ["pp8", "tg2"]
    assert " ± " in table[2][6]
    assert "wall ticks" in lines[-1] and "vary by up to 7 %" in lines[-1]
    unusual = bench(folder, "-p", "8", "-n", "0", "-r", "1", "-b", "4", "-ctk", "f32").stdout
    assert "n_batch" in unusual and "type_k" in unusual


def test_csv_and_json_lines(folder: str, calibrated: Limits) -> None:
    rows = list(
        csv.DictReader(io.StringIO(bench(folder, "-p", "8", "-o", "csv", "-r", "1").stdout))
    )
    assert [row["n_prompt"] for row in rows] == ["8", "0"]
    assert LLAMA_BENCH - {"samples_ns", "samples_ts"} <= set(rows[0])
    lines = bench(folder, "-p", "8", "-o", "jsonl", "-r", "1").stdout.splitlines()
    assert [json.loads(line)["n_gen"] for line in lines] == [0, 128]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("--json", "-o", "csv"), "two formats"),
        (("-p", "600"), "512"),
        (("-p", "8", "-d", "65"), "multiples of 64"),
        (("-pg", "0,0"), "512,128"),
        (("-t", "0"), "1 or more"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: str, calibrated: Limits, arguments: tuple[str, ...], complaint: str
) -> None:
    result = bench(folder, *arguments)
    assert result.exit_code
    if isinstance(result.exception, LmclockError):
        assert complaint in str(result.exception)
    else:
        assert complaint in result.stderr and "Traceback" not in result.stderr


@pytest.fixture
def model(folder: str) -> Model:
    return load(folder, machine="array", context=256, chunk=32)


@pytest.mark.parametrize(
    "case", [Case(64), Case(0, 5), Case(70, 3), Case(40, 2, 128), Case(0, 4, 100), Case(1, 1, 64)]
)
def test_only_what_is_asked_is_timed_and_none_of_it_was_cached(model: Model, case: Case) -> None:
    rng = np.random.default_rng(0)
    for _ in range(3):
        cycles = measure(model.engine, case, rng)
        positions = np.concatenate([c.batch.rows["tok"].positions for c in cycles])
        end = case.depth + case.prompt + case.generated
        assert positions.tolist() == list(range(case.depth, end))
        assert len(cycles[-1].batch.pick) == 1, "the last row's logits are part of the work"
    assert not model.engine.live


def test_the_end_token_ends_no_test(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.engine, "eos", frozenset(range(VOCAB)))
    assert len(measure(model.engine, Case(0, 6), np.random.default_rng(0))) == 6
    with pytest.raises(OptionError, match="depth 63 before a prompt"):
        measure(model.engine, Case(1, 0, 63), np.random.default_rng(0))


# --- bench/


def test_a_section_keeps_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "measurements.md"
    common.publish("peers", "## Peers\none\n", False, document)
    common.publish("limit", "## Limit", False, document)
    common.publish("peers", "## Peers\ntwo", False, document)
    common.publish("overhead", "## Nothing", True, document)
    text = document.read_text()
    assert text.startswith(common.HEADER) and text.count(common.HEADER) == 1
    assert "one" not in text and "Nothing" not in text
    assert text.index("## Limit") < text.index("## Peers\ntwo")
    assert "Nothing" in capsys.readouterr().out


def test_rounds_visit_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    jobs = {name: (lambda name=name: seen.append(name) or float(len(seen))) for name in "abc"}
    samples = common.interleave(jobs, rounds=4)
    rounds = [seen[at : at + 3] for at in range(0, len(seen), 3)]
    assert len(rounds) == 5 and all(sorted(some) == list("abc") for some in rounds)
    assert len({tuple(some) for some in rounds}) > 1, "the order is drawn anew"
    assert all(len(values) == 4 and min(values) > 3 for values in samples.values())


def test_ratios_are_paired() -> None:
    assert common.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 1000.0]) == 2.0


WORKER = """
import os, sys
from bench.common import Skipped, serve

def make():
    if "missing" in sys.argv:
        import no_such_engine
    if "unfit" in sys.argv:
        raise Skipped("it needs a GPU")
    print("a library says hello")
    return {"weights": "Q4_1"}, {"two": lambda: 2, "die": lambda: os._exit(3)}

serve(make)
"""


def test_a_worker_answers_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    workers, skipped = common.start("tiny_worker", ("fine", "missing", "unfit"), threads=1)
    assert skipped == [
        "missing was skipped: no_such_engine is not installed.",
        "unfit was skipped: it needs a GPU.",
    ]
    one = workers["fine"]
    assert one.jobs == ["two", "die"] and one.about["weights"] == "Q4_1"
    assert one.ask("two") == one.ask("two") == 2.0
    with pytest.raises(RuntimeError, match="ended with 3:\na library says hello"):
        one.ask("die")


@pytest.mark.parametrize("apart", [3.0, 0.01])
def test_divergence_is_the_definition(apart: float) -> None:
    draw = np.random.default_rng(2)
    ids = draw.integers(0, 50, quality.WINDOW).tolist()
    here = draw.normal(0, 2, (quality.WINDOW, 50)).astype(np.float32)
    there = here + draw.normal(0, apart, here.shape).astype(np.float32)
    scores = quality.Base.of(here, ids).score(there)
    kept = slice(quality.FIRST, -1)
    p, q = (np.exp(x[kept].astype(np.float64)) for x in (here, there))
    p, q = (x / x.sum(axis=1, keepdims=True) for x in (p, q))
    assert scores.divergence == pytest.approx((p * np.log(p / q)).sum(axis=1), rel=1e-5, abs=1e-7)
    target = np.array(ids[quality.FIRST + 1 :])
    rows = np.arange(len(target))
    assert scores.loss == pytest.approx(-np.log(q[rows, target]), abs=1e-5)
    assert scores.shift == pytest.approx(q[rows, target] - p[rows, target], abs=1e-5)
    same = quality.Base.of(here, ids).score(here + 3)
    assert np.abs(same.divergence).max() < 1e-5 and same.agrees.all()


def test_bootstrap_bounds_a_mean() -> None:
    draw = np.random.default_rng(3)
    values = draw.normal(0.004, 0.01, 400)
    error = 0.01 / 20
    assert overhead.upper_bound(values.tolist()) == pytest.approx(
        values.mean() + 1.645 * error, abs=0.3 * error
    )
    assert overhead.upper_bound([0.5] * 10) == 0.5


def test_variation_decides_what_is_claimed(calibrated: Limits) -> None:
    steady = limit.report([calibrated, calibrated])
    assert "Every figure stays within 5 %" in steady
    slower = Measured(0.9e-6, 1e-6, 0.1)
    other = Limits(**{**vars(calibrated), "step": slower})
    assert "1 of 6 figures vary by more than 5 %" in limit.report([calibrated, other])


def test_products_only_computes_the_products(folder: str) -> None:
    whole = load(folder, machine="array")
    program = products.products_only(whole.program)
    assert {i.op for i in program.section("step").instructions} <= {*products.PRODUCTS, "pick"}
    assert program.bytes_per_cycle == whole.program.bytes_per_cycle - 4 * 3 * WIDTH, "norms"
    registers = dict(program.registers)
    assert len(set(registers.values())) < 8
