"""The rows of one space as the array machine's opcodes see them: owners and positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lmclock.batch import Batch

Array = Any  # of the machine's namespace


@dataclass(frozen=True)
class SpaceRows:
    """(rows,) each: sequence number, position within the sequence, and False for padding."""

    owners: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    sequences: int

    def __len__(self) -> int:
        return len(self.owners)

    def of(self, sequence: int) -> np.ndarray:
        """Indices of the valid rows of one sequence, ascending."""
        return np.flatnonzero((self.owners == sequence) & self.valid)


def space_rows(batch: Batch, space: str) -> SpaceRows:
    """The rows of `space` in `batch`: `pick` and `seq` follow from the others."""
    n = batch.sequences
    if space == "seq":
        return SpaceRows(np.arange(n), np.zeros(n, np.int64), np.ones(n, bool), n)
    rows = batch.rows["tok" if space == "pick" else space]
    chosen = np.asarray(batch.pick) if space == "pick" else slice(None)
    positions, valid = rows.positions.astype(np.int64), rows.valid.astype(bool)
    return SpaceRows(rows.owners[chosen], positions[chosen], valid[chosen], n)


def split(xp: Any, x: Array, parts: int) -> Array:
    """(rows, parts, width / parts); -1 would not do, since there may be no row."""
    return xp.reshape(x, (x.shape[0], parts, x.shape[1] // parts))


def scatter(xp: Any, parts: list[Array], indices: list[np.ndarray], like: Array) -> Array:
    """A matrix of as many rows as `like`: row indices[p][r] is row r of parts[p], others are zero.

    It takes from the joined parts instead of writing into zeros, so that gradients flow.
    """
    width = parts[0].shape[1]
    zero = xp.zeros((1, width), dtype=parts[0].dtype, device=like.device)
    joined = xp.concat([*parts, zero], axis=0)
    source = np.full(like.shape[0], joined.shape[0] - 1)
    source[np.concatenate(indices)] = np.arange(joined.shape[0] - 1)
    return xp.take(joined, xp.asarray(source, device=like.device), axis=0)
