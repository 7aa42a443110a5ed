"""safetensors: a strict reader, for one file or for the shards that an index names.

    Safetensors.open("model.safetensors").tensors["lm_head.weight"].shape

The header is JSON of one fixed shape, so it is read by a scanner for that shape, without recursion
and without building what it refuses: duplicate keys, holes, overlaps, trailing bytes, unknown
types, sizes that do not match. Tensors of types that lmclock has no format for (buffers of int64,
say) are listed, with a format whose `unpack` refuses. Format: huggingface/safetensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

from lmclock.errors import FileError, choices
from lmclock.files.mapping import MappedFile, foreign, map_file
from lmclock.files.tensor import MAX_TENSORS, Reader, Tensor, add_tensor, check_name, view
from lmclock.formats import FORMATS, Format

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # of the format
MAX_INDEX = 1 << 25
MAX_METADATA = 1 << 16
LONGEST_NAME = 1024
_OTHER = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
_OTHER |= {"BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_OTHER |= {"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
DTYPES: dict[str, Format] = {
    **{name: FORMATS[name.lower()] for name in ("F32", "F16", "BF16")},
    **{name: Format(name.lower(), -1, 1, size) for name, size in _OTHER.items()},
    "F4": Format("f4", -1, 2, 1),
    "F6_E2M3": Format("f6_e2m3", -1, 4, 3),
    "F6_E3M2": Format("f6_e3m2", -1, 4, 3),
}

# Possessive repeats: nothing here ever backtracks, whatever the header holds.
_SPACE = rb"[ \t\n\r]*+"
_TEXT = rb'"([^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+)"'
_SIZE = rb"(?:0|[1-9][0-9]{0,19}+)"
_SIZES = rb"\[((?:S(?:,S){0,15}+)?)".replace(b"S", _SPACE + _SIZE + _SPACE) + _SPACE + rb"\]"
TEXT, SIZES = re.compile(_TEXT), re.compile(_SIZES)
MARKS = {mark: re.compile(_SPACE + re.escape(mark) + _SPACE) for mark in (b"{", b"}", b":", b",")}


@dataclass(eq=False)
class Safetensors(Reader):
    """An open safetensors file or set of shards; `metadata` holds strings only."""

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map and validate a `.safetensors` file, or an `.index.json` and every shard it names."""
        path = Path(path)
        head = map_file(path)
        if not looks_like(bytes(head.data[:9])) and bytes(head.data[:32]).lstrip()[:1] == b"{":
            return cls._from_index(path, head)
        metadata, tensors = _validate(head)
        return cls(path, metadata, tensors, [head])

    @classmethod
    def _from_index(cls, path: Path, index: MappedFile) -> Self:
        places = weight_map(index)
        metadata: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        files = []
        for name in dict.fromkeys(places.values()):
            file = map_file(inside(path, name))
            files.append(file)
            more, found = _validate(file)
            metadata |= more
            for tensor in found.values():
                add_tensor(file.path, tensors, tensor)
            missing = [key for key, at in places.items() if at == name and key not in found]
            if missing:
                raise FileError(f"{file.path} lacks tensor {missing[0]}, which {path.name} names")
        return cls(path, metadata, tensors, files)


def looks_like(head: bytes) -> bool:
    """Whether `head`, at least 9 bytes, begins like a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


class _Scanner:
    """Reads the JSON header `[begin, end)` of a mapped file token by token."""

    def __init__(self, file: MappedFile, begin: int, end: int) -> None:
        self.path, self.map, self.at, self.end = file.path, file.map, begin, end

    def fail(self, message: str) -> FileError:
        return FileError(f"{self.path}: {message} (byte {self.at})")

    def match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        found = pattern.match(self.map, self.at, self.end)
        if found:
            self.at = found.end()
        return found

    def mark(self, mark: bytes) -> None:
        if not self.match(MARKS[mark]):
            raise self.fail(f"expected {mark.decode()!r}")

    def text(self, what: str, longest: int) -> str:
        found = self.match(TEXT)
        if not found:
            raise self.fail(f"expected {what} in double quotes")
        if found.end() - found.start() > longest + 2:
            raise self.fail(f"{what} is longer than {longest} bytes")
        try:
            text = found[1].decode()
            if "\\" in text:
                text = str(json.loads(f'"{text}"'))
                text.encode()  # a lone surrogate is no text
        except UnicodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error
        return text

    def sizes(self, what: str) -> tuple[int, ...]:
        found = self.match(SIZES)
        if not found:
            raise self.fail(f"expected {what}, a list of at most 16 whole numbers")
        return tuple(int(size) for size in found[1].split(b",")) if found[1].strip() else ()

    def fields(self, what: str) -> Any:
        """The keys of the JSON object at the cursor, which is left at each value in turn."""
        self.mark(b"{")
        if self.match(MARKS[b"}"]):
            return
        while True:
            key = self.text(what, LONGEST_NAME)
            self.mark(b":")
            yield key
            if self.match(MARKS[b"}"]):
                return
            self.mark(b",")


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    format: Format
    shape: tuple[int, ...]
    begin: int
    end: int


def _validate(file: MappedFile) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of one file, after every check."""
    head = bytes(file.data[:32])
    meaning = foreign(file.path, head)
    if meaning and not looks_like(head):
        raise FileError(f"{file.path} {meaning}")
    if file.size < 8:
        raise FileError(f"{file.path} has {file.size} bytes, too few for a safetensors file")
    size = int.from_bytes(head[:8], "little")
    if size > min(MAX_HEADER, file.size - 8):
        valid = f"at most {MAX_HEADER}, and {file.size - 8} are left"
        raise FileError(f"{file.path}: a header of {size} bytes; valid: {valid}")
    metadata, entries = _header(_Scanner(file, 8, 8 + size))
    return metadata, _views(file, entries, 8 + size)


