"""`quantize`: float weights of products in another number format, rounded when they are loaded.

    program, weights = quantize(program, weights, "q8_0")

Weights that are quantised already stay as they are, and so do tables that are only looked up, norms
and biases, and matrices whose rows are no whole blocks of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from lmclock.errors import OptionError, choices
from lmclock.formats import Format, get_format, unpack
from lmclock.packing import pack
from lmclock.passes.round import FLOAT_FORMATS
from lmclock.program import Program

TARGETS = ("bf16", "q8_0")


class Stored(Protocol):
    """A weight as a file gives it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> Format: ...
    @property
    def data(self) -> np.ndarray: ...
    def unpack(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Rounded:
    """A stored weight in another format, worked out when it is first read."""

    stored: Stored
    format: Format

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @cached_property
    def data(self) -> np.ndarray:
        return pack(self.format, self.stored.unpack()).reshape(-1)

    def unpack(self) -> np.ndarray:
        return unpack(self.format, self.data, *self.shape)


def quantize(
    program: Program, weights: Mapping[str, Any], target: str
) -> tuple[Program, dict[str, Any]]:
    """The program and its weights with products over `target`; OptionError for another format."""
    if target not in TARGETS:
        raise OptionError(f"weights={target!r} is no format to round to; valid: {choices(TARGETS)}")
    form = get_format(target)
    used = {
        name
        for section in program.sections
        for i in section.instructions
        if "act" in i.row.attrs  # a product
        for name in i.weights
    }
    chosen = {
        w.name
        for w in program.weights
        if w.name in used and w.format in FLOAT_FORMATS and w.values is None
        and w.shape[1] % form.block == 0
    }  # fmt: skip
    declared = tuple(replace(w, format=target) if w.name in chosen else w for w in program.weights)
    stored = {n: Rounded(w, form) if n in chosen else w for n, w in weights.items()}
    return replace(program, weights=declared), stored
