"""lmclock beside other engines and beside the limit: prefill of 512 tokens, decode of 128.

    python -m bench.peers [--rounds 7] [--threads 2]

Every engine runs in a process of its own with the same number of threads, all in one interleaved
run, warm. lmclock is timed from outside, through `Model.generate`: scheduler, sampler, clock, text
and Python are in its time. Of the others only the forward passes are: tokenizer, sampling and text
are not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np

from bench import products
from bench.common import (
    MODEL,
    Job,
    Samples,
    Worker,
    interleave,
    machine,
    publish,
    ratio,
    serve,
    start,
    table,
    transformers_model,
)
from lmclock import settings
from lmclock.files.pull import pull


@dataclass(frozen=True)
class Sizes:
    """What every engine is given: threads, tokens to prefill, tokens to decode."""

    threads: int
    prompt: int = 512
    new: int = 128

    @property
    def context(self) -> int:
        return max(self.prompt, self.new) + 64

    @property
    def tokens(self) -> dict[str, int]:
        return {"prefill": self.prompt, "decode": self.new}


Made = tuple[Mapping[str, Any], Mapping[str, Job]]
PACKAGES = ("llama-cpp-python", "transformers", "torch", "numpy")


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drawing(vocabulary: int) -> Callable[[int], list[int]]:
    """Draws token ids, never the same again, so that no engine can reuse a prefix."""
    draw = np.random.default_rng(1)
    return lambda count: draw.integers(0, vocabulary, count).tolist()


def lmclock_jobs(sizes: Sizes) -> Made:
    """The whole engine through the Python API."""
    from lmclock.model import load

    model = load(MODEL, threads=sizes.threads, context=sizes.context)
    draw = drawing(model.config.vocab)

    def generate(prompt: list[int], new: int) -> None:
        reply = model.generate(prompt, max_new_tokens=new, temperature=0, ignore_eos=True)
        assert len(reply.tokens) == new

    return {"weights": "Q4_1"}, {
        "prefill": lambda: timed(partial(generate, draw(sizes.prompt), 1)),
        "decode": lambda: timed(partial(generate, [0], sizes.new)),
    }


def llama_jobs(sizes: Sizes, flash: bool) -> Made:
    """llama.cpp through its C interface: llama_decode, as llama-bench does it."""
    import ctypes

    from bench.llama import Llama

    llama = Llama(str(pull(MODEL)), sizes.threads, flash, sizes.context, batch=sizes.prompt)
    draw = drawing(llama.vocabulary)

    def prefill() -> float:
        ids = (ctypes.c_int32 * sizes.prompt)(*draw(sizes.prompt))
        llama.clear()
        return timed(partial(llama.decode, ids, sizes.prompt))

    def decode() -> float:
        tokens = [(ctypes.c_int32 * 1)(token) for token in draw(sizes.new)]
        llama.clear()

        def steps() -> None:
            for token in tokens:
                llama.decode(token, 1)

        return timed(steps)

    about = {"weights": "Q4_1", "notes": llama.notes}
    return about, {"prefill": prefill, "decode": decode}


def torch_jobs(sizes: Sizes, kind: str) -> Made:
    """transformers, eager, its own attention and cache, the weights dequantised from the file."""
    import torch
    import transformers

    model = transformers_model(sizes.threads, kind)
    draw = drawing(model.config.vocab_size)

    def prefill() -> float:
        ids = torch.tensor([draw(sizes.prompt)])
        with torch.inference_mode():
            return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))

    def decode() -> float:
        tokens = [torch.tensor([[token]]) for token in draw(sizes.new)]
        cache = transformers.DynamicCache(config=model.config)

        def steps() -> None:
            for token in tokens:
                model(input_ids=token, past_key_values=cache, use_cache=True)

        with torch.inference_mode():
            return timed(steps)

    return {"weights": {"bfloat16": "BF16", "float32": "F32"}[kind]}, {
        "prefill": prefill,
        "decode": decode,
    }


def limit_jobs(sizes: Sizes) -> Made:
    """The products alone, plain reading, plain arithmetic; see bench/products.py."""
    return products.jobs(sizes.threads, sizes.prompt, sizes.new)


PEERS: dict[str, Callable[[Sizes], Made]] = {
    "lmclock": lmclock_jobs,
    "llama.cpp": partial(llama_jobs, flash=False),
    "llama.cpp -fa": partial(llama_jobs, flash=True),
    "transformers bf16": partial(torch_jobs, kind="bfloat16"),
    "transformers f32": partial(torch_jobs, kind="float32"),
    "limit": limit_jobs,
}


LLAMA = ("llama.cpp", "llama.cpp -fa")


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=settings.threads)
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True)
@click.option("--new", type=click.IntRange(1), default=128, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(PEERS)), help="Peers to measure.")
@click.option("--dry", is_flag=True, help="Print only.")
@click.option("--worker", hidden=True)
def main(
    rounds: int, threads: int, prompt: int, new: int, only: tuple[str, ...], dry: bool,
    worker: str | None,
) -> None:  # fmt: skip
    sizes = Sizes(threads, prompt, new)
    if worker:
        serve(lambda: PEERS[worker](sizes))
        return
    workers, skipped = start(
        "bench.peers", only or PEERS, f"--prompt={prompt}", f"--new={new}", threads=threads
    )
    samples = interleave(
        {(name, job): partial(one.ask, job) for name, one in workers.items() for job in one.jobs},
        rounds,
    )
    for one in workers.values():
        one.close()
    publish("peers", report(workers, samples, skipped, sizes), dry)


def report(
    workers: Mapping[str, Worker], samples: Samples, skipped: list[str], sizes: Sizes
) -> str:
    """The section of the document."""
    rounds = len(next(iter(samples.values())))
    there = [name for name in LLAMA if name in workers]
    fastest = {
        job: min(there, key=lambda n: statistics.median(samples[n, job]), default="")
        for job in sizes.tokens
    }
    rows = []
    for name, one in workers.items():
        cells = [name, one.about.get("weights", "products only, Q4_1")]
        for job, count in sizes.tokens.items():
            times = samples[name, job]
            cells.append(f"{count / statistics.median(times):,.1f} ({count / min(times):,.1f})")
            cells.append(f"{ratio(samples[fastest[job], job], times):.2f}" if there else "")
        rows.append(cells)
    head = ["engine", "weights", f"prefill {sizes.prompt}, tok/s", "x llama.cpp",
            f"decode {sizes.new}, tok/s", "x llama.cpp"]  # fmt: skip
    notes = [*skipped, *(note for one in workers.values() for note in one.about.get("notes", ()))]
    return "\n\n".join([
        f"## Speed beside other engines\n\n{machine(sizes.threads, PACKAGES)}",
        METHOD.format(rounds=rounds, batch=sizes.prompt),
        table(head, rows),
        *(_shares(workers["limit"].about, samples, sizes) if "limit" in workers else []),
        "\n".join(f"- {note}" for note in dict.fromkeys(notes)),
    ])  # fmt: skip


def _shares(about: Mapping[str, Any], samples: Samples, sizes: Sizes) -> Iterator[str]:
    """The limit's own figures, and what lmclock reaches of it."""
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
    engines = [name for name in ("lmclock", *LLAMA) if (name, "decode") in samples]
    yield table(
        ["limit", "rate", "tok/s", *(f"{name} reaches" for name in engines)],
        [
            (what, rate, f"{sizes.tokens[job] / statistics.median(least):,.0f}",
             *(f"{100 * ratio(least, samples[name, job]):.0f} %" for name in engines))
            for what, job, least, rate in rows
        ],
    )  # fmt: skip


METHOD = """SmolLM2-135M-Instruct, the packaged file; medians of {rounds} interleaved rounds, the \
fastest in brackets. Prefill starts from an empty cache and ends with the logits of the last \
token; decode takes one token at a time from an empty cache. lmclock runs through its Python API \
with scheduler, sampler, clock and text in its time. llama.cpp is called through its C interface \
(llama_decode, n_batch = n_ubatch = {batch}, keys and values in f16, flash attention off and on), \
so that no Python and no sampling is in its time; ratios are to the faster of its two settings. \
transformers runs eagerly with its own attention and cache on weights dequantised from the same \
file."""


if __name__ == "__main__":
    main()
