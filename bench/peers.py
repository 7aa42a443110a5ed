"""lmclock beside other engines and beside the limit: prefill of 512 tokens, decode of 128.

    python -m bench.peers [--rounds 5] [--threads 2] [--resume] [--seconds 80]

Every engine runs in a process of its own with the same number of threads, all in one interleaved
run, warm. lmclock is timed from outside, through `Model.generate`: scheduler, sampler, clock, text
and Python are in its time. Of the others only the forward passes are: tokenizer, sampling and text
are not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import click

from bench import products
from bench.common import Samples, ratio, serve, start, table
from bench.engines import (
    Made,
    Sizes,
    ctranslate2_jobs,
    llama_jobs,
    lmclock_jobs,
    onnx_jobs,
    torch_jobs,
)
from bench.stages import Goal, Plan, Stage, Store, best, options, quotient

PACKAGES = (
    "llama-cpp-python", "ctranslate2", "onnxruntime-genai", "onnxruntime", "transformers", "torch",
    "numpy",
)  # fmt: skip
SAME = "llama.cpp Q4_1"
LLAMA = (SAME, "llama.cpp Q4_0", "llama.cpp Q8_0", "llama.cpp Q4_K_M")
CT2, ONNX = "ctranslate2 int8", "onnxruntime-genai int4"
SMALL = (*LLAMA, CT2, ONNX)  # peers of 8 bits or fewer
SLOW = "transformers f32"  # measured when asked for: it doubles the time of a round
QUICK = ("lmclock", SAME, "limit")
PEERS: dict[str, Callable[[Sizes], Made]] = {
    "lmclock": lmclock_jobs,
    **{name: partial(llama_jobs, kind=name.split()[1]) for name in LLAMA},
    CT2: ctranslate2_jobs,
    ONNX: onnx_jobs,
    "transformers bf16": partial(torch_jobs, kind="bfloat16"),
    "transformers f32": partial(torch_jobs, kind="float32"),
    # The products alone, plain reading, plain arithmetic; see bench/products.py.
    "limit": lambda sizes: products.jobs(sizes.threads, sizes.prompt, sizes.new),
}


@click.command(help=__doc__)
@options(rounds=5)
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True)
@click.option("--new", type=click.IntRange(1), default=128, show_default=True)
@click.option("--peer", multiple=True, type=click.Choice(list(PEERS)), help="Peers to measure.")
@click.option("--worker", hidden=True)
def main(plan: Plan, prompt: int, new: int, peer: tuple[str, ...], worker: str | None) -> None:
    sizes = Sizes(plan.threads, prompt, new)
    if worker:
        serve(lambda: PEERS[worker](sizes))
        return
    store = Store("peers")
    names = peer or (QUICK if plan.quick else tuple(name for name in PEERS if name != SLOW))
    begin = partial(
        start, "bench.peers", names, f"--prompt={prompt}", f"--new={new}", threads=plan.threads
    )
    store.measure("peers", plan, begin, packages=PACKAGES)
    stage = store.stage("peers")
    store.finish(plan, "Speed beside other engines", parts(stage, sizes), goals(stage.samples()))


def fastest(samples: Samples, names: tuple[str, ...], job: str) -> tuple[str, str] | None:
    """The (worker, setting) of a job that took the least time."""
    return best(samples, [key for key in samples if key[0] in names and _is(key[1], job)])


def _is(job: str, kind: str) -> bool:
    return job == kind or job.startswith(f"{kind} ")


def goals(samples: Samples) -> list[Goal]:
    """Lines 1 and 2 of what is to be reached."""

    def over(names: tuple[str, ...], job: str) -> float | None:
        return quotient(samples, fastest(samples, names, job), ("lmclock", job))

    matmul = samples.get(("lmclock", "matmul"))
    return [
        Goal("decode, llama.cpp on the same file", over((SAME,), "decode"), 3.0),
        Goal("decode, fastest peer of 8 bits or fewer", over(SMALL, "decode"), 2.0),
        Goal("decode, share of a matvec-only pass",
             quotient(samples, ("limit", "decode"), ("lmclock", "decode")), 0.90, "%"),
        Goal("prefill, fastest peer of 8 bits or fewer", over(SMALL, "prefill"), 2.0),
        Goal("prefill, ctranslate2 int8", over((CT2,), "prefill"), 2.0),
        Goal("prefill, llama.cpp's best format", over(LLAMA, "prefill"), 3.6),
        Goal("prefill, products' share of the int8 peak of the same moment",
             statistics.median(matmul) if matmul else None, 0.68, "%"),
    ]  # fmt: skip


def parts(stage: Stage, sizes: Sizes) -> Iterator[str]:
    """The text of the section."""
    samples = stage.samples()
    rounds = len(stage.rounds)
    yield METHOD.format(rounds=rounds, batch=sizes.prompt)
    same = {job: fastest(samples, (SAME,), job) for job in sizes.tokens}
    rows = []
    for name, about in stage.about.items():
        cells = [name, about.get("weights", "products only, Q4_1")]
        for job, count in sizes.tokens.items():
            key = fastest(samples, (name,), job)
            times = samples[key] if key else []
            if not key or not times:
                cells += ["", "", ""]
                continue
            cells.append(f"{count / statistics.median(times):,.0f} ({count / min(times):,.0f})")
            times_ours = quotient(samples, key, ("lmclock", job))
            below = quotient(samples, same[job], key)
            cells.append(f"{below:.2f}" if below else "")
            cells.append(f"{times_ours:.2f}" if times_ours else "")
        rows.append(cells)
    head = ["engine", "weights"]
    for job, count in sizes.tokens.items():
        head += [f"{job} {count}, tok/s", "x llama.cpp same file", "lmclock is x"]
    yield table(head, rows)
    yield "Settings that were the faster ones: " + ", ".join(
        f"{key[0]} {key[1]}" for name in LLAMA for job in sizes.tokens
        if (key := fastest(samples, (name,), job))
    ) + "."  # fmt: skip
    if "limit" in stage.about:
        yield _shares(stage.about["limit"], samples, sizes)


def _shares(about: Mapping[str, Any], samples: Samples, sizes: Sizes) -> str:
    """The limit's own figures, and what engines reach of it."""
    stream, size, operations = samples["limit", "stream"], about["bytes"], about["operations"]
    reading = [sizes.new * size / rate for rate in stream]
    rows = [
        ("decode, products only", "decode", samples["limit", "decode"],
         f"{sizes.new * size / statistics.median(samples['limit', 'decode']) / 1e9:.1f} GB/s"),
        ("decode, reading the weights", "decode", reading,
         f"{statistics.median(stream) / 1e9:.1f} GB/s"),
        ("prefill, products only", "prefill", samples["limit", "prefill"],
         f"{operations / statistics.median(samples['limit', 'prefill']) / 1e9:,.0f} Gop/s"),
    ]  # fmt: skip
    if ("limit", "int8") in samples:
        peak = samples["limit", "int8"]
        least = [operations / rate for rate in peak]
        rate = f"{statistics.median(peak) / 1e9:,.0f} Gop/s"
        rows.append(("prefill, int8 arithmetic", "prefill", least, rate))
    engines = ["lmclock"] if ("lmclock", "decode") in samples else []
    engines += [name for name in LLAMA if fastest(samples, (name,), "decode")]

    def share(name: str, job: str, least: list[float]) -> str:
        key = fastest(samples, (name,), job)
        return f"{100 * ratio(least, samples[key]):.0f} %" if key else ""

    return table(
        ["limit", "rate", "tok/s", *(f"{name} reaches" for name in engines)],
        [
            (what, rate, f"{sizes.tokens[job] / statistics.median(least):,.0f}",
             *(share(name, job, least) for name in engines))
            for what, job, least, rate in rows
        ],
    )  # fmt: skip


METHOD = """SmolLM2-135M-Instruct, the packaged file; medians of {rounds} interleaved rounds, the \
fastest in brackets. Prefill starts from an empty cache and ends with the logits of the last \
token; decode takes one token at a time from an empty cache. lmclock runs through its Python API \
with scheduler, sampler, clock and text in its time. llama.cpp is called through its C interface \
(llama_decode, n_batch = n_ubatch = {batch}, keys and values in f16), so that no Python and no \
sampling is in its time, on the packaged file and on files its own quantiser made of it; flash \
attention is off or on, whichever is faster. ctranslate2 and onnxruntime-genai run models that \
their own converters made of the same weights; transformers runs eagerly with its own attention \
and cache on weights dequantised from the same file."""


if __name__ == "__main__":
    main()
