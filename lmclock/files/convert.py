"""From PyTorch's pickles to safetensors: `pytorch_model.bin`, one file or shards with an index.

    convert("folder-or-file", "new-folder")

This is the only place that opens a pickle, and only when a user asks for it by name: PyTorch reads
it with weights_only=True, which builds tensors and plain containers and runs nothing. The tensors
go to model.safetensors (or one file for each shard, and an index), every other file is copied, and
the new folder appears under its name when it is whole. Needs the extra `torch`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.files import safetensors
from lmclock.files.mapping import PICKLE_ENDINGS, map_file

INDEX = "pytorch_model.bin.index.json"
WEIGHTS = "pytorch_model.bin"
# Weights in other formats are not copied beside the new ones.
LEFT_BEHIND = (*PICKLE_ENDINGS, ".safetensors", ".safetensors.index.json", ".bin.index.json", ".h5",
               ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")  # fmt: skip
# Where checkpoints that hold more than weights keep them.
INNER = ("state_dict", "model_state_dict", "model")
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
# Of names that share memory, the ones that models make of another tensor when they are loaded.
TIED = re.compile(
    r"^(lm_head|output|decoder|embed_out)\.weight$|(encoder|decoder)\.embed_tokens\.weight$|"
    r"^(cls\.predictions|lm_head)\.decoder\.(weight|bias)$|^vocab_projector\.weight$"
)


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote; `notes` say what it left out."""

    folder: Path
    files: int
    tensors: int
    bytes: int
    notes: tuple[str, ...]


def convert(source: str | Path, target: str | Path) -> Converted:
    """Write `target`, a new folder, from a folder or one of its weights files.

    FileError for files that are damaged or hold more than tensors, and where `target` exists;
    UnsupportedError without PyTorch.
    """
    shards = _shards(Path(source))
    folder, target = shards[0].parent, Path(target).absolute()
    if target.exists() or target.is_symlink():
        raise FileError(f"{target} exists; valid: the name of a folder that does not")
    if not target.parent.is_dir():
        raise FileError(f"cannot write {target}: there is no folder {target.parent}")
    torch = _torch()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
            whole = Path(part) / "folder"
            whole.mkdir()
            found = _write(torch, shards, whole)
            files = _copy(folder, whole, folder.resolve())
            whole.rename(target)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from None
    files += len(shards) + (len(shards) > 1)  # an index beside several
    return Converted(target, files, *found)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UnsupportedError(
            "PyTorch reads this file, and it is not installed: pip install 'lmclock[torch]'"
        ) from None
    return torch


def _shards(source: Path) -> list[Path]:
    """The pickles to convert: the file itself, those an index names, or the folder's only one."""
    if not source.exists():
        raise FileError(f"there is no file or folder {str(source)!r}")
    if source.is_file():
        return _indexed(source) if source.name.endswith(".json") else [source]
    if (source / INDEX).exists():
        return _indexed(source / INDEX)
    names = sorted(entry.name for entry in source.iterdir() if _is_pickle(entry.name))
    if WEIGHTS in names:
        names = [WEIGHTS]
    if not names:
        raise FileError(f"{source} holds no {WEIGHTS}; valid: a folder or file of PyTorch weights")
    if len(names) > 1:
        raise FileError(f"{source} holds several models; give one by name: {choices(names)}")
    return [source / names[0]]


