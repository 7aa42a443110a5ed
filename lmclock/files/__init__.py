"""Weights files: strict readers of GGUF and safetensors, and `pull`, which fetches models.

`open_weights` chooses the reader by what a file holds, never by its name alone. A reader validates
everything before it hands out a view: a damaged or hostile file is a `FileError` in well under a
second and without memory to speak of, whatever sizes it declares.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmclock.errors import FileError, choices
from lmclock.files import gguf, mapping
from lmclock.files.gguf import GGUF
from lmclock.files.tensor import Reader, Tensor

if TYPE_CHECKING:
    from lmclock.files.safetensors import Safetensors

__all__ = ["GGUF", "Reader", "Safetensors", "Tensor", "open_weights", "stored_bytes"]


def open_weights(path: str | Path) -> Reader:
    """Open a GGUF or safetensors file, any shard of a GGUF set, an index, or a model's folder.

    FileError for a file that is missing, damaged or no weights file; UnsupportedError for a sound
    one with something in it that lmclock lacks.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    with_head = mapping.map_file(path)
    head = bytes(with_head.data[:32])
    with_head.close()
    if head.startswith(gguf.MAGIC):
        return GGUF.open(path)
    from lmclock.files import safetensors  # a GGUF file needs nothing of it

    if safetensors.looks_like(head) or head.lstrip()[:1] == b"{":
        return safetensors.Safetensors.open(path)
    meaning = mapping.foreign(path, head)
    raise FileError(f"{path} {meaning or 'is neither a GGUF nor a safetensors file'}")


def stored_bytes(path: Path) -> int:
    """How large the weights file at `path` is, or those of a folder: roughly, and 0 where there is
    none. Nothing is opened.
    """
    with suppress(OSError):
        if not path.is_dir():
            return path.stat().st_size
        endings = (".safetensors", ".gguf")
        return max(sum(f.stat().st_size for f in path.glob(f"*{e}")) for e in endings)
    return 0


def _weights_in(folder: Path) -> Path:
    """The file to open of a model's folder: an index, else safetensors, else GGUF."""
    from lmclock.files import safetensors

    if (folder / safetensors.INDEX).exists():
        return folder / safetensors.INDEX
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    for ending in (".safetensors", ".gguf"):
        found = [name for name in names if name.endswith(ending) and not _later_shard(name)]
        if f"model{ending}" in found:
            found = [f"model{ending}"]
        if len(found) > 1:
            raise FileError(f"{folder} holds several models; give one by name: {choices(found)}")
        if found:
            return folder / found[0]
    pickles = [name for name in names if name.endswith(mapping.PICKLE_ENDINGS)]
    if pickles:
        raise FileError(f"{folder / pickles[0]} {mapping.PICKLE}")
    raise FileError(f"{folder} holds no .safetensors and no .gguf file")


def _later_shard(name: str) -> bool:
    return re.search(r"-(?!00001)\d{5}-of-\d{5}\.\w+$", name) is not None


def __getattr__(name: str) -> Any:
    if name == "Safetensors":
        from lmclock.files.safetensors import Safetensors

        return Safetensors
    raise AttributeError(f"module 'lmclock.files' has no attribute {name!r}")
