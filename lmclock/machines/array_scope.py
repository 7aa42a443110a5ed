"""What an opcode of the array machine sees: the array library, weights, states, the bound rows.

A `Scope` is made by the machine (array.py) and handed to every function of array_ops.py and
array_attend.py. It converts between NumPy on the host and the machine's library and device, rounds,
and keeps what fixed states will hold after commit.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmclock import formats, packing
from lmclock.batch import Batch
from lmclock.errors import UnsupportedError
from lmclock.machines import Capacity
from lmclock.program import Program
from lmclock.shapes import Type

Array = Any  # of the scope's array library


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


class Scope:
    """See the module's header. `fresh` holds what section `train` stored, `pending` what commit
    will write into fixed states: (state, slot) -> (width,).
    """

    program: Program
    capacity: Capacity
    batch: Batch

    def __init__(self, namespace: str, device: str, dtype: str) -> None:
        try:
            self.xp = importlib.import_module(f"array_api_compat.{namespace}")
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"the array machine needs the package {error.name}") from None
        self.device = device
        self.torch = namespace == "torch"
        self.dtype = getattr(self.xp, dtype)
        self.seed = 0
        self.section = ""
        self.types: dict[str, dict[str, Type]] = {}  # section -> value -> type
        self.weights: dict[str, Array] = {}
        self.states: dict[str, Any] = {}  # kv[3] -> (keys, values), or (slots, width)
        self.fresh: dict[str, tuple[Array, Array, str]] = {}
        self.pending: dict[tuple[str, int], Array] = {}

    def bind(self, batch: Batch) -> None:
        self.batch = batch
        self.section = ""
        self.fresh, self.pending = {}, {}
        self._rows: dict[str, SpaceRows] = {}

    # --- rows and weights

    def rows(self, value: str) -> SpaceRows:
        """The rows of a value's space in the bound batch."""
        space = self.types[self.section][value].space
        if space not in self._rows:
            self._rows[space] = space_rows(self.batch, space)
        return self._rows[space]

    def row(self, weight: str) -> Array:
        """A weight that is a single row, (width,)."""
        return self.xp.reshape(self.weights[weight], (-1,))

    def take(self, x: Array, indices: np.ndarray) -> Array:
        """Rows of x."""
        return self.xp.take(x, self.index(indices), axis=0)

    # --- to the library and back

    def index(self, array: np.ndarray) -> Array:
        """Indices or a mask computed on the host."""
        return self.xp.asarray(array, device=self.device)

    def floats(self, array: np.ndarray) -> Array:
        return self.xp.asarray(array, dtype=self.dtype, device=self.device)

    def ids(self, array: np.ndarray) -> Array:
        return self.xp.asarray(array, dtype=self.xp.int32, device=self.device)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def number(self, value: float) -> Array:
        return self.xp.asarray(value, dtype=self.dtype, device=self.device)

    def numpy(self, x: Array) -> np.ndarray:
        return x.detach().cpu().numpy() if self.torch else x

    def erf(self, x: Array) -> Array:
        """The array API has no erf."""
        if self.torch:
            return self.xp.erf(x)
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), x.dtype)

    def rounded(self, x: Array, how: str) -> Array:
        """x as it comes back from number format `how`, or from activation rounding q8_32.

        On PyTorch the gradient passes straight through.
        """
        if how == "f32" or not x.shape[0]:
            return x
        if how == "q8_32":
            y = formats.round_q8_32(self.xp.astype(x, self.xp.float32), self.xp)
            y = self.xp.astype(y, self.dtype)
        else:
            form, flat = formats.get_format(how), self.numpy(x).reshape(-1, x.shape[-1])
            y = formats.unpack(form, packing.pack(form, flat), *flat.shape)
            y = self.xp.reshape(self.floats(y), x.shape)
        # x - x is an exact zero that carries the gradient
        return y.detach() + (x - x.detach()) if self.torch and x.requires_grad else y

    def recurrent_state(
        self, state: str | None, sequence: int, position: int, hidden: int
    ) -> tuple[Array, Array]:
        """(h, c), (1, hidden) each. Position 0 starts from zeros: a slot needs no clearing."""
        if state is None or position == 0 or self.section == "train":
            return self.zeros((1, hidden)), self.zeros((1, hidden))
        slot = int(self.batch.slots[sequence])
        held = self.states[state][slot : slot + 1, :]
        return held[:, :hidden], held[:, hidden:]

    def set_recurrent_state(self, state: str | None, sequence: int, h: Array, c: Array) -> None:
        """Noted now, visible after commit, so that a span can be run twice."""
        if state is not None and self.section != "train":
            declared, _ = self.program.state(state)
            content = self.xp.concat([h, c], axis=1)
            slot = int(self.batch.slots[sequence])
            self.pending[state, slot] = self.rounded(content, declared.format)[0, :]