def _is_pickle(name: str) -> bool:
    return name.endswith(PICKLE_ENDINGS) and name not in ("training_args.bin", "optimizer.pt")


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names; plain names of files beside it."""
    file = map_file(index)
    try:
        weight_map = safetensors.weight_map(file, ".bin")
    finally:
        file.close()
    return [safetensors.inside(index, name) for name in dict.fromkeys(weight_map.values())]


def _write(torch: Any, shards: list[Path], folder: Path) -> tuple[int, int, tuple[str, ...]]:
    """(tensors, bytes, notes) of the safetensors files written to `folder`."""
    places: dict[str, str] = {}
    notes: list[str] = []
    size = 0
    for shard in shards:
        name = "model.safetensors"
        if len(shards) > 1:
            name = shard.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
        tensors = _without_ties(_tensors(torch, shard, notes), notes)
        twice = sorted(places.keys() & tensors.keys())
        if twice:
            raise FileError(f"{shard}: tensor {twice[0]} is in {places[twice[0]]} too")
        with open(folder / name, "wb") as file:
            size += _write_file(torch, file, tensors, shard)
        places |= dict.fromkeys(tensors, name)
    if not places:
        raise FileError(f"{shards[0]} holds no tensor")
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2))
    return len(places), size, tuple(notes)


def _tensors(torch: Any, path: Path, notes: list[str]) -> dict[str, Any]:
    """The tensors of one file by name."""
    map_file(path).close()  # a regular file that can be read, or a sentence
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch and its unpickler raise many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        for line in str(error).splitlines():
            if "WeightsUnpickler error:" in line:
                reason = line.split("WeightsUnpickler error:", 1)[1]
        raise FileError(
            f"{path} is refused: it is damaged, or holds more than tensors "
            f"({type(error).__name__}: {' '.join(reason.split())[:160]})"
        ) from None
    inner = next((key for key in INNER if isinstance(found, dict) and _is_dict(found.get(key))), "")
    found = found[inner] if inner else found
    if not isinstance(found, Mapping):
        raise FileError(f"{path} holds a {type(found).__name__}; valid: tensors by name")
    tensors = {k: v.detach() for k, v in found.items() if isinstance(v, torch.Tensor)}
    others = [str(key)[:80] for key in found if key not in tensors]
    if others:
        notes.append(f"not tensors, left out: {', '.join(sorted(others)[:8])}")
    for name, tensor in tensors.items():
        _check(torch, path, name, tensor)
    return tensors


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _check(torch: Any, path: Path, name: object, tensor: Any) -> None:
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 1024
    if not plain or " " in str(name):
        raise FileError(f"{path}: tensor name {str(name)[:80]!r} is not one that safetensors takes")
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or tensor.is_quantized or kind not in DTYPES:
        what = kind if tensor.layout is torch.strided else str(tensor.layout)
        raise UnsupportedError(f"{path}: tensor {name} is {what}; valid: {choices(DTYPES)}")


def _without_ties(tensors: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Without the names under which a model makes a tensor of another one, where that is there."""
    places: dict[Any, list[str]] = {}
    for name, t in tensors.items():
        place = (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride())
        places.setdefault(place if t.numel() else name, []).append(name)
    tied: list[str] = []
    for names in places.values():
        gone = [name for name in names if TIED.search(name)]
        tied += gone if len(gone) < len(names) else gone[1:]
    if tied:
        notes.append(f"tied to another tensor, left out: {', '.join(sorted(tied)[:8])}")
    return {name: t for name, t in tensors.items() if name not in tied}


def _write_file(torch: Any, file: BinaryIO, tensors: Mapping[str, Any], source: Path) -> int:
    """Bytes of the tensors, written after the header that the format asks for."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return end


def _copy(source: Path, target: Path, root: Path) -> int:
    """Copy what is no weights file, folders included; links only to where a hub's cache has them.
    Returns the number of files.
    """
    count = 0
    for entry in _entries(source):
        if entry.is_dir() and not entry.is_symlink():
            (target / entry.name).mkdir()
            count += _copy(entry, target / entry.name, root)
        elif entry.is_file() and not entry.name.endswith(LEFT_BEHIND) and _stays(entry, root):
            shutil.copyfile(entry, target / entry.name)
            count += 1
    return count


def _entries(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith("."):
            yield entry


def _stays(path: Path, root: Path) -> bool:
    """Whether a file lies in the model's folder, or in the blobs of a hub's cache around it."""
    real = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    return any(real.is_relative_to(folder) for folder in allowed)
