"""Real sizes: random-weight Llama-3.2-1B in five formats, Llama-3-8B in Q4_K_M, and llama.cpp.

    python -m bench.scale [--rounds 5] [--only 1b-q4_0]

One stage per file of bench/random_models.py (written to the user's cache folder when it is not
there; `python -m bench.random_models --remove` deletes them). Decode is held against the products
alone, which is the ceiling; the time of a decode cycle of every model and format against the bytes
it reads is fitted by one line.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import click
import numpy as np

from bench import products
from bench.common import MODEL, Samples, serve, start, table
from bench.engines import Made, llama_jobs, lmclock_jobs
from bench.engines import Sizes as Given
from bench.plots import Axes, Series, draw
from bench.random_models import MODELS, ensure
from bench.stages import Goal, Plan, Store, best, options, quotient

SMALL = "smollm2-q4_1"  # the packaged file, the smallest point of the line
STAGES = (SMALL, *MODELS)
# Tokens to prefill and to decode: enough to be steady, few enough for a slow engine.
SIZES = {SMALL: (512, 64), "8b-q4_k_m": (64, 12)}
USUAL = (128, 16)
PACKAGES = ("llama-cpp-python", "numpy", "gguf")


@click.command(help=__doc__)
@options(rounds=5)
@click.option("--model", default="", hidden=True)
@click.option("--worker", hidden=True)
def main(plan: Plan, model: str, worker: str | None) -> None:
    if worker:
        serve(lambda: jobs(worker, model, plan.threads))
        return
    store = Store("scale")
    for name in STAGES:
        if plan.quick and name not in (SMALL, "1b-q4_0"):
            continue
        begin = partial(
            start, "bench.scale", ("lmclock", "products", "llama.cpp"), f"--model={name}",
            threads=plan.threads,
        )  # fmt: skip
        if plan.wants(name) and name != SMALL:
            ensure(name)
        store.measure(name, plan, begin, packages=PACKAGES)
    store.finish(plan, "Real sizes, random weights", parts(store, plan), goals(store))


def jobs(worker: str, model: str, threads: int) -> Made:
    prompt, new = SIZES.get(model, USUAL)
    path = MODEL if model == SMALL else str(ensure(model))
    sizes = Given(threads, prompt, new)
    if worker == "llama.cpp":
        # Flash attention is its default; contexts are too short here for it to matter.
        return llama_jobs(sizes, "Q4_1", None if model == SMALL else path, flash_only=True)
    if worker == "products":
        bare = products.Products(threads, 1, path)
        return {"bytes": bare.program.bytes_per_cycle}, {
            "decode": lambda: bare.seconds(1, new),
        }
    return _lmclock(sizes, path)


def _lmclock(sizes: Given, path: str) -> Made:
    """prefill and decode as everywhere; `cycle`: median seconds of a decode cycle, by the clock."""
    about, found = lmclock_jobs(sizes, path)
    del found["matmul"]  # type: ignore[attr-defined]
    return about, found


@dataclass(frozen=True)
class Line:
    """Seconds = start + bytes / rate, and how far each point is off, as a share of it."""

    start: float
    rate: float
    residuals: tuple[float, ...]


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line of least relative squares: every point counts alike, small ones as much as large."""
    x, y = np.array(sizes, float), np.array(seconds, float)
    table = np.stack([1 / y, x / y], axis=1)
    (start, slope), *_ = np.linalg.lstsq(table, np.ones(len(x)), rcond=None)
    off = y / (start + slope * x) - 1
    return Line(float(start), float(1 / slope), tuple(off.tolist()))


def cycle_seconds(samples: Samples, name: str, worker: str = "lmclock") -> float | None:
    """Median seconds of a decode cycle."""
    key = best(samples, [(worker, "decode"), (worker, "decode -fa")])
    return statistics.median(samples[key]) / SIZES.get(name, USUAL)[1] if key else None


def theirs(samples: Samples, job: str) -> tuple[str, str] | None:
    return best(samples, [("llama.cpp", job), ("llama.cpp", f"{job} -fa")])


