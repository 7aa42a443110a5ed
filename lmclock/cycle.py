"""The record of one clock cycle: what the engine writes down and the clock, the reports and the
trace read.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmclock.batch import Batch
from lmclock.machines import Ticks

STAGES = ("fetch", "decode", "execute", "write_back")


@dataclass(frozen=True)
class Run:
    """One section executed within a cycle."""

    section: str
    ticks: Ticks


@dataclass(frozen=True)
class Cycle:
    """One cycle. `stamps` are five ticks of machine.now(): where each stage of STAGES begins, and
    the end.

    `prompt_rows` and `decode_rows` count the valid token rows of each kind; `discarded_rows` those
    whose work was thrown
    away (rejected proposals, padding); `retired` the new tokens handed to callers.
    """

    number: int
    batch: Batch
    runs: tuple[Run, ...]
    stamps: tuple[int, int, int, int, int]
    prompt_rows: int
    decode_rows: int
    discarded_rows: int
    retired: int

    @property
    def kind(self) -> str:
        """decode, prefill or mixed (encode when no token row ran)."""
        if self.prompt_rows and self.decode_rows:
            return "mixed"
        if self.prompt_rows:
            return "prefill"
        return "decode" if self.decode_rows else "encode"