def _header(scan: _Scanner) -> tuple[dict[str, str], list[_Entry]]:
    metadata: dict[str, str] = {}
    entries: dict[str, _Entry] = {}
    seen_metadata = False
    for name in scan.fields("a tensor name"):
        if name == "__metadata__":
            if seen_metadata:
                raise scan.fail("__metadata__ appears twice")
            seen_metadata, metadata = True, _metadata(scan)
            continue
        check_name(scan.path, name, LONGEST_NAME)
        if name in entries:
            raise scan.fail(f"two tensors are called {name!r}")
        if len(entries) == MAX_TENSORS:
            raise scan.fail(f"more than {MAX_TENSORS} tensors")
        entries[name] = _entry(scan, name)
    if scan.at != scan.end:
        raise scan.fail("the header goes on after its closing brace")
    return metadata, list(entries.values())


def _metadata(scan: _Scanner) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for key in scan.fields("a metadata key"):
        if key in metadata:
            raise scan.fail(f"metadata key {key[:80]!r} appears twice")
        if len(metadata) == MAX_METADATA:
            raise scan.fail(f"more than {MAX_METADATA} metadata keys")
        metadata[key] = scan.text(f"the value of metadata key {key[:80]!r}", scan.end)
    return metadata


def _entry(scan: _Scanner, name: str) -> _Entry:
    found: dict[str, Any] = {}
    for key in scan.fields(f"a field of tensor {name}"):
        if key in found:
            raise scan.fail(f"tensor {name} has {key} twice")
        if key == "dtype":
            found[key] = scan.text(f"the dtype of {name}", 32)
        elif key in ("shape", "data_offsets"):
            found[key] = scan.sizes(f"the {key} of {name}")
        else:
            valid = choices(("dtype", "shape", "data_offsets"))
            raise scan.fail(f"tensor {name} has the unknown field {key!r}; valid: {valid}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in found:
            raise scan.fail(f"tensor {name} lacks {key}")
    if found["dtype"] not in DTYPES:
        raise scan.fail(f"tensor {name} has dtype {found['dtype']!r}; valid: {choices(DTYPES)}")
    if len(found["data_offsets"]) != 2:
        raise scan.fail(f"tensor {name} has {len(found['data_offsets'])} data_offsets, not 2")
    fmt, shape, (begin, end) = DTYPES[found["dtype"]], found["shape"], found["data_offsets"]
    count = prod(shape)
    if count % fmt.block or end - begin != count // fmt.block * fmt.bytes:
        span = f"{begin} to {end} for shape {list(shape)} of {found['dtype']}"
        raise scan.fail(f"tensor {name} has data_offsets {span}: the sizes differ")
    return _Entry(name, fmt, shape, begin, end)


def _views(file: MappedFile, entries: list[_Entry], data_start: int) -> dict[str, Tensor]:
    """Check that the tensors tile the data without hole, overlap or rest, then make the views."""
    free, space = 0, file.size - data_start
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != free:
            what = "overlaps the tensor before it" if entry.begin < free else "leaves a hole"
            raise FileError(f"{file.path}: tensor {entry.name} at {entry.begin} {what}, at {free}")
        free = entry.end
    if free != space:
        raise FileError(f"{file.path}: the tensors take {free} bytes of data, the file has {space}")
    return {
        entry.name: Tensor(
            entry.name,
            entry.format,
            entry.shape,
            view(file.data, data_start + entry.begin, entry.end - entry.begin),
        )
        for entry in entries
    }


def weight_map(index: MappedFile, ending: str = ".safetensors") -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> shard name, which has that ending."""
    if index.size > MAX_INDEX:
        raise FileError(f"{index.path} has {index.size} bytes; valid: at most {MAX_INDEX}")
    try:
        found = json.loads(bytes(index.data), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{index.path} is not a valid index: {error}") from error
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places:
        raise FileError(f"{index.path} lacks weight_map, which says where each tensor lies")
    for name, shard in places.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+" + re.escape(ending), shard)
        if not plain or shard.startswith("."):
            valid = f"a plain file name that ends in {ending}"
            raise FileError(f"{index.path} puts {name[:80]} in {str(shard)[:80]!r}; valid: {valid}")
    return places


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def inside(index: Path, name: str) -> Path:
    """The shard beside `index`; FileError where a link leads elsewhere.

    A download cache of huggingface_hub keeps `snapshots/REVISION/` as links into `blobs/`: that is
    the one other folder a link may lead to.
    """
    folder = index.parent
    allowed = {folder.resolve()}
    if folder.resolve().parent.name == "snapshots":
        allowed.add(folder.resolve().parent.parent / "blobs")
    try:
        real = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FileError(f"{index} names {name!r}, which cannot be read: {error}") from error
    if real.parent not in allowed:
        raise FileError(f"{index} names {name!r}, a link that leads out of its folder")
    return folder / name
