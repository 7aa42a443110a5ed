"""Jobs of every engine, for the scripts that time them: prefill and decode.

A job that has settings to choose from is there once per setting (`prefill`, `prefill -fa`); reports
take the faster one. Seconds are of the forward passes for other engines, of the whole engine for
lmclock: scheduler, sampler, clock, text and Python are in its time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import models
from bench.common import MODEL, Job, transformers_model

if TYPE_CHECKING:
    from lmclock.cycle import Cycle
    from lmclock.model import Model

Made = tuple[Mapping[str, Any], Mapping[str, Job]]
PRODUCTS = ("linear", "qkv", "glu")
PEAK_REPEAT = 20
PEAK_ROUNDS = 512  # a repeat is half a millisecond then, and not over before all threads run


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


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def drawing(vocabulary: int) -> Callable[[int], list[int]]:
    """Draws token ids, never the same again, so that no engine can reuse a prefix."""
    draw = np.random.default_rng(1)
    return lambda count: draw.integers(0, vocabulary, count).tolist()


def generate(model: Model, prompt: list[int], new: int) -> Sequence[Cycle]:
    """A greedy reply of exactly `new` tokens; its cycles."""
    reply = model.generate(prompt, max_new_tokens=new, temperature=0, ignore_eos=True)
    assert len(reply.tokens) == new
    return reply.cycles


def lmclock_jobs(sizes: Sizes, path: str = MODEL, simd: str | None = None) -> Made:
    """The whole engine through the Python API. `matmul`: the products' share of the peak."""
    from lmclock.model import load

    model = load(path, threads=sizes.threads, context=sizes.context, path=simd)
    draw = drawing(model.config.vocab)

    def matmul() -> float:
        prefill = partial(generate, model, draw(sizes.prompt), 1)
        return peak_share(model, prefill, PRODUCTS, ("int8",))

    jobs: dict[str, Job] = {
        "prefill": lambda: timed(partial(generate, model, draw(sizes.prompt), 1)),
        "decode": lambda: timed(partial(generate, model, [0], sizes.new)),
        "matmul": matmul,
    }
    return {"weights": "Q4_1", "path": model.machine.path}, jobs  # type: ignore[attr-defined]


def peak_share(
    model: Model, run: Callable[[], Sequence[Cycle]], opcodes: Sequence[str], kinds: Sequence[str]
) -> float:
    """Operations per busy second of some opcodes in a run, as a share of the highest peak of
    `kinds` on all threads: the larger of those measured right before and after it, since another
    engine's threads that still spin make a peak lower and nothing makes it higher. The picked rows'
    output matrix is left out: it is bound by memory.
    """
    import lmclock._native as native

    path, threads = model.machine.path, model.machine.traits.threads  # type: ignore[attr-defined]

    def peak() -> float:
        return max(
            statistics.median(native.time_peak(kind, PEAK_ROUNDS, threads, PEAK_REPEAT, path))
            for kind in kinds
            if native.peak(kind, 1, path)
        )

    before = peak()
    cycles = run()
    return rate_of(model, cycles, opcodes) / max(before, peak())


def rate_of(model: Model, cycles: Sequence[Cycle], opcodes: Sequence[str]) -> float:
    """Operations per second of the busy time of some opcodes, the clock's own counts and ticks.
    Instructions on picked rows are left out.
    """
    from lmclock.roofline import Works

    works, rate = Works(model.program), model.machine.traits.tick_rate
    types = model.program.types("step")
    body = model.program.section("step").instructions
    chosen = np.array([i.op in opcodes and types[i.ins[0]].space == "tok" for i in body])
    done = ticks = 0.0
    for cycle in cycles:
        work = works.of("step", cycle.batch).operations
        for run in cycle.runs:
            table = run.ticks.table
            span = slice(run.ticks.first, run.ticks.first + len(table))
            busy = (table[:, :, 1] - table[:, :, 0]).sum(axis=1)
            ticks += float(busy[chosen[span]].sum())
            done += float(work[span][chosen[span]].sum())
    return done * rate * model.machine.traits.threads / ticks


def llama_jobs(sizes: Sizes, kind: str, path: str | None = None, flash_only: bool = False) -> Made:
    """llama.cpp on weights of a kind (models.TYPES), flash attention off (unless `flash_only`) and
    on: llama_decode, as llama-bench does it.
    """
    import ctypes

    from bench.llama import Llama, Weights

    weights = Weights(path or str(models.requantised(kind)))
    draw = drawing(weights.vocabulary)
    jobs: dict[str, Job] = {}

    def prefill(llama: Llama) -> float:
        ids = (ctypes.c_int32 * sizes.prompt)(*draw(sizes.prompt))
        llama.clear()
        return timed(partial(llama.decode, ids, sizes.prompt))

    def decode(llama: Llama) -> float:
        tokens = [(ctypes.c_int32 * 1)(token) for token in draw(sizes.new)]
        llama.clear()
        return timed(lambda: llama.one_by_one(tokens))

    for flash, name in ((True, " -fa"),) if flash_only else ((False, ""), (True, " -fa")):
        llama = Llama(weights, sizes.threads, flash, sizes.context, batch=sizes.prompt)
        jobs[f"prefill{name}"] = partial(prefill, llama)
        jobs[f"decode{name}"] = partial(decode, llama)
    return {"weights": kind, "notes": weights.notes}, jobs


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


def ctranslate2_jobs(sizes: Sizes) -> Made:
    """ctranslate2's generator: int8 weights and activations. Prefill is one token sampled after
    the prompt; decode is the time of `new` tokens more.
    """
    import ctranslate2

    generator = ctranslate2.Generator(
        str(models.ctranslate2_int8()), device="cpu", compute_type="int8", inter_threads=1,
        intra_threads=sizes.threads,
    )  # fmt: skip
    words = _words()
    draw = drawing(len(words))

    def run(prompt: int, new: int) -> float:
        ids = [[words[n] for n in draw(prompt)]]
        # An end token would end the reply; one that no prompt has cannot be sampled twice.
        return timed(lambda: generator.generate_batch(
            ids, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False,
            max_batch_size=0,
        ))  # fmt: skip

    return {"weights": "int8"}, {
        "prefill": lambda: run(sizes.prompt, 1),
        "decode": lambda: run(1, sizes.new),
    }


def _words() -> list[str]:
    """The vocabulary as ctranslate2 spells it, without the special tokens at its beginning."""
    text = (models.transformers_folder() / "tokenizer.json").read_text(encoding="utf-8")
    found: dict[str, int] = json.loads(text)["model"]["vocab"]
    return sorted(found, key=found.__getitem__)[32:]


def onnx_jobs(sizes: Sizes) -> Made:
    """onnxruntime-genai: int4 weights; append_tokens for the prompt, then a token at a time."""
    import onnxruntime_genai as og

    config = og.Config(str(models.onnx_int4()))
    config.clear_providers()
    options = {"intra_op_num_threads": sizes.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    draw = drawing(49000)

    def generator(length: int) -> Any:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        return og.Generator(model, options)

    def prefill() -> float:
        one = generator(sizes.prompt + 8)
        ids = np.array([draw(sizes.prompt)], np.int32)
        return timed(lambda: (one.append_tokens(ids), one.generate_next_token()))

    def decode() -> float:
        one = generator(sizes.new + 8)
        one.append_tokens(np.array([draw(1)], np.int32))
        return timed(lambda: [one.generate_next_token() for _ in range(sizes.new)])

    return {"weights": "int4"}, {"prefill": prefill, "decode": decode}
