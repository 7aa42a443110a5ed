"""One piece of work for any kind of model: what the verbs that look at cycles run.

    cycles = probe(model, "The clock of a processor is", max_new_tokens=16)

A text becomes the prompt of a decoder, the rows of an encoder, or the source of a translator, whose
decoder begins as its files say. For a net that takes numbers the text holds some: a row a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lmclock.assemble import Assembled
from lmclock.cycle import Cycle
from lmclock.encode.numbers import number_input, rows_of
from lmclock.engine import Request
from lmclock.engine.facts import read_facts
from lmclock.errors import LmclockError, UnsupportedError
from lmclock.model import Model, sampling_of, tokenizer_of

DEFAULT_PROMPT = "The clock of a processor is"
ROWS = 64  # of random numbers, for a net that takes numbers where none are given


@dataclass(frozen=True)
class Work:
    """Ids of the rows, encoder rows before them, and (rows, width) of inputs that are no tokens."""

    ids: list[int]
    source: list[int] = field(default_factory=list)
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


Prompt = str | Sequence[int] | None


def work_of(assembled: Assembled, prompt: Prompt) -> Work:
    """The work that a text, or token ids, stand for; without a prompt DEFAULT_PROMPT, or random
    numbers.
    """
    facts = read_facts(assembled.program)
    numbers = number_input(facts)
    if numbers:
        x = np.random.default_rng(0).standard_normal((ROWS, numbers.width)).astype(np.float32)
        if prompt is not None:
            lines = prompt.splitlines() if isinstance(prompt, str) else [" ".join(map(str, prompt))]
            x = rows_of(lines, numbers.width)
        return Work([0] * len(x), inputs={numbers.name: x})
    given = DEFAULT_PROMPT if prompt is None else prompt
    ids = tokenizer_of(assembled).encode(given) if isinstance(given, str) else [*given]
    if not facts.encodes:
        return Work(ids)
    start = getattr(assembled.config, "start", None)
    if start is None:
        raise UnsupportedError("the files of this model do not say which token begins a target")
    return Work([start], ids)


def probe(
    model: Model, prompt: Prompt, max_new_tokens: int = 0, stop: Any = (), **options: Any
) -> Sequence[Cycle]:
    """The cycles of one piece of work. Where it generates, options are those of Model.stream."""
    work = work_of(model.assembled, prompt)
    if isinstance(prompt, str | None) and not work.source and not work.inputs:
        given = DEFAULT_PROMPT if prompt is None else prompt
        return model.cycles_of(given, max_new_tokens=max_new_tokens, stop=stop, **options)
    return _cycles(model, work, max_new_tokens, **options)


def _cycles(
    model: Model, work: Work, max_new_tokens: int, ignore_eos: bool = False, **sampling: Any
) -> Sequence[Cycle]:
    """The cycles of a request; new tokens come only from a program that samples."""
    facts = model.engine.facts
    new = 0 if facts.next is None else max_new_tokens if facts.carries else min(max_new_tokens, 1)
    ends = model.tokenizer.eos_ids if new and not ignore_eos else frozenset()
    request = Request(
        work.ids, new, sampling_of(sampling), ends, ignore_eos, work.source, work.inputs
    )
    with model.engine.heard() as cycles:
        number = model.engine.add(request)
        for event in model.engine.run():
            if event.sequence == number and event.finish == "error":
                raise LmclockError(event.message)
    return cycles
