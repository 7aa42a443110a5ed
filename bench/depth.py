"""Decode at depth: behind 0 to 8k cached tokens, cache in f16, q8_0 and f32, beside llama.cpp.

    python -m bench.depth [--rounds 5] [--only 1024]

One stage per depth. Engines fill their cache once per depth and forget what they decoded after each
job. The limit of a cycle is the time to read its bytes, weights and cache alike, at the rate of a
stream over as many bytes measured right before and after.
"""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import click
import numpy as np

from bench.common import MODEL, Job, Samples, serve, start, table
from bench.engines import PEAK_REPEAT, Made, drawing, timed
from bench.plots import Axes, Series, draw
from bench.stages import Goal, Plan, Store, best, options, quotient

if TYPE_CHECKING:
    from bench.llama import Llama
    from lmclock.cycle import Cycle
    from lmclock.model import Model

NEW = 16
DEPTHS = (0, 1024, 4096, 8064)  # the model's context is 8192
CACHES = ("f16", "q8_0", "f32")
# llama.cpp's settings by cache: q8_0 needs flash attention, f32 is not what anyone would choose.
PEERS = {"f16": ("", " -fa"), "q8_0": (" -fa",)}
PACKAGES = ("llama-cpp-python", "numpy")


@click.command(help=__doc__)
@options(rounds=5)
@click.option("--depth", type=int, default=0, hidden=True)
@click.option("--worker", hidden=True)
def main(plan: Plan, depth: int, worker: str | None) -> None:
    if worker:
        serve(lambda: jobs(worker, depth, plan.threads))
        return
    store = Store("depth")
    for at in DEPTHS[:2] if plan.quick else DEPTHS:
        names = [f"lmclock {cache}" for cache in CACHES]
        names += [f"llama.cpp {cache}" for cache in PEERS]
        begin = partial(start, "bench.depth", names, f"--depth={at}", threads=plan.threads)
        store.measure(str(at), plan, begin, packages=PACKAGES)
    store.finish(plan, "Decode at depth", parts(store, plan), goals(store))


def jobs(worker: str, depth: int, threads: int) -> Made:
    name, cache = worker.split()
    make = lmclock_jobs if name == "lmclock" else llama_jobs
    return make(cache, depth, threads)


