"""1 to 32 sequences decoding together beside llama.cpp, and the knee the cost model predicts.

    python -m bench.batch [--rounds 5]

Every sequence has a prompt of its own and then decodes; only cycles that decode all of them are
timed. llama.cpp decodes as many sequences in each llama_decode. The knee is where a cycle turns
from bound by memory to bound by arithmetic: predicted from cost and the limits measured in the same
run, and read off the measured curve.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from bench.common import MODEL, Job, Samples, serve, start, table
from bench.engines import PEAK_REPEAT, PEAK_ROUNDS, Made, drawing, timed
from bench.plots import Axes, Series, draw
from bench.stages import Goal, Plan, Stage, Store, best, options, quotient

if TYPE_CHECKING:
    from lmclock.model import Model

SEQUENCES = (1, 2, 4, 8, 16, 32)
PROMPT, NEW = 1, 16  # tokens of a sequence
CONTEXT = 128  # twice what is needed: a sequence is admitted beside a spare page for each running
KINDS = ("Q4_1", "Q4_0")  # of llama.cpp: the same file, and its fastest format
PEAKS = ("int8", "f32")
PACKAGES = ("llama-cpp-python", "numpy")


@click.command(help=__doc__)
@options(rounds=5)
@click.option("--worker", hidden=True)
def main(plan: Plan, worker: str | None) -> None:
    if worker:
        serve(lambda: jobs(worker, plan.threads))
        return
    store = Store("batch")
    names = ("lmclock", *(f"llama.cpp {kind}" for kind in KINDS))
    begin = partial(start, "bench.batch", names, threads=plan.threads)

    def wanted(worker: str, job: str) -> bool:
        return not (plan.quick and job.split()[0] in ("16", "32"))

    store.measure("batch", plan, begin, packages=PACKAGES, jobs=wanted)
    stage = store.stage("batch")
    text = parts(stage, plan) if stage.rounds else iter(())
    store.finish(plan, "Many sequences at once", text, goals(stage.samples()))


def jobs(worker: str, threads: int) -> Made:
    if worker == "lmclock":
        return lmclock_jobs(threads)
    return llama_jobs(worker.split()[1], threads)


def lmclock_jobs(threads: int) -> Made:
    """Seconds of NEW decode cycles of n sequences, per n; `stream` and `int8`, `f32`: the limits
    that the prediction needs, bytes and operations per second.
    """
    import lmclock._native as native

    from lmclock.model import load

    model = load(MODEL, threads=threads, context=CONTEXT, sequences=max(SEQUENCES))
    path = model.machine.path  # type: ignore[attr-defined]
    draw_ids = drawing(model.config.vocab)
    buffer = np.ones(model.program.bytes_per_cycle, np.uint8)

    def run(count: int) -> float:
        return decode_seconds(model, [draw_ids(PROMPT) for _ in range(count)])

    def stream() -> float:
        times = native.time_stream(buffer, threads, PEAK_REPEAT, path)
        return len(buffer) / statistics.median(times)

    found: dict[str, Job] = {str(n): partial(run, n) for n in SEQUENCES}
    found["stream"] = stream
    for kind in PEAKS:
        found[kind] = lambda kind=kind: statistics.median(  # type: ignore[misc]
            native.time_peak(kind, PEAK_ROUNDS, threads, PEAK_REPEAT, path)
        )
    return {"work": work_of(model, range(1, 2 * max(SEQUENCES) + 1))}, found


def decode_seconds(model: Model, prompts: Sequence[list[int]]) -> float:
    """Seconds of NEW cycles in which every sequence decodes."""
    from lmclock.engine import Request

    with model.engine.heard() as cycles:
        for prompt in prompts:
            model.engine.add(Request(prompt, NEW + 1, ignore_eos=True))
        for event in model.engine.run():
            assert event.finish != "error", event.message
    whole = [c for c in cycles if c.kind == "decode" and c.decode_rows == len(prompts)]
    assert whole, "no cycle decoded all sequences"
    # From the first fetch to the last write-back, as if exactly NEW of them had run.
    spent = whole[-1].stamps[4] - whole[0].stamps[0]
    return spent / model.machine.traits.tick_rate * NEW / len(whole)


def work_of(model: Model, counts: Sequence[int]) -> list[list[float]]:
    """[n, bytes, operations of each kind of PEAKS] of a decode cycle of n sequences, by the cost
    model.
    """
    from lmclock.batch import Batch, Rows
    from lmclock.roofline import Works

    works = Works(model.program)
    rows = []
    for n in counts:
        ids = {i.name: np.zeros((n, 1), np.int32) for i in model.program.inputs}
        pages = {s.name: [np.array([k], np.int32) for k in range(n)] for s in model.program.states}
        batch = Batch(
            {"tok": Rows.of([(PROMPT + NEW // 2, 1)] * n)}, ids, np.arange(n, dtype=np.int32),
            pages=pages, pick=np.arange(n, dtype=np.int32),
        )  # fmt: skip
        work = works.of("step", batch)
        done = [float(work.flops[kind].sum()) if kind in work.flops else 0.0 for kind in PEAKS]
        # Activations stay in the caches: what moves is weights, keys and values.
        rows.append([n, float(work.weight.sum() + work.cache.sum()), *done])
    return rows


def predict(
    work: Sequence[Sequence[float]], stream: float, peaks: Sequence[float]
) -> list[list[float]]:
    """[n, seconds for memory, seconds for arithmetic] from the work and the measured limits."""
    return [
        [n, moved / stream, sum(d / peak for d, peak in zip(done, peaks, strict=True))]
        for n, moved, *done in work
    ]


def llama_jobs(kind: str, threads: int) -> Made:
    """NEW calls of llama_decode with a token of each of n sequences, flash attention on and off."""
    from bench.llama import Llama, Weights
    from bench.models import requantised

    weights = Weights(str(requantised(kind)))
    draw_ids = drawing(weights.vocabulary)
    found: dict[str, Job] = {}

    def run(llama: Llama, count: int) -> float:
        llama.clear()
        llama.steps([draw_ids(count)] * PROMPT, 0)
        ids = [draw_ids(count) for _ in range(NEW)]
        return timed(lambda: llama.steps(ids, PROMPT))

    for flash, name in ((False, ""), (True, " -fa")):
        llama = Llama(weights, threads, flash, CONTEXT, batch=64, sequences=max(SEQUENCES))
        found |= {f"{n}{name}": partial(run, llama, n) for n in SEQUENCES}
    return {"weights": kind, "notes": weights.notes}, found


def predicted_knee(rows: Sequence[Sequence[float]]) -> float | None:
    """The number of sequences at which arithmetic takes as long as memory, between whole numbers
    by straight lines.
    """
    for before, after in pairwise(rows):
        low, high = before[2] - before[1], after[2] - after[1]
        if low < 0 <= high:
            return before[0] + (after[0] - before[0]) * -low / (high - low)
    return None


def measured_knee(counts: Sequence[float], seconds: Sequence[float]) -> float | None:
    """How many sequences take as long as one, at the time per sequence of the largest count; None
    unless that time is spent on arithmetic: twice the sequences must take nearly twice as long.
    """
    if len(counts) < 3 or seconds[-1] < 1.5 * seconds[-2] * counts[-1] / (2 * counts[-2]):
        return None
    return seconds[0] * counts[-1] / seconds[-1]


def theirs(samples: Samples, kind: str, n: int) -> tuple[str, str] | None:
    worker = f"llama.cpp {kind}"
    return best(samples, [(worker, str(n)), (worker, f"{n} -fa")])


def goals(samples: Samples) -> list[Goal]:
    """Line 4."""
    return [
        Goal(f"{n} sequences, llama.cpp {what}",
             quotient(samples, theirs(samples, kind, n), ("lmclock", str(n))), 2.0)
        for n in SEQUENCES if n >= 8
        for kind, what in zip(KINDS, ("on the same file", "in its best format"), strict=True)
    ]  # fmt: skip


def parts(stage: Stage, plan: Plan) -> Iterator[str]:
    """The text of the section."""
    samples = stage.samples()
    yield METHOD
    stream, *peaks = (statistics.median(samples["lmclock", job]) for job in ("stream", *PEAKS))
    predicted = predict(stage.about["lmclock"]["work"], stream, peaks)
    foretold: Mapping[int, Sequence[float]] = {int(row[0]): row for row in predicted}
    rows: list[list[str]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    times: list[float] = []
    for n in SEQUENCES:
        ours = samples.get(("lmclock", str(n)))
        if not ours:
            continue
        times.append(statistics.median(ours) / NEW)
        limit = max(foretold[n][1:])
        cells = [str(n), f"{n / times[-1]:,.0f}", f"{1e3 * times[-1]:.2f}", f"{1e3 * limit:.2f}",
                 f"{100 * limit / times[-1]:.0f} %"]  # fmt: skip
        curves.setdefault("lmclock", []).append((n, n / times[-1]))
        for kind in KINDS:
            key, name = theirs(samples, kind, n), f"llama.cpp {kind}"
            ratio = quotient(samples, key, ("lmclock", str(n)))
            if key and ratio:
                speed = n * NEW / statistics.median(samples[key])
                curves.setdefault(name, []).append((n, speed))
                cells += [f"{speed:,.0f}", f"{ratio:.2f}"]
            else:
                cells += ["", ""]
        rows.append(cells)
    head = ["sequences", "lmclock, tok/s", "ms a cycle", "limit, ms", "of the limit"]
    head += [cell for kind in KINDS for cell in (f"llama.cpp {kind}, tok/s", "lmclock is x")]
    yield table(head, rows)
    yield from _knees(list(foretold.values()), times, curves, plan)


def _knees(
    foretold: Sequence[Sequence[float]], times: Sequence[float], curves: Mapping[str, Any],
    plan: Plan,
) -> Iterator[str]:  # fmt: skip
    """What the cost model foretells, what was measured, and the plot of both."""
    knee, seen = predicted_knee(foretold), measured_knee(SEQUENCES[: len(times)], times)
    marks = {}
    if knee:
        marks["predicted knee"] = knee
    if seen and seen > 0:
        marks["measured knee"] = seen
    yield (
        "Knee from memory to arithmetic: "
        + ", ".join(f"{what.split()[0]} at {at:.1f} sequences" for what, at in marks.items())
        + ". Measured: sequences that take as long as one, at the time per sequence of the most."
    )
    series = [Series.of(name, points) for name, points in curves.items()]
    most = [row for row in foretold if row[0] <= max(SEQUENCES)]
    bound = Series("limit (cost model)", [r[0] for r in most], [r[0] / max(r[1:]) for r in most],
                   "--")  # fmt: skip
    axes = Axes("Decoding together", "sequences", "tokens per second", log_x=True, marks=marks)
    yield draw("batch", axes, [*series, bound], plan.dry)


METHOD = f"""The packaged Q4_1 file; each sequence begins with a token of its own and decodes \
{NEW} more. lmclock is timed by its clock from the first fetch to the last write-back of the \
cycles that decode all sequences; llama.cpp by llama_decode calls with one token of each, flash \
attention off or on, whichever is faster. The limit is that of the cost model with the limits \
measured in the same run."""


if __name__ == "__main__":
    main()
