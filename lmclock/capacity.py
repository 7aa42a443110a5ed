"""What is set aside for a model of each kind, where its user does not say."""

from __future__ import annotations

from typing import Any

from lmclock.engine import capacity_for
from lmclock.machines import Capacity
from lmclock.program import Program

# Cached positions, or new tokens of a model that caches none, when nobody asks for fewer.
DEFAULT_CONTEXT = 8192
TEXTS = 64  # of an encoder that may share a cycle
DEFAULT_TARGET = 512  # positions of source and target where a model with an encoder has no limit
BEAMS = 16  # of such a model, all texts together


def capacity_of(
    program: Program, sequences: int | None, context: int, most: int, chunk: int, picks: int | None
) -> Capacity:
    """For a model that generates, an encoder, or both in one; `most` positions are its limit."""
    options: dict[str, Any] = {"chunk": chunk, "picks": picks}
    alone = 1
    if program.has("step") and program.has("encode"):
        most, alone = program.context or DEFAULT_TARGET, BEAMS
        # Small pages, because beams that part copy the one they write into.
        options |= {"source": most, "page_size": 16}
    elif program.has("encode"):
        options["source"], alone = min(most, DEFAULT_CONTEXT), TEXTS
    sequences = sequences or alone
    tokens = sequences * (context or min(most, DEFAULT_CONTEXT))
    return capacity_for(program, sequences=sequences, tokens=tokens, **options)
