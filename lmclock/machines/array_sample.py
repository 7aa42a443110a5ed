"""The sampling rule: from one row of logits and its settings to one token id.

Every machine follows it to the letter, so that a seed gives the same text everywhere. All
arithmetic is float64; `SAMPLING` and `ADJUST` of batch.py are the settings.
"""

from __future__ import annotations

import numpy as np

from lmclock.errors import LmclockError, ProgramError

_MASK = (1 << 64) - 1


def uniform(seed: int, draw: int) -> float:
    """Draw number `draw` of a seed, in [0, 1): 53 bits of splitmix64 (Steele et al. 2014)."""
    z = (seed + (draw + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def sample_row(logits: np.ndarray, settings: np.void, adjust: np.ndarray) -> int:
    """One token id from (vocabulary,) logits, a SAMPLING record and the row's ADJUST records."""
    x = adjusted(logits, settings, adjust)
    if settings["temperature"] == 0:
        return int(x.argmax())
    ids = kept_ids(x, settings)
    probabilities = _softmax(x[ids] / float(settings["temperature"]))
    return draw_id(ids, probabilities, uniform(int(settings["seed"]), int(settings["draw"])))


def adjusted(logits: np.ndarray, settings: np.void, adjust: np.ndarray) -> np.ndarray:
    """Logits in float64 after penalties of tokens already seen, then biases."""
    x = logits.astype(np.float64)
    for record in adjust:
        token, count = int(record["id"]), int(record["count"])
        if not 0 <= token < len(x):
            raise ProgramError(f"token {token} to adjust is none; valid: 0 to {len(x) - 1}")
        if count > 0:
            factor = float(settings["repetition"])
            x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
            x[token] -= float(settings["frequency"]) * count + float(settings["presence"])
        x[token] += float(record["bias"])
    if not np.isfinite(x.max(initial=-np.inf)):  # the maximum of a row with a NaN is NaN
        raise LmclockError(f"logits cannot be sampled: their maximum is {x.max(initial=-np.inf)}")
    return x


def kept_ids(x: np.ndarray, settings: np.void) -> np.ndarray:
    """The ids, ascending, that top_k, then top_p, then min_p leave; equal values prefer low ids."""
    ids = np.argsort(-x, kind="stable")
    if settings["top_k"] > 0:
        ids = ids[: settings["top_k"]]
    p = _softmax(x[ids])
    # Two logits may differ and their probabilities not: order again, by what is compared.
    order = np.lexsort((ids, -p))
    ids, p = ids[order], p[order]
    if settings["top_p"] < 1:
        enough = int(np.searchsorted(np.cumsum(p), float(settings["top_p"]))) + 1
        ids, p = ids[:enough], p[:enough]
    return np.sort(ids[p >= float(settings["min_p"]) * p[0]])


def draw_id(ids: np.ndarray, probabilities: np.ndarray, u: float) -> int:
    """The first id whose cumulative probability exceeds u of the total; the last one otherwise."""
    cumulative = np.cumsum(probabilities)
    number = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[min(number, len(ids) - 1)])


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()
