"""What every weights file gives: `Tensor`, a named zero-copy view, and `Reader`, a set of them.

    with open_weights("model.gguf") as weights:
        tensor = weights.tensors["token_embd.weight"]
        tensor.format.name, tensor.shape, tensor.data      # bytes as stored, nothing copied
        tensor.unpack()                                    # float32

The limits here bound what a hostile file can make a reader allocate before it is refused; they are
far above any published model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lmclock.errors import FileError
from lmclock.files.mapping import MappedFile
from lmclock.formats import Array, Format, first_bad_block, unpack

MAX_TENSORS = 1 << 17
_BAD_NAME = re.compile(r" |(^|/)\.\.(/|$)|^/|\\")


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One stored tensor. `shape` is in NumPy order: the last axis is the row of stored blocks."""

    name: str
    format: Format
    shape: tuple[int, ...]
    data: Array  # uint8, flat, read-only; any alignment

    @property
    def width(self) -> int:
        """Elements of one row; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    def check(self) -> None:
        """FileError when a value, or the scale of a block, is NaN or infinite."""
        bad = first_bad_block(self.format, self.data)
        if bad is not None:
            row = bad * self.format.block // self.width
            raise FileError(f"tensor {self.name} holds a value that is not finite in row {row}")

    def unpack(self) -> Array:
        """A float32 copy of `shape`; FileError when a value is not finite, UnsupportedError where
        the format is none of lmclock's."""
        values = unpack(self.format, self.data, self.rows, self.width)
        self.check()
        return values.reshape(self.shape)


@dataclass(eq=False)
class Reader:
    """An open weights file, or a set of shards. Views stay valid after `close`."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    files: list[MappedFile] = field(repr=False)

    def still_whole(self) -> None:
        """FileError when a file has been shortened since it was opened (see mapping.py)."""
        for file in self.files:
            file.still_whole()

    def close(self) -> None:
        self.tensors = {}
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_name(path: Path, name: str, longest: int) -> None:
    """FileError unless `name` is safe to print and to use in a file name or a listing."""
    size = len(name.encode())
    if not 1 <= size <= longest:
        raise FileError(f"{path}: a tensor name of {size} bytes; valid: 1 to {longest}")
    if not name.isprintable() or _BAD_NAME.search(name):
        message = "holds a space, an unprintable character, a backslash or a path step"
        raise FileError(f"{path}: tensor name {name[:80]!r} {message}")


def add_tensor(path: Path, tensors: dict[str, Tensor], tensor: Tensor) -> None:
    """Put `tensor` under its name; FileError when a tensor has that name already."""
    if tensor.name in tensors:
        raise FileError(f"{path}: two tensors are called {tensor.name!r}")
    tensors[tensor.name] = tensor


def view(data: Array, begin: int, size: int) -> Array:
    """`size` bytes of `data` from `begin`, which the caller has checked; zero-copy."""
    return data[begin : begin + size] if size else np.empty(0, np.uint8)
