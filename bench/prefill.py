"""Prefill from 32 to 8192 tokens beside llama.cpp: speed, attention's share of the peak, memory.

    python -m bench.prefill [--rounds 5] [--only short] [--only long] [--only memory]

Stages: `short` (32 to 512 tokens), `long` (2048), `longest` (8192, one round in five), `memory`
(peak resident memory of a process of its own per length, lmclock only).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import click

from bench.common import MODEL, Job, Samples, serve, start, table
from bench.engines import Made, drawing, generate, peak_share, timed
from bench.plots import Axes, Series, draw
from bench.stages import Goal, Plan, Store, best, options, quotient

SHORT, LONG, LONGEST = (32, 64, 128, 512), (2048,), (8128,)  # the model's context is 8192
STAGES = {"short": SHORT, "long": LONG, "longest": LONGEST}
MEMORY = (512, 2048, 8128)
BEST = "Q4_0"  # llama.cpp's fastest format for prefill, as bench/peers.py finds
PEERS = {"short": ("Q4_1", BEST), "long": (BEST,), "longest": (BEST,)}
PACKAGES = ("llama-cpp-python", "numpy")
ATTENTION = ("attend",)
PAIRS = ("int16", "bf16", "f32")  # arithmetic that attention may be done in


@click.command(help=__doc__)
@options(rounds=5)
@click.option("--lengths", default="", hidden=True)
@click.option("--worker", hidden=True)
def main(plan: Plan, lengths: str, worker: str | None) -> None:
    tokens = [int(n) for n in lengths.split(",") if n]
    if worker:
        serve(lambda: jobs(worker, tokens, plan.threads))
        return
    store = Store("prefill")
    for stage, sizes in STAGES.items():
        if plan.quick and stage == "longest":
            continue
        names = ["lmclock", *(f"llama.cpp {kind}" for kind in PEERS[stage])]
        begin = partial(
            start, "bench.prefill", names, f"--lengths={','.join(map(str, sizes))}",
            threads=plan.threads,
        )  # fmt: skip
        few = stage == "longest"
        rounds = max(1, plan.rounds // 5) if few else plan.rounds
        store.measure(stage, plan, begin, rounds, PACKAGES, warm=not few)
    names = [f"memory {n}" for n in MEMORY]
    begin = partial(start, "bench.prefill", names, threads=plan.threads)
    store.measure("memory", plan, begin, 1, PACKAGES, warm=False)
    samples = merged(store)
    store.finish(plan, "Prefill from 32 to 8k tokens", parts(samples, plan), goals(samples))


def jobs(worker: str, tokens: Sequence[int], threads: int) -> Made:
    """Jobs of a worker: one per length (and setting)."""
    name, _, argument = worker.partition(" ")
    if name == "memory":
        return memory_jobs(int(argument), threads)
    if name == "lmclock":
        return lmclock_jobs(tokens, threads)
    return llama_jobs(argument, tokens, threads)


def lmclock_jobs(tokens: Sequence[int], threads: int) -> Made:
    from lmclock.model import load

    model = load(MODEL, threads=threads, context=min(8192, max(tokens) + 64))
    draw_ids = drawing(model.config.vocab)
    found: dict[str, Job] = {
        str(n): lambda n=n: timed(partial(generate, model, draw_ids(n), 1))  # type: ignore[misc]
        for n in tokens
    }
    if max(tokens) >= 2048:
        found["attention"] = lambda: peak_share(
            model, lambda: generate(model, draw_ids(max(tokens)), 1), ATTENTION, PAIRS
        )
    return {}, found


def llama_jobs(kind: str, tokens: Sequence[int], threads: int) -> Made:
    from bench.llama import UBATCH, Llama, Weights
    from bench.models import requantised

    weights = Weights(str(requantised(kind)))
    draw_ids = drawing(weights.vocabulary)
    found: dict[str, Job] = {}
    most = max(tokens)

    def run(llama: Llama, n: int) -> float:
        ids = draw_ids(n)
        llama.clear()
        return timed(lambda: llama.prompt(ids, most))

    # Without flash attention 8k tokens take twice the time of 2k twice over: not its best setting.
    for flash, name in ((True, " -fa"), (False, ""))[: 1 if most > 2048 else 2]:
        llama = Llama(weights, threads, flash, most + 64, batch=max(most, UBATCH))
        found |= {f"{n}{name}": partial(run, llama, n) for n in tokens}
    return {"notes": weights.notes}, found


def memory_jobs(length: int, threads: int) -> Made:
    """Peak resident bytes of a process that prefills once."""
    import resource

    from lmclock.model import load

    def peak() -> float:
        model = load(MODEL, threads=threads, context=length + 64)
        generate(model, drawing(model.config.vocab)(length), 1)
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    return {}, {"peak": peak}


def merged(store: Store) -> Samples:
    """Samples of all stages: their lengths differ, so their jobs do."""
    found: Samples = {}
    for name in (*STAGES, "memory"):
        found |= {key: values for key, values in store.stage(name).samples().items()
                  if key[1] != "attention" or name == "long"}  # fmt: skip
    return found


def fastest(samples: Samples, kind: str, n: int) -> tuple[str, str] | None:
    worker = f"llama.cpp {kind}"
    return best(samples, [(worker, f"{n}"), (worker, f"{n} -fa")])


def goals(samples: Samples) -> list[Goal]:
    rows = [
        Goal(f"prefill {n}, llama.cpp's best",
             quotient(samples, fastest(samples, BEST, n), ("lmclock", str(n))), 3.6)
        for n in (*SHORT, *LONG, *LONGEST)
    ]  # fmt: skip
    speed = {n: rate(samples, ("lmclock", str(n)), n) for n in SHORT}
    flat = None
    if all(speed.values()):
        flat = min(speed[n] or 0.0 for n in SHORT[:-1]) / (speed[512] or 1.0)
    share = samples.get(("lmclock", "attention"))
    rows.append(Goal("slowest of 32, 64, 128 against 512 (no cliff)", flat, 0.7, "%"))
    rows.append(Goal("attention's share of the 16-bit peak at 2048",
                     statistics.median(share) if share else None, 0.65, "%"))  # fmt: skip
    rows.append(Goal("memory from 2k to 8k tokens, growth over that from 512 to 2k per token",
                     growth(samples), 1.5, "x", most=True))  # fmt: skip
    return rows


def rate(samples: Samples, key: tuple[str, str] | None, n: int) -> float | None:
    """Tokens per second."""
    values = samples.get(key) if key else None
    return n / statistics.median(values) if values else None


def growth(samples: Samples) -> float | None:
    """How much faster memory grows per token over the longer lengths: 1 when linear, 4 when
    quadratic.
    """
    peaks = [samples.get((f"memory {n}", "peak")) for n in MEMORY]
    if not all(peaks):
        return None
    values = [statistics.median(p) for p in peaks if p]
    slopes = [(values[k + 1] - values[k]) / (MEMORY[k + 1] - MEMORY[k]) for k in range(2)]
    return slopes[1] / max(slopes[0], 1.0)


def parts(samples: Samples, plan: Plan) -> Iterator[str]:
    """The text of the section."""
    yield METHOD
    rows: list[list[str]] = []
    curves: dict[str, list[tuple[float, float]]] = {"lmclock": [], f"llama.cpp {BEST}": []}
    for n in (*SHORT, *LONG, *LONGEST):
        ours = rate(samples, ("lmclock", str(n)), n)
        cells = [str(n), f"{ours:,.0f}" if ours else ""]
        for kind in ("Q4_1", BEST):
            key = fastest(samples, kind, n)
            theirs, times = rate(samples, key, n), quotient(samples, key, ("lmclock", str(n)))
            cells.append(f"{theirs:,.0f}{' -fa' if key and '-fa' in key[1] else ''}"
                         if theirs else "")  # fmt: skip
            cells.append(f"{times:.2f}" if times else "")
            if kind == BEST and theirs:
                curves[f"llama.cpp {BEST}"].append((n, theirs))
        if ours:
            curves["lmclock"].append((n, ours))
        rows.append(cells)
    head = ["tokens", "lmclock, tok/s", "llama.cpp Q4_1, tok/s", "lmclock is x",
            f"llama.cpp {BEST}, tok/s", "lmclock is x"]  # fmt: skip
    yield table(head, rows)
    axes = Axes("Prefill", "tokens of the prompt", "tokens per second", log_x=True)
    series = [Series.of(name, points) for name, points in curves.items() if points]
    if series:
        yield draw("prefill", axes, series, plan.dry)
    peaks = [(n, samples.get((f"memory {n}", "peak"))) for n in MEMORY]
    yield table(
        ["tokens", "peak resident memory, MB"],
        [[str(n), f"{statistics.median(p) / 1e6:,.0f}" if p else ""] for n, p in peaks],
    )


METHOD = """The packaged Q4_1 file in lmclock; llama.cpp on the same file and in its fastest \
format, flash attention off or on, whichever is faster (8k: on), n_ubatch = 512. Attention's \
share of the peak counts the operations of visible positions only, over the busy time of \
`attend`, against the peak of products of 16-bit pairs, of integers or of bf16, whichever is \
higher (of f32 where there are none), and the larger of those right before and after."""


if __name__ == "__main__":
    main()
