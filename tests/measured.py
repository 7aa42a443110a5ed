"""Made-up limits and cycles for tests of the clock and of reports: round numbers, no measuring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmclock.batch import Batch, Rows
from lmclock.cycle import Cycle, Run
from lmclock.hardware.limits import Limits, Measured
from lmclock.machines import Ticks

KIB, MIB = 1 << 10, 1 << 20


def limits(near: float = 100e9, far: float = 10e9, peak: float = 50e9, step: float = 0.0) -> Limits:
    """`near` bytes per second up to 64 KiB, `far` from 1 MiB on, `peak` f32 operations per second,
    twice that in int8; spreads 1 % near, 4 % far, 2 % of the peaks.
    """
    curve = ((64 * KIB, Measured(near, near, 0.01)), (MIB, Measured(far, far, 0.04)))
    peaks = {"f32": Measured(peak, peak, 0.02), "int8": Measured(2 * peak, 2 * peak, 0.02)}
    return Limits(2, "scalar", "a processor", "2026-01-01T00:00:00", curve, peaks,
                  Measured(step, step, 0.0))  # fmt: skip


def batch(
    *spans: tuple[int, int], picks: Sequence[int] | None = None, valid: Sequence[int] | None = None
) -> Batch:
    """(first position, rows) per sequence; pages of 64 positions, none shared; the last row of each
    sequence is picked. `valid`: valid rows of each sequence, the rest is padding.
    """
    rows = Rows.of(list(spans))
    if valid is not None:
        within = np.arange(len(rows)) - rows.starts[:-1][rows.owners]
        rows = Rows(rows.starts, rows.positions, within < np.array(valid)[rows.owners])
    pages = [np.arange(1000 * n, 1000 * n - (-(a + b) // 64)) for n, (a, b) in enumerate(spans)]
    ids = rows.positions[:, None] % 7
    pick = rows.starts[1:] - 1 if picks is None else np.array(picks, np.int32)
    return Batch(
        {"tok": rows}, {"ids": ids}, np.arange(len(spans), dtype=np.int32),
        {"kv": [p.astype(np.int32) for p in pages]}, pick=pick,
    )  # fmt: skip


def table(durations: np.ndarray, gaps: np.ndarray, begin: int) -> np.ndarray:
    """(instructions, threads, 2) stamps: each instruction lasts `durations` after `gaps`, both
    (instructions, threads) ticks.
    """
    ends = begin + np.cumsum(durations + gaps, axis=0)
    return np.stack([ends - durations, ends], axis=2)


def cycle(
    of: Batch,
    *runs: Run,
    stamps: tuple[int, int, int, int, int],
    decoding: Sequence[bool] | None = None,
    kept: np.ndarray | None = None,
    retired: int = 1,
) -> Cycle:
    """A record whose row counts follow from the batch; single rows are decode rows by default."""
    rows = of.rows["tok"]
    counts = np.bincount(rows.owners[rows.valid], minlength=rows.sequences)
    flags = tuple(bool(d) for d in (counts == 1 if decoding is None else decoding))
    decode = int(counts[np.array(flags, bool)].sum())
    return Cycle(0, of, runs, stamps, int(counts.sum()) - decode, decode, retired, flags, kept)


def steady(of: Batch, instructions: int, each: int, threads: int = 2, **options: object) -> Cycle:
    """A cycle of one run of `step` in which each instruction takes `each` ticks on all threads,
    with a tick of wait before it and ten in each other stage.
    """
    ones = np.ones((instructions, threads), np.int64)
    stamps = table(each * ones, ones, 20)
    end = int(stamps.max())
    run = Run("step", Ticks(20, end, stamps))
    return cycle(of, run, stamps=(0, 10, 20, end, end + 10), **options)  # type: ignore[arg-type]
