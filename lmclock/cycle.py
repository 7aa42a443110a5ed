"""The record of one clock cycle: what the engine writes down, and the clock, the reports and the
trace read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lmclock.batch import Batch
from lmclock.machines import Ticks

STAGES = ("fetch", "decode", "execute", "write_back")


@dataclass(frozen=True)
class Run:
    """One section, or a span of it, executed within a cycle."""

    section: str
    ticks: Ticks


@dataclass(frozen=True)
class Cycle:
    """One cycle. `stamps` are five ticks of machine.now(): where each stage of STAGES begins, and
    the end.

    prompt_rows  valid rows of prompts and sources; decode_rows: those after a prompt
    retired      new tokens handed to callers
    decoding     per sequence of the batch, whether its rows are decode rows
    kept         (tok rows,) bool: rows whose work was of use, rejected proposals not among them;
                 None: all valid rows
    """

    number: int
    batch: Batch
    runs: tuple[Run, ...]
    stamps: tuple[int, int, int, int, int]
    prompt_rows: int
    decode_rows: int
    retired: int
    decoding: tuple[bool, ...]
    kept: np.ndarray | None = None

    @property
    def kind(self) -> str:
        """encode (encoder rows ran, perhaps with a target's first), prefill, decode, or mixed."""
        encoded = any(run.section == "encode" for run in self.runs)
        if self.decode_rows:
            return "mixed" if self.prompt_rows or encoded else "decode"
        return "encode" if encoded else "prefill"


class Cycles(Sequence[Cycle]):
    """Cycles as they were heard of, some at a time. A part may make its cycles when they are looked
    at, so it is kept as it came.
    """

    def __init__(self, parts: Sequence[Sequence[Cycle]] = ()) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Cycle]:
        for part in self.parts:
            yield from part

    @overload
    def __getitem__(self, at: int) -> Cycle: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Cycle]: ...
    def __getitem__(self, at: int | slice) -> Cycle | Sequence[Cycle]:
        if isinstance(at, slice):
            return tuple(self)[at]
        left = at + len(self) if at < 0 else at
        for part in self.parts:
            if 0 <= left < len(part):
                return part[left]
            left -= len(part)
        raise IndexError(f"there are {len(self)} cycles, and none has the index {at}")