def lmclock_jobs(cache: str, depth: int, threads: int) -> Made:
    """decode: seconds of NEW cycles; limit: the share of the limit they reach."""
    import lmclock._native as native

    from lmclock.model import load
    from lmclock.reports.bench import Test, measure, seconds

    model = load(MODEL, threads=threads, context=min(8192, depth + 2 * NEW + 64), cache=cache)
    rng = np.random.default_rng(0)
    test = Test(0, NEW, depth)
    path = model.machine.path  # type: ignore[attr-defined]
    size = [float(model.program.bytes_per_cycle)]

    def run() -> list[Cycle]:
        return measure(model.engine, test, rng)

    def decode() -> float:
        return seconds(run(), model.machine.traits)

    def limit() -> float:
        buffer = np.ones(int(size[0]), np.uint8)

        def stream() -> float:
            rates = native.time_stream(buffer, threads, PEAK_REPEAT, path)
            return len(buffer) / statistics.median(rates)

        before = stream()
        cycles = run()
        size[0] = cycle_bytes(model, cycles[len(cycles) // 2])
        rate = 0.5 * (before + stream())
        return size[0] * len(cycles) / rate / seconds(cycles, model.machine.traits)

    run()  # fills the cache, of which pages stay
    return {"cache": cache}, {"decode": decode, "limit": limit}


def cycle_bytes(model: Model, cycle: Cycle) -> float:
    """Weight and cache bytes of a cycle, by the cost model."""
    from lmclock.roofline import Works

    work = Works(model.program).of("step", cycle.batch)
    return float(work.weight.sum() + work.cache.sum())


def llama_jobs(cache: str, depth: int, threads: int) -> Made:
    from bench.llama import UBATCH, Llama, Weights
    from bench.models import requantised

    weights = Weights(str(requantised("Q4_1")))
    draw_ids = drawing(weights.vocabulary)
    found: dict[str, Job] = {}

    def run(llama: Llama) -> float:
        tokens = [(ctypes.c_int32 * 1)(token) for token in draw_ids(NEW)]
        llama.keep(depth)
        return timed(lambda: llama.one_by_one(tokens))

    for setting in PEERS[cache]:
        if not setting and depth > 1024:
            continue  # flash attention is faster from here on
        llama = Llama(weights, threads, bool(setting), depth + 2 * NEW + 64, 512, cache)
        fill(llama, threads, cache, draw_ids(UBATCH), depth)
        found[f"decode{setting}"] = partial(run, llama)
    return {"notes": weights.notes}, found


def fill(llama: Llama, threads: int, cache: str, ids: list[int], depth: int) -> None:
    """Put `depth` positions into the cache, some computed and the others copied: how long a step
    takes does not depend on what is cached, while to compute 8k of them took minutes.
    """
    from bench.llama import Llama
    from bench.models import folder

    if not depth:
        return
    path = folder() / f"{os.getpid()}.state"
    filler = Llama(
        llama.weights, threads, llama.flash, depth + len(ids), len(ids), cache,
        sequences=1 + depth // len(ids), shared=True,
    )  # fmt: skip
    filler.repeat(ids, depth)
    filler.save_state(path)
    filler.free()
    assert llama.load_state(path), "llama.cpp does not take back the cache that it saved"
    path.unlink()


def theirs(samples: Samples, cache: str) -> tuple[str, str] | None:
    worker = f"llama.cpp {cache}"
    return best(samples, [(worker, "decode"), (worker, "decode -fa")])


def goals(store: Store) -> list[Goal]:
    """Line 5."""
    rows = []
    for depth in DEPTHS[1:]:
        samples = store.stage(str(depth)).samples()
        for cache in CACHES:
            ours = (f"lmclock {cache}", "decode")
            against = cache if cache in PEERS else "f16"
            name = f"decode at {depth}, cache {cache}"
            rows.append(Goal(f"{name}, llama.cpp with {against}",
                             quotient(samples, theirs(samples, against), ours), 2.0))  # fmt: skip
            share = samples.get((ours[0], "limit"))
            rows.append(Goal(f"{name}, share of the limit",
                             statistics.median(share) if share else None, 0.85, "%"))  # fmt: skip
    return rows


def parts(store: Store, plan: Plan) -> Iterator[str]:
    """The text of the section."""
    yield METHOD
    rows: list[list[str]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for depth in DEPTHS:
        samples = store.stage(str(depth)).samples()
        for cache in CACHES if samples else ():
            ours = samples[f"lmclock {cache}", "decode"]
            speed = NEW / statistics.median(ours)
            share = statistics.median(samples[f"lmclock {cache}", "limit"])
            key = theirs(samples, cache)
            cells = [str(depth), cache, f"{speed:,.0f}", f"{100 * share:.0f} %"]
            curves.setdefault(f"lmclock {cache}", []).append((depth, speed))
            if key:
                other = NEW / statistics.median(samples[key])
                ratio = quotient(samples, key, (f"lmclock {cache}", "decode"))
                cells += [f"{other:,.0f}{' -fa' if '-fa' in key[1] else ''}", f"{ratio:.2f}"]
                curves.setdefault(f"llama.cpp {cache}", []).append((depth, other))
            else:
                cells += ["", ""]
            rows.append(cells)
    yield table(["tokens cached", "cache", "lmclock, tok/s", "of the limit", "llama.cpp, tok/s",
                 "lmclock is x"], rows)  # fmt: skip
    series = [
        Series.of(name, points, "o-" if "lmclock" in name else "x--")
        for name, points in curves.items()
    ]
    if series:
        axes = Axes("Decode at depth", "tokens in the cache", "tokens per second")
        yield draw("depth", axes, series, plan.dry)


METHOD = f"""The packaged Q4_1 file, {NEW} tokens decoded behind as many cached ones; the same \
file in llama.cpp, flash attention off or on, whichever is faster (from 4k: on). Of its cached \
tokens 512 are computed and the others copies of them, which a step's time does not depend on. \
Share of the limit: bytes of weights and cache that a cycle must read, over the rate of a stream \
of as many bytes measured right before and after, over the time it took."""


if __name__ == "__main__":
    main()