def goals(store: Store) -> list[Goal]:
    """Line 3: every model against llama.cpp and against the ceiling."""
    rows = []
    for name in MODELS:
        samples = store.stage(name).samples()
        rows += [
            Goal(f"{name}: decode, llama.cpp",
                 quotient(samples, theirs(samples, "decode"), ("lmclock", "decode")), 1.2),
            Goal(f"{name}: decode, share of the products alone",
                 quotient(samples, ("products", "decode"), ("lmclock", "decode")), 0.9, "%"),
            Goal(f"{name}: prefill, llama.cpp",
                 quotient(samples, theirs(samples, "prefill"), ("lmclock", "prefill")), 2.0),
        ]  # fmt: skip
    return rows


def parts(store: Store, plan: Plan) -> Iterator[str]:
    """The text of the section."""
    yield METHOD.format(prompt=USUAL[0], new=USUAL[1], large=SIZES["8b-q4_k_m"])
    rows, points = [], []
    for name in STAGES:
        stage, samples = store.stage(name), store.stage(name).samples()
        if not samples:
            continue
        prompt, new = SIZES.get(name, USUAL)
        size = stage.about["products"]["bytes"] if "products" in stage.about else 0
        cells = [name, f"{size / 1e6:,.0f}"]
        for job, count in (("prefill", prompt), ("decode", new)):
            key = theirs(samples, job)
            ours = samples.get(("lmclock", job))
            cells += [f"{count / statistics.median(ours):,.1f}" if ours else "",
                      f"{count / statistics.median(samples[key]):,.1f}" if key else ""]  # fmt: skip
            ratio = quotient(samples, key, ("lmclock", job))
            cells.append(f"{ratio:.2f}" if ratio else "")
        share = quotient(samples, ("products", "decode"), ("lmclock", "decode"))
        seconds = cycle_seconds(samples, name)
        cells.append(f"{100 * share:.0f} %" if share else "")
        cells.append(f"{size / seconds / 1e9:.1f}" if seconds else "")
        rows.append(cells)
        if seconds and size:
            points.append((name, size, seconds, cycle_seconds(samples, name, "llama.cpp")))
    yield table(
        ["model", "MB a cycle", "prefill, tok/s", "llama.cpp", "x", "decode, tok/s", "llama.cpp",
         "x", "of products alone", "GB/s"], rows,
    )  # fmt: skip
    if len(points) >= 3:
        yield from _line(points, plan)


def _line(points: list[tuple[str, float, float, float | None]], plan: Plan) -> Iterator[str]:
    """The line through all cycles, its plot and its residuals."""
    names, sizes, seconds, peer = zip(*points, strict=True)
    line = fit(sizes, seconds)
    yield (
        f"A decode cycle takes {1e3 * line.start:.3f} ms + bytes / {line.rate / 1e9:.1f} GB/s "
        "(least relative squares over all models and formats)."
    )
    yield table(
        ["model", "MB a cycle", "ms a cycle", "off the line"],
        [
            [name, f"{size / 1e6:,.0f}", f"{1e3 * spent:.2f}", f"{100 * off:+.1f} %"]
            for name, size, spent, off in zip(names, sizes, seconds, line.residuals, strict=True)
        ],
    )
    ends = [min(sizes), max(sizes)]
    series = [
        Series("lmclock", [s / 1e9 for s in sizes], [1e3 * t for t in seconds], "o"),
        Series(f"{1e3 * line.start:.2f} ms + bytes / {line.rate / 1e9:.1f} GB/s",
               [s / 1e9 for s in ends], [1e3 * (line.start + s / line.rate) for s in ends], "--"),
    ]  # fmt: skip
    pairs = [(s, t) for s, t in zip(sizes, peer, strict=True) if t]
    if pairs:
        series.append(Series("llama.cpp", [s / 1e9 for s, _ in pairs],
                             [1e3 * t for _, t in pairs], "x"))  # fmt: skip
    axes = Axes("A decode cycle of every model and format", "GB read a cycle", "ms a cycle")
    yield draw("scale", axes, series, plan.dry)


METHOD = """Files of random valid blocks (bench/random_models.py): Llama-3.2-1B shapes in five \
formats, Llama-3-8B in Q4_K_M, mixed by tensor as llama.cpp mixes them. Prefill of {prompt} \
tokens and decode of {new} (8B: {large[0]} and {large[1]}; SmolLM2: 512 and 64), llama.cpp with \
flash attention. The ceiling is the products alone over the same weights."""


if __name__ == "__main__":
    main()
