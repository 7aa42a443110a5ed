"""The measured limits of one machine: a bandwidth curve, a peak per arithmetic kind, a step
latency.

`Limits` is plain data that calibrate.py measures and stores; clock.py holds instructions against
it.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cached_property

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
    def _curve(self) -> tuple[list[float], list[float]]:
        return (
            [math.log(size) for size, _ in self.bandwidth],
            [math.log(rate.best) for _, rate in self.bandwidth],
        )

    def bytes_per_second(self, footprint: float) -> float:
        """The bandwidth at a reuse distance of `footprint` bytes, interpolated on log scales."""
        sizes, rates = self._curve
        x = math.log(max(footprint, 1))
        k = bisect.bisect_left(sizes, x)
        if k == 0 or k == len(sizes):
            return math.exp(rates[min(k, len(sizes) - 1)])
        part = (x - sizes[k - 1]) / (sizes[k] - sizes[k - 1])
        return math.exp(rates[k - 1] + part * (rates[k] - rates[k - 1]))

    def peak(self, kind: str) -> float:
        """Operations per second of an arithmetic kind: int8, bf16 or f32."""
        if kind not in self.peaks:
            raise UnsupportedError(
                f"no measured peak for {kind!r}; measured: {choices(self.peaks)}"
            )
        return self.peaks[kind].best

    @property
    def spread(self) -> float:
        """The widest spread among the figures a report depends on."""
        return max(m.spread for m in (*self.peaks.values(), *(m for _, m in self.bandwidth)))
