"""The measured limits of one machine: a bandwidth curve, a peak per arithmetic kind, a step
latency.

`Limits` is plain data that calibrate.py measures and stores; clock.py holds instructions against
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lmclock.errors import UnsupportedError, choices


@dataclass(frozen=True)
class Measured:
    """A measured figure: the best of several repetitions, their median, and their spread.

    `spread` is (highest - lowest) / median over the repetitions.
    """

    best: float
    median: float
    spread: float


@dataclass(frozen=True)
class Limits:
    """Limits of `threads` threads together.

    bandwidth  (footprint in bytes, bytes per second), footprints ascending: what a stream of dot
               products reaches over that many bytes, read again and again
    peaks      operations per second by arithmetic kind (multiply and add counted apart)
    step       seconds of one dependent step: an instruction that has nothing to do
    """

    threads: int
    path: str  # SIMD path of the kernels that were measured
    processor: str
    when: str
    bandwidth: tuple[tuple[int, Measured], ...]
    peaks: dict[str, Measured]
    step: Measured

    @cached_property
    def _curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes, rates = zip(*self.bandwidth, strict=True)
        table = np.array([(rate.best, rate.spread) for rate in rates])
        return np.log(np.array(sizes, float)), np.log(table[:, 0]), table[:, 1]

    def bytes_per_second(self, footprint: ArrayLike) -> Any:
        """The bandwidth at reuse distances of `footprint` bytes (a number, or an array of them),
        interpolated on log scales; beyond the measured footprints, that of the nearest one.
        """
        sizes, rates, _ = self._curve
        return np.exp(np.interp(np.log(np.maximum(footprint, 1)), sizes, rates))

    def spread_at(self, footprint: float) -> float:
        """The spread of that bandwidth."""
        sizes, _, spreads = self._curve
        return float(np.interp(np.log(max(footprint, 1)), sizes, spreads))

    def peak(self, kind: str) -> float:
        """Operations per second of an arithmetic kind: int8, int16, bf16 or f32. What is bf16 may
        as well be computed in f32, and pairs of int16 in either, so the fastest is the limit.
        """
        ways = {"int16": ("int16", "bf16", "f32"), "bf16": ("bf16", "f32")}.get(kind, (kind,))
        found = [self.peaks[way].best for way in ways if way in self.peaks]
        if not found:
            raise UnsupportedError(
                f"no measured peak for {kind!r}; measured: {choices(self.peaks)}"
            )
        return max(found)

    @property
    def spread(self) -> float:
        """The widest spread among the figures a report depends on."""
        return max(m.spread for m in (*self.peaks.values(), *(m for _, m in self.bandwidth)))
