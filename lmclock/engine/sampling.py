"""How a sequence's next token is chosen: its settings, and the records a machine reads.

The order, the same on every machine: (1) penalties and biases change logits, (2) temperature 0
takes the largest, (3) top_k, (4) top_p on the untempered probabilities, (5) min_p, (6) temperature,
(7) a draw by splitmix64(seed, draw), where `draw` counts the sequence's new tokens from 0. So a
sequence draws the same numbers whatever else runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from lmclock.batch import ADJUST, SAMPLING
from lmclock.errors import OptionError, choices

_INT32 = 2**31 - 1
# name -> (least, most, how the range reads); NaN lies in none of them
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (1e-5, 100, "0, or 0.00001 to 100"),
    "top_k": (0, _INT32, f"0 (off) to {_INT32}"),
    "top_p": (1e-6, 1, "0.000001 to 1 (off)"),
    "min_p": (0, 1, "0 (off) to 1"),
    "repetition": (0.01, 100, "0.01 to 100; 1 is off"),
    "presence": (-100, 100, "-100 to 100; 0 is off"),
    "frequency": (-100, 100, "-100 to 100; 0 is off"),
    "window": (0, _INT32, f"0 (all tokens) to {_INT32}"),
    "seed": (0, 2**64 - 1, "0 to 2^64 - 1"),
}
_BIAS = "-100 to 100, or -inf to forbid the token"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and value == value


@dataclass(frozen=True)
class Sampling:
    """Settings of one sequence; the default is greedy. OptionError names a value out of range.

    Penalties count the last `window` tokens of prompt and continuation together; `logit_bias` maps
    a token id to what is added to its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    window: int = 64
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (least, most, valid) in _RANGES.items():
            value = getattr(self, name)
            whole = isinstance(type(self).__dict__[name], int)
            good = isinstance(value, int | np.integer) if whole else _is_number(value)
            inside = good and (least <= value <= most or (name == "temperature" and value == 0))
            if not inside or isinstance(value, bool):
                kind = "a whole number, " if whole else ""
                raise OptionError(f"{name}={value!r} is out of range; valid: {kind}{valid}")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int | np.integer) or not 0 <= token <= _INT32:
                raise OptionError(f"logit_bias for token {token!r}: valid ids: 0 to {_INT32}")
            if not _is_number(bias) or not (-100 <= bias <= 100 or bias == -math.inf):
                raise OptionError(f"logit_bias of token {token} is {bias!r}; valid: {_BIAS}")

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far matter."""
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0

    def record(self) -> np.ndarray:
        """One SAMPLING record, draw 0."""
        record = np.zeros(1, SAMPLING)
        for name in record.dtype.names or ():
            if name != "draw":
                record[name] = getattr(self, name)
        return record


assert {f.name for f in fields(Sampling)} == {*_RANGES, "logit_bias"}
GREEDY = Sampling().record()


class Settings:
    """The SAMPLING records of one sequence, made for many draws at once and never changed."""

    COUNT = 64

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        self.first = 0
        self.records = np.repeat(sampling.record(), 1 if self.greedy else self.COUNT)
        self._number()

    def of_draw(self, draw: int) -> np.ndarray:
        """(1,): the record for draw number `draw`; greedy ones are all alike."""
        if self.greedy:
            return self.records
        at = draw % self.COUNT
        if draw - at != self.first:
            self.first = draw - at
            self.records = self.records.copy()
            self._number()
        return self.records[at : at + 1]

    def _number(self) -> None:
        self.records["draw"] = np.arange(self.first, self.first + len(self.records))


class Tally:
    """The ADJUST records of one sequence, kept up token by token: a slot per distinct id.

    An id that left the window stays with count 0, which changes nothing.
    """

    def __init__(self, sampling: Sampling, tokens: Sequence[int]) -> None:
        self.window = sampling.window
        self.counts = sampling.penalises
        self.slots: dict[int, int] = {}
        self.records = np.zeros(16, ADJUST)
        for token, bias in sampling.logit_bias.items():
            slot = self._slot(int(token))  # first, because it may replace `records`
            self.records["bias"][slot] = bias
        if self.counts:
            for token in tokens[-self.window :] if self.window else tokens:
                self._count(token, 1)

    def add(self, tokens: Sequence[int]) -> None:
        """Count the last of `tokens`, which is new, and drop the one that leaves the window."""
        if not self.counts:
            return
        self._count(tokens[-1], 1)
        if 0 < self.window < len(tokens):
            self._count(tokens[-1 - self.window], -1)

    def of_row(self, row: int) -> np.ndarray:
        """A copy of the records for picked row `row`."""
        records = self.records[: len(self.slots)].copy()
        records["row"] = row
        return records

    def _count(self, token: int, change: int) -> None:
        slot = self._slot(token)
        self.records["count"][slot] += change

    def _slot(self, token: int) -> int:
        slot = self.slots.setdefault(token, len(self.slots))
        if slot == len(self.records):
            self.records = np.concatenate([self.records, np.zeros_like(self.records)])
        self.records["id"][slot] = token
        return slot


# What callers may write for each field of Sampling: our own name, and the names of other tools.
ALIASES = {
    "repetition_penalty": "repetition",
    "repeat_penalty": "repetition",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
}
OPTIONS = ("max_new_tokens", "stop", "ignore_eos")  # of TextStream itself


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Sampling settings from keyword options, other tools' names included."""
    named = {ALIASES.get(name, name): value for name, value in options.items()}
    valid = set(Sampling.__dataclass_fields__)
    for name in named:
        if name not in valid:
            known = choices(sorted({*OPTIONS, *ALIASES, *valid}))
            raise OptionError(f"option {name!r} is unknown; valid: {known}")
    return Sampling(**named)
