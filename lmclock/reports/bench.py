"""`bench`: prefill and decode tests in llama-bench's manner, run through the engine, as records.

    cycles = measure(engine, Test(prompt=512), np.random.default_rng(1))
    record = times(test, [cycles, ...], engine.machine.traits) | rates(clock, traits)

A test computes `prompt` tokens and then decodes `generated` ones behind `depth` tokens that are
cached before the time starts. Token ids are drawn, tokenizer and text take no part; what the engine
does for a token (scheduling, sampling, bookkeeping) does.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmclock.clock import Clock
from lmclock.cycle import Cycle
from lmclock.engine import Engine, Request
from lmclock.engine.burst import BURST
from lmclock.errors import LmclockError, OptionError
from lmclock.machines import Traits
from lmclock.program import Program


@dataclass(frozen=True)
class Test:
    """`pp512`, `tg128`, `pp512+tg128`, each with `@ d1024` behind 1024 cached tokens."""

    prompt: int = 0
    generated: int = 0
    depth: int = 0

    @property
    def name(self) -> str:
        parts = (("pp", self.prompt), ("tg", self.generated))
        name = "+".join(f"{what}{count}" for what, count in parts if count)
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def context(self) -> int:
        """Positions it needs: what it computes, and the token that the last row foretells."""
        return self.depth + self.prompt + self.generated + 1


def measure(engine: Engine, test: Test, rng: np.random.Generator) -> list[Cycle]:
    """Run the test once; the cycles that count, whose positions begin at `depth`.

    Prompt ids come from `rng`, so that no page cached by an earlier run holds them; the ids of the
    depth are always the same, so that they are computed once.
    """
    page, ids = engine.cache.page_size, engine.facts.vocabulary or 1
    if test.prompt and test.depth % page:
        raise OptionError(
            f"depth {test.depth} before a prompt is out of range; valid: multiples of {page}, "
            "what a page of the cache holds"
        )
    behind = np.random.default_rng(0).integers(0, ids, test.depth).tolist()
    if behind:
        _run(engine, Request(behind, max_new_tokens=0))
    prompt = behind + rng.integers(0, ids, test.prompt).tolist() or [0]
    # The last row of a prompt gives the first new token; of nothing but depth it is not in time.
    new = test.generated + bool(test.depth + test.prompt)
    cycles = _run(engine, Request(prompt, new, ignore_eos=True))
    starts = [int(c.batch.rows[engine.facts.space].positions[0]) for c in cycles]
    timed = [c for c, start in zip(cycles, starts, strict=True) if start >= test.depth]
    rows = sum(c.prompt_rows + c.decode_rows for c in timed)
    assert rows == test.prompt + test.generated, f"{rows} rows were computed for {test.name}"
    return timed


def _run(engine: Engine, request: Request) -> Sequence[Cycle]:
    """The cycles of a request, in bursts as a whole reply is generated."""
    with engine.heard() as cycles:
        engine.add(request)
        while engine.busy:
            engine.step(BURST)
            for event in engine.events:
                if event.finish == "error":
                    raise LmclockError(event.message)
    return cycles


def seconds(cycles: Sequence[Cycle], traits: Traits) -> float:
    """From the first fetch to the last write-back, pauses between cycles included."""
    return (cycles[-1].stamps[4] - cycles[0].stamps[0]) / traits.tick_rate


def times(test: Test, runs: Sequence[Sequence[Cycle]], traits: Traits) -> dict[str, Any]:
    """llama-bench's fields of a test that ran `len(runs)` times."""
    samples = [round(1e9 * seconds(cycles, traits)) for cycles in runs]
    speeds = [1e9 * (test.prompt + test.generated) / ns for ns in samples]
    return {
        "n_prompt": test.prompt,
        "n_gen": test.generated,
        "n_depth": test.depth,
        "avg_ns": round(statistics.mean(samples)),
        "stddev_ns": round(_deviation(samples)),
        "avg_ts": statistics.mean(speeds),
        "stddev_ts": _deviation(speeds),
        "samples_ns": samples,
        "samples_ts": speeds,
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def rates(clock: Clock, traits: Traits) -> dict[str, Any]:
    """The clock's fields of all runs of a test together; `of_bound` is a fraction of one."""
    tallies = list(clock.kinds.values())
    spent = sum(t.ticks for t in tallies) / clock.rate
    cycles = sum(t.cycles for t in tallies)
    rows = sum(t.prompt_tokens + t.decode_rows for t in tallies)
    moved = sum(float(table[:, 0].sum()) for t in tallies for table in t.traffic.values())
    bound = sum(t.account.bound for t in tallies) / (clock.rate * clock.threads)
    return {
        "hz": cycles / spent,
        "cycles_per_token": cycles / rows,
        "bytes_per_token": moved / rows,
        "bytes_per_second": moved / spent,
        "of_bound": bound / spent,
        "tick_source": traits.tick_source,
        "limits_when": clock.limits.when,
        "limits_spread": clock.limits.spread,
    }


def model_facts(program: Program) -> dict[str, Any]:
    """llama-bench's fields of a model: `llama 135M Q4_1`, its stored bytes, its parameters."""
    count = sum(rows * width for rows, width in (w.shape for w in program.weights))
    sizes: Counter[str] = Counter()
    for weight in program.weights:
        sizes[weight.format] += weight.bytes
    most = max(sizes, key=sizes.__getitem__, default="f32")
    scale, letter = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "K")
    short = f"{count / scale:.{int(letter == 'B')}f}{letter}"
    return {
        "model_type": f"{program.family} {short} {most.upper()}",
        "model_size": sum(sizes.values()),
        "model_n_params": count,
    }
