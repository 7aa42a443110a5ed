"""Inverse frequencies of scaled rotary positions, as the `freqs` weight of `rope` holds them."""

from __future__ import annotations

import math

import numpy as np

from lmclock.config import Rope
from lmclock.formats import Array


def frequencies(rope: Rope, factors: Array | None = None) -> Array | None:
    """Radians per position of each pair, float32 (dims / 2,); None where `base` alone says them.

    `factors`, one for each pair, divide the frequencies: llama3's scaling as GGUF files store it.
    Linear: Chen et al. 2023. llama3: the Llama 3.1 release. yarn: Peng et al. 2023, section 3.2.
    """
    if rope.scaling == "none" and factors is None:
        return None
    pairs = np.arange(rope.dims // 2)
    plain = rope.base ** (-2.0 * pairs / rope.dims)
    if factors is not None:
        plain = plain / factors.reshape(-1)
    if rope.scaling == "none":
        return plain.astype(np.float32)
    kept = _KEPT[rope.scaling](rope, plain)  # 1: the pair keeps its frequency, 0: it is stretched
    return (plain * kept + plain / rope.factor * (1 - kept)).astype(np.float32)


def _kept_llama3(rope: Rope, plain: Array) -> Array:
    turns = rope.original * plain / (2 * math.pi)
    return np.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)


def _kept_yarn(rope: Rope, plain: Array) -> Array:
    def pair_that_turns(times: float) -> float:
        ratio = rope.original / (times * 2 * math.pi)
        return rope.dims * math.log(ratio) / (2 * math.log(rope.base))

    first, last = pair_that_turns(rope.high), pair_that_turns(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    span = last - first or 0.001  # a blend of no length is a step
    return 1 - np.clip((np.arange(rope.dims // 2) - first) / span, 0.0, 1.0)


_KEPT = {
    "linear": lambda rope, plain: np.zeros_like(plain),
    "llama3": _kept_llama3,
    "yarn": _kept_yarn,
}
