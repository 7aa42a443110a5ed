"""From a file's tensors to a program's weights: `View`, rows of stored tensors under a new name,
and `Stored`, which finds a weight by its own name and holds its shape against the configuration.

Nothing is copied or decoded here: a view of whole rows of one tensor shares the file's bytes, and
one made of several parts, or of other elements (edited.py), makes them when a machine asks for its
data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from lmclock.errors import FileError, UnsupportedError
from lmclock.formats import Array, Format, get_format, unpack


class Tensor(Protocol):
    """What a reader gives: see files/tensor.py."""

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> Format: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def data(self) -> Array: ...
    def check(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows first .. first + count - 1 of a stored tensor, all its axes but the last flattened."""

    tensor: Tensor
    first: int
    count: int

    @property
    def data(self) -> Array:
        size = self.tensor.format.row_bytes(self.tensor.shape[-1])
        return self.tensor.data[self.first * size : (self.first + self.count) * size]


@dataclass(frozen=True, eq=False)
class View:
    """A weight as machines take it: `shape` is (rows, width), `data` uint8 in row order."""

    name: str
    shape: tuple[int, int]
    parts: tuple[Rows, ...]

    @property
    def format(self) -> Format:
        return self.parts[0].tensor.format

    @property
    def data(self) -> Array:
        if len(self.parts) == 1:
            return self.parts[0].data
        return np.concatenate([part.data for part in self.parts])

    def unpack(self) -> Array:
        """A float32 copy; FileError when a value, or the scale of a block, is not finite."""
        for part in self.parts:
            part.tensor.check()
        return unpack(self.format, self.data, *self.shape)


def whole(name: str, tensor: Tensor) -> View:
    """All of a tensor; a vector becomes one row."""
    width = tensor.shape[-1]
    rows = prod(tensor.shape[:-1])
    return View(name, (rows, width), (Rows(tensor, 0, rows),))


def joined(name: str, parts: Iterable[Rows]) -> View:
    """Rows of several tensors, one below the other; they must agree in width and format."""
    parts = tuple(parts)
    kinds = {(part.tensor.shape[-1], part.tensor.format.name) for part in parts}
    if len(kinds) != 1:
        message = f"{parts[0].tensor.name} and its fellows cannot be joined to {name}: their"
        raise UnsupportedError(f"{message} (width, format) are {sorted(kinds)}, not all the same")
    return View(name, (sum(part.count for part in parts), parts[0].tensor.shape[-1]), parts)


class Whole(str):
    """A tensor's name in a file as it stands, without an ending of .weight or .bias."""


@dataclass(frozen=True, eq=False)
class _Made:
    """A tensor that is in no file: float32."""

    name: str
    shape: tuple[int, ...]
    data: Array

    @property
    def format(self) -> Format:
        return get_format("f32")

    def check(self) -> None:
        """Nothing that was computed here needs a check."""


def computed(name: str, values: Array) -> View:
    """A matrix that follows from the configuration, as a weight."""
    values = np.ascontiguousarray(values, np.float32)
    return whole(name, _Made(name, values.shape, values.reshape(-1).view(np.uint8)))


class Stored:
    """The weights of one file under lmclock's own names, which are GGUF's without the endings.

    `names` maps them to another format's: `blk.{i}.attn_q` -> `model.layers.{i}.q_proj`. Either
    side without its ending: a name that ends in .bias is a bias, any other a weight; a bias that
    does not lie beside its weight has an entry of its own. `prefix` may stand before a file's
    names, and norms of old files end in .gamma and .beta. A
    `Whole` name has no ending.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None, prefix: str = ""
    ) -> None:
        self.tensors = tensors if names is None else _renamed(tensors, prefix)
        self.names = names
        self.used: set[str] = set()
        self.made: dict[str, View] = {}  # weights that the file holds in another form

    def name_in_file(self, name: str) -> str | None:
        """None where the file's format has no such weight."""
        stem, ending = (name[:-5], ".bias") if name.endswith(".bias") else (name, ".weight")
        if self.names is None:
            return stem + ending
        layer = re.search(r"(?<=\.)\d+(?=\.)", stem)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", stem, count=1)
        # An expert's number is the last part of its weight's name: blk.0.ffn_gate_exps.7
        base, _, expert = pattern.rpartition(".")
        if pattern not in self.names and expert.isdecimal():
            pattern = base
        if ending == ".bias" and pattern + ending in self.names:
            pattern += ending
        if pattern not in self.names:
            return None
        found = self.names[pattern]
        ending = "" if isinstance(found, Whole) else ending
        found = found.replace("{i}", layer[0] if layer else "")
        return found.replace("{e}", expert) + ending  # without a number there is no such tensor

    def has(self, name: str) -> bool:
        return self.name_in_file(name) in self.tensors

    def make(self, view: View) -> None:
        """From here on `get` gives this view under its name."""
        self.made[view.name] = view

    def get(self, name: str, shape: tuple[int, int] | None = None) -> View:
        """The weight, which must be `shape` (rows, width); a bias or norm has one row."""
        if name in self.made:
            assert shape in (None, self.made[name].shape), name
            return self.made[name]
        return whole(name, self.tensor(name, shape))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor that holds a weight, marked as used. It must have the shape, or that without
        an axis of one.
        """
        stored = self.name_in_file(name)
        if stored is None or stored not in self.tensors:
            message = f"the file lacks tensor {stored or name}, which its configuration asks for"
            raise FileError(message)
        self.used.add(stored)
        found = self.tensors[stored]
        given = found.shape
        if shape is not None and given != shape and (shape[0] != 1 or given != shape[1:]):
            raise FileError(
                f"tensor {stored} is {times(given)}, but the configuration makes it {times(shape)}"
            )
        return found

    def refuse_leftovers(self, harmless: str, model: str) -> tuple[str, ...]:
        """A note on tensors that may be ignored, whose names `harmless` matches; FileError when
        others were never asked for, because the model would not be the one that was stored.
        """
        left = sorted(set(self.tensors) - self.used)
        unknown = [name for name in left if not re.search(harmless, name)]
        if unknown:
            raise FileError(
                f"{len(unknown)} tensors of the file have no place in a {model} model of this "
                f"configuration: {listed(unknown)}"
            )
        return (f"tensors ignored: {listed(left)}",) if left else ()


_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}


def _renamed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under the names that files of today have; FileError where two become one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name.removeprefix(prefix)
        for old, ending in _OLD_ENDINGS.items():
            if new.endswith(f"LayerNorm{old}"):
                new = new.removesuffix(old) + ending
        if new in found:
            raise FileError(f"the file has tensor {name} twice, once under another name")
        found[new] = tensor
    return found


def same_bytes(a: View, b: View) -> bool:
    return (a.shape, a.format) == (b.shape, b.format) and bool(np.array_equal(a.data, b.data))


def times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape) or "a single number"


def listed(names: Collection[str], most: int = 4) -> str:
    """The first few names."""
    first = ", ".join(name[:100] for name in list(names)[:most])
    return f"{first} and {len(names) - most} more" if len(names) > most else first
