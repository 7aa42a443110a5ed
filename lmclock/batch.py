"""What one cycle works on: rows, positions, pages and sampling settings. The engine's decode stage
fills a `Batch`.

Sequences are numbered 0..n-1 within a batch; the rows of one sequence are adjacent, in the order
of their positions.
Padding rows have valid = 0 and take part in nothing: they write no state, are seen by no row, and
are never picked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SAMPLING = np.dtype(
    [
        ("temperature", np.float32),  # 0: greedy
        ("top_k", np.int32),  # 0: off
        ("top_p", np.float32),  # 1: off
        ("min_p", np.float32),  # 0: off
        ("repetition", np.float32),  # 1: off
        ("presence", np.float32),
        ("frequency", np.float32),
        ("seed", np.uint64),
        ("draw", np.uint64),  # running number of the draw within its sequence
    ],
    align=True,
)
ADJUST = np.dtype(
    [("row", np.int32), ("id", np.int32), ("count", np.int32), ("bias", np.float32)], align=True
)


@dataclass(frozen=True)
class Rows:
    """The rows of one space. `starts` (n + 1) bounds each sequence's rows; `positions` and `valid`
    are (rows,).
    """

    starts: np.ndarray
    positions: np.ndarray
    valid: np.ndarray

    @staticmethod
    def of(spans: list[tuple[int, int]]) -> Rows:
        """Rows from (first position, count) per sequence, all valid."""
        counts = [count for _, count in spans]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        parts = [np.arange(first, first + count) for first, count in spans]
        positions = np.concatenate([*parts, np.empty(0)]).astype(np.int32)
        return Rows(starts, positions, np.ones(len(positions), bool))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def owners(self) -> np.ndarray:
        """(rows,): the sequence number of each row."""
        return np.repeat(np.arange(self.sequences, dtype=np.int32), np.diff(self.starts))


@dataclass(frozen=True)
class Batch:
    """One cycle. All arrays are int32 unless said.

    rows     `tok` and, for sections that read them, `src`: the same sequences in the same order
    inputs   (rows, width) per declared input that the section reads
    slots    (n,): the slot of each sequence, which indexes fixed states
    pages    per paged or frozen state, one array per sequence: the page of positions 0..,
    page_size.., ...
    lengths  per frozen state, (n,): positions that hold something
    pick     (picks,): the `tok` rows that need logits, ascending
    sampling SAMPLING records, one per pick row; adjust: ADJUST records sorted by row (penalties,
    biases)
    routed   per value of expert ids, (rows, top): what `route` chose, in the record of a cycle only
    """

    rows: dict[str, Rows]
    inputs: dict[str, np.ndarray]
    slots: np.ndarray
    pages: dict[str, list[np.ndarray]] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    page_size: int = 64
    pick: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    sampling: np.ndarray = field(default_factory=lambda: np.empty(0, SAMPLING))
    adjust: np.ndarray = field(default_factory=lambda: np.empty(0, ADJUST))
    routed: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        return len(self.slots)

    def count(self, space: str) -> int:
        """Rows of a space: `pick` and `seq` follow from the others."""
        if space == "pick":
            return len(self.pick)
        return self.sequences if space == "seq" else len(self.rows[space])
