"""Weights that a file holds in another form than programs want them, as tensors made on demand.

turn(stored, name, ...)       a matrix stored (inputs, outputs), as GPT-2's Conv1D keeps it
shift(stored, name, ...)      a norm's weights stored without the one that is added to them
split(stored, name, ...)      q, k and v, or gate and up, of one tensor
stacked(stored, name, ...)    all experts of a layer, one below the other
split_experts(stored, ...)    gate and up of all experts in one tensor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from lmclock.assemble.weights import Rows, Stored, Tensor, View, joined, whole
from lmclock.errors import UnsupportedError
from lmclock.formats import Array, Format, get_format, unpack


@dataclass(frozen=True, eq=False)
class Edited:
    """Elements of `tensor` in another order or number; `edit` takes and gives arrays whose last
    axis is a row. Made anew each time, since machines read data once.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    edit: Callable[[Array], Array]

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def format(self) -> Format:
        return self.tensor.format

    @property
    def data(self) -> Array:
        elements = self.tensor.data.view(f"u{self.format.bytes}").reshape(self.tensor.shape)
        return np.ascontiguousarray(self.edit(elements)).reshape(-1).view(np.uint8)

    def check(self) -> None:
        self.tensor.check()


@dataclass(frozen=True, eq=False)
class Shifted:
    """`tensor` + `offset` in float32."""

    tensor: Tensor
    offset: float

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def format(self) -> Format:
        return get_format("f32")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def data(self) -> Array:
        width = self.shape[-1]
        values = unpack(self.tensor.format, self.tensor.data, prod(self.shape[:-1]), width)
        return (values + np.float32(self.offset)).reshape(-1).view(np.uint8)

    def check(self) -> None:
        self.tensor.check()


def _elements(tensor: Tensor, shape: tuple[int, ...], edit: Callable[[Array], Array]) -> Edited:
    if tensor.format.block != 1:
        raise UnsupportedError(
            f"tensor {tensor.name} is {tensor.format.name}, whose blocks cannot be reordered; "
            "valid: f32, f16 or bf16"
        )
    return Edited(tensor, shape, edit)


def transposed(tensor: Tensor) -> Tensor:
    return _elements(tensor, tensor.shape[::-1], lambda x: x.T)


def turn(stored: Stored, name: str, rows: int, width: int) -> None:
    """Makes weight `name` of a tensor that is stored (width, rows)."""
    stored.make(whole(name, transposed(stored.tensor(name, (width, rows)))))


def shift(stored: Stored, name: str, width: int, offset: float) -> None:
    """Makes weight `name`, one row, of a tensor that lacks `offset`."""
    if offset and name not in stored.made:
        stored.make(whole(name, Shifted(stored.tensor(name, (1, width)), offset)))


def split(
    stored: Stored, name: str, parts: Sequence[tuple[str, int]], width: int, kind: str, groups: int
) -> None:
    """Makes the weights `parts` (name, rows), and their biases where the file has some, of the
    tensor `name`, which holds them one below the other: whole, or a share of each in every one of
    `groups` (kind interleaved). Conv1D's tensors (kind transposed) are turned first.
    """
    rows = sum(count for _, count in parts)
    turned = kind == "transposed"
    tensor = stored.tensor(name, (width, rows) if turned else (rows, width))
    tensor = transposed(tensor) if turned else tensor
    bias = stored.tensor(f"{name}.bias", (1, rows)) if stored.has(f"{name}.bias") else None
    groups = groups if kind == "interleaved" else 1
    first, step = 0, rows // groups
    for part, count in parts:
        share = count // groups
        starts = [first + group * step for group in range(groups)]
        stored.make(joined(part, (Rows(tensor, start, share) for start in starts)))
        if bias is not None:
            at = np.concatenate([np.arange(start, start + share) for start in starts])
            stored.make(_picked(f"{part}.bias", bias, at))
        first += share


def _picked(name: str, vector: Tensor, at: Array) -> View:
    """A row of some elements of a vector."""
    some = _elements(vector, (1, len(at)), lambda x: x.reshape(-1)[at])
    return View(name, (1, len(at)), (Rows(some, 0, 1),))


def stacked(stored: Stored, name: str, count: int, rows: int, width: int) -> None:
    """Makes weight `name` of `count` experts: one tensor with an axis of experts, or one each."""
    if name in stored.made:
        return
    if stored.has(name):
        tensor = stored.tensor(name, (count, rows, width))
        parts = [Rows(tensor, 0, count * rows)]
    else:
        each = (stored.tensor(f"{name}.{e}", (rows, width)) for e in range(count))
        parts = [Rows(tensor, 0, rows) for tensor in each]
    stored.make(joined(name, parts))


def split_experts(
    stored: Stored, name: str, parts: Sequence[str], count: int, rows: int, width: int
) -> None:
    """Makes the weights `parts` of tensor `name`, which holds `rows` of each for every expert."""
    step = len(parts) * rows
    tensor = stored.tensor(name, (count, step, width))
    for n, part in enumerate(parts):
        starts = (expert * step + n * rows for expert in range(count))
        stored.make(joined(part, (Rows(tensor, start, rows) for start in starts)))
