"""GGUF version 2 and 3: a strict reader that validates a file before it hands out views of it.

    GGUF.open(path).metadata["general.architecture"]      # any shard of a set opens the whole set

Two passes: the first walks header, metadata and tensor list, comparing every count and length with
the bytes that are left before anything is allocated; the second checks names, alignment, bounds and
overlap of all tensors, then makes the views. Metadata values are Python scalars and strings, NumPy
arrays (zero-copy), `Strings` (decoded on access: a vocabulary is most of a header) or lists of
these for nested arrays. What the values mean is not checked here. Format: the ggml project's
docs/gguf.md; big-endian files are refused.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.files.mapping import MappedFile, foreign, map_file
from lmclock.files.tensor import MAX_TENSORS, Reader, Tensor, add_tensor, check_name, view
from lmclock.formats import BY_CODE, FORMATS, Format

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_STRINGS = 1 << 21  # of one file; the largest vocabularies and merge lists have half a million
MAX_TEXT = 1 << 25  # bytes of strings outside arrays, of one file; a tokenizer.json may be one
MAX_DEPTH = 4
MAX_NESTED = 1 << 16  # arrays inside arrays, of one file
ALIGNMENTS = tuple(1 << k for k in range(3, 17))
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
# Tensor types that no machine of lmclock reads, so that the refusal can name them.
OTHER_TYPES = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16"},
    **{26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8"},
    **{33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8"},
    **{38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
REMOVED = (4, 5, 31, 32, 33, 36, 37, 38)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(eq=False)
class GGUF(Reader):
    """An open GGUF file or set of shards; `alignment` is that of its first file, in bytes."""

    alignment: int = 32

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map and validate `path`; FileError when damaged, UnsupportedError for an unknown type."""
        first = _open_one(Path(path))
        count = first.metadata.get("split.count", 0)
        shards = [first] if type(count) is int and count in (0, 1) else _open_shards(first)
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            for tensor in shard.tensors.values():
                add_tensor(shard.file.path, tensors, tensor)
        metadata = shards[0].metadata
        files = [shard.file for shard in shards]
        return cls(Path(path), metadata, tensors, files, shards[0].alignment)


class Strings(Sequence[str]):
    """An array of strings inside a mapped file; decoded on access, FileError where not UTF-8."""

    def __init__(self, path: Path, key: str, data: memoryview, starts: array[int]) -> None:
        """`starts` `(count + 1)`: where each string's 8 bytes of length begin, and the end."""
        self._path, self._key, self._data, self._starts = path, key, data, starts
        self._raw: bytes | None = None  # what `find` looks through

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        try:
            return str(self._data[self._starts[at] + 8 : self._starts[at + 1]], "utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{self._path}: string {at} of {self._key} is not UTF-8") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def find(self, text: str) -> int | None:
        """Where the first string equal to `text` is; nothing is decoded for it."""
        begin = self._starts[0]
        if self._raw is None:
            self._raw = bytes(self._data[begin : self._starts[-1]])
        encoded = text.encode()
        wanted = len(encoded).to_bytes(8, "little") + encoded
        at = self._raw.find(wanted)
        while at >= 0:
            index = bisect_left(self._starts, begin + at)
            if self._starts[index] == begin + at:
                return index
            at = self._raw.find(wanted, at + 1)
        return None

    def tolist(self) -> list[str]:
        """All strings; several times faster than one by one."""
        first = self._starts[0]
        raw = bytes(self._data[first : self._starts[-1]])
        edges = [start - first for start in self._starts]
        try:
            return [raw[a + 8 : b].decode() for a, b in pairwise(edges)]
        except UnicodeDecodeError:
            return [self[at] for at in range(len(self))]  # raises, and says which


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of the tensor list; `offset` counts from the start of the data."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class _Shard:
    file: MappedFile
    metadata: dict[str, Any]
    alignment: int
    tensors: dict[str, Tensor]


class _Cursor:
    """A position in a mapped file that never moves past its end."""

    def __init__(self, file: MappedFile) -> None:
        self.path, self.map, self.end = file.path, file.map, file.size
        self.data = memoryview(file.map)
        self.at = 0
        self.strings = self.nested = self.text = 0

    def fail(self, message: str, at: int | None = None) -> FileError:
        return FileError(f"{self.path}: {message} (byte {self.at if at is None else at})")

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they begin."""
        at, left = self.at, self.end - self.at
        if size > left:
            raise self.fail(f"{what} needs {size} bytes where the file has {left} left")
        self.at = at + size
        return at

    def number(self, kind: struct.Struct, what: str) -> Any:
        return kind.unpack_from(self.map, self.take(kind.size, what))[0]

    def count(self, what: str, least: int, limit: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = int(self.number(_U64, what))
        if count > (self.end - self.at) // least:
            raise self.fail(f"{what} {count} cannot fit in the {self.end - self.at} bytes left")
        if count > limit:
            raise self.fail(f"{what} {count} is above the limit of {limit}")
        return count

    def string(self, what: str) -> str:
        size = self.number(_U64, f"the length of {what}")
        at = self.take(size, what)
        self.text += size
        if self.text > MAX_TEXT:
            raise self.fail(f"{what} brings the file's text above the limit of {MAX_TEXT}", at)
        try:
            return self.map[at : at + size].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8", at) from error


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def _open_one(path: Path) -> _Shard:
    file = map_file(path)
    cursor = _Cursor(file)
    tensor_count, key_count = _header(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if not 1 <= len(key) <= 65535 or not key.isprintable():
            raise cursor.fail(f"metadata key {key[:80]!r} is empty, too long or not printable")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, key, cursor.number(_U32, f"the type of {key}"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in ALIGNMENTS:
        valid = "a power of two from 8 to 65536"
        raise cursor.fail(f"general.alignment is {str(alignment)[:80]}; valid: {valid}")
    entries = [_entry(cursor, alignment) for _ in range(tensor_count)]
    return _Shard(file, metadata, alignment, _views(file, entries, cursor.at, alignment))


def _header(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; the numbers of tensors and of metadata keys."""
    head = cursor.map[:32]
    if not head.startswith(MAGIC):
        meaning = foreign(cursor.path, head)
        raise FileError(f"{cursor.path} {meaning or 'is not a GGUF file: it lacks the magic'}")
    cursor.take(4, "the magic")
    version = cursor.number(_U32, "the version")
    if version not in VERSIONS and int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise cursor.fail("the file is big-endian; convert it with gguf-convert-endian")
    if version not in VERSIONS:
        raise cursor.fail(f"GGUF version {version} is not supported; valid: {choices(VERSIONS)}")
    # Least sizes: name of one byte, one dimension, type, offset; key of one byte, type, bool.
    tensors = cursor.count("the number of tensors", 33, MAX_TENSORS)
    return tensors, cursor.count("the number of metadata keys", 14, MAX_KEYS)


def _value(cursor: _Cursor, key: str, kind: int, depth: int = 0) -> Any:
    """The metadata value of type `kind` at the cursor."""
    if kind == STRING:
        return cursor.string(key)
    if kind == ARRAY:
        return _array(cursor, key, depth + 1)
    if kind not in SCALARS:
        raise cursor.fail(f"{key} has the unknown value type {kind}; valid: 0 to 12")
    return _numbers(cursor, key, kind, 1)[0].item()


def _numbers(cursor: _Cursor, key: str, kind: int, count: int) -> np.ndarray[Any, Any]:
    dtype = np.dtype(SCALARS[kind])
    at = cursor.take(count * dtype.itemsize, key)
    values = np.frombuffer(cursor.map, np.uint8 if kind == BOOL else dtype, count, at)
    if kind == BOOL:
        if count and values.max() > 1:
            raise cursor.fail(f"{key} is a bool of value {values.max()}; valid: 0 or 1", at)
        values = values.view(bool)
    return values


def _array(cursor: _Cursor, key: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise cursor.fail(f"{key} nests arrays deeper than {MAX_DEPTH}")
    kind = cursor.number(_U32, f"the element type of {key}")
    if kind == STRING:
        return _strings(cursor, key)
    if kind == ARRAY:
        count = cursor.count(f"the length of {key}", 12, MAX_NESTED - cursor.nested)
        cursor.nested += count
        return [_array(cursor, key, depth + 1) for _ in range(count)]
    if kind not in SCALARS:
        raise cursor.fail(f"{key} has the unknown element type {kind}; valid: 0 to 12")
    size = np.dtype(SCALARS[kind]).itemsize
    count = cursor.count(f"the length of {key}", size, cursor.end)
    return _numbers(cursor, key, kind, count)


def _strings(cursor: _Cursor, key: str) -> Strings:
    """Find where every string lies; the loop is most of the time it takes to open a file."""
    count = cursor.count(f"the length of {key}", 8, MAX_STRINGS - cursor.strings)
    cursor.strings += count
    starts = _short_strings(cursor, count)
    if starts is None:
        starts, at, last = array("Q"), cursor.at, cursor.end - 8
        for index in range(count):
            if at > last:
                raise cursor.fail(f"string {index} of {key} lies past the end of the file", at)
            starts.append(at)
            at += 8 + _U64.unpack_from(cursor.map, at)[0]
        if at > cursor.end:
            raise cursor.fail(f"the last string of {key} ends past the end of the file", at)
        starts.append(at)
    cursor.at = starts[-1]
    return Strings(cursor.path, key, cursor.data, starts)


def _short_strings(cursor: _Cursor, count: int) -> array[int] | None:
    """`starts` when every string is shorter than 256 bytes, as vocabularies are: twice as fast.

    The walk believes the lowest byte of each length; the other seven are checked at once after it.
    """
    data, at, starts = cursor.map, cursor.at, array("Q")
    append = starts.append
    try:
        for _ in range(count):
            append(at)
            at += 8 + data[at]
    except IndexError:
        return None
    if at > cursor.end:
        return None
    lengths = np.ndarray(cursor.end - 7, "<u8", data, 0, 1)  # the 8 bytes at every position
    if count and lengths[np.frombuffer(starts, np.uint64)].max() > 255:
        return None
    append(at)
    return starts


def _entry(cursor: _Cursor, alignment: int) -> _Entry:
    name = cursor.string("a tensor name")
    check_name(cursor.path, name, 64)
    rank = cursor.number(_U32, f"the rank of {name}")
    if not 1 <= rank <= 4:
        raise cursor.fail(f"tensor {name} has {rank} dimensions; valid: 1 to 4")
    at = cursor.take(8 * rank, f"the dimensions of {name}")
    shape = struct.unpack_from(f"<{rank}Q", cursor.map, at)[::-1]
    if not all(0 < size < 1 << 63 for size in shape):
        raise cursor.fail(f"tensor {name} has the shape {shape}; valid: from 1 to 2^63 - 1")
    fmt = _format(cursor, name, cursor.number(_U32, f"the type of {name}"))
    if shape[-1] % fmt.block:
        width = f"rows of {shape[-1]} values, not a multiple of the {fmt.name} block, {fmt.block}"
        raise cursor.fail(f"tensor {name} has {width}")
    offset = cursor.number(_U64, f"the offset of {name}")
    if offset % alignment:
        raise cursor.fail(f"tensor {name} has offset {offset}, not a multiple of {alignment}")
    return _Entry(name, fmt, shape, offset, prod(shape[:-1]) * fmt.row_bytes(shape[-1]))


def _format(cursor: _Cursor, name: str, code: int) -> Format:
    if code in BY_CODE:
        return BY_CODE[code]
    called = OTHER_TYPES.get(code, "unknown")
    removed = ", which was removed from GGUF," if code in REMOVED else ""
    message = f"tensor {name} has type {code} ({called}){removed} which is not supported"
    raise UnsupportedError(f"{cursor.path}: {message}; valid: {choices(FORMATS)}")


def _views(
    file: MappedFile, entries: list[_Entry], header_end: int, alignment: int
) -> dict[str, Tensor]:
    """Check that every tensor lies in the file and on no other, then make the views."""
    data_start = -(-header_end // alignment) * alignment
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        where = f"tensor {entry.name} at offset {entry.offset} of {entry.size} bytes"
        if entry.offset < free:
            raise FileError(f"{file.path}: {where} overlaps the tensor before it")
        free = entry.offset + entry.size
        if data_start + free > file.size:
            left = max(0, file.size - data_start)
            raise FileError(f"{file.path}: {where} lies past the {left} bytes of data")
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        raw = view(file.data, data_start + entry.offset, entry.size)
        add_tensor(file.path, tensors, Tensor(entry.name, entry.format, entry.shape, raw))
    return tensors


def _open_shards(given: _Shard) -> list[_Shard]:
    """Every file of the set that `given` belongs to, in order, checked against one another."""
    path, count = given.file.path, given.metadata["split.count"]
    named = SHARD.fullmatch(path.name)
    if named is None or type(count) is not int or int(named["count"]) != count:
        split = f"split.count is {str(count)[:80]}"
        raise FileError(f"{path}: {split}, but the name does not end like -00001-of-00002.gguf")
    shards = []
    for number in range(count):
        sibling = path.with_name(f"{named['stem']}-{number + 1:05d}-of-{count:05d}.gguf")
        shard = given if sibling == path else _open_one(sibling)
        shards.append(shard)
        for key, expected in (("split.count", count), ("split.no", number)):
            found = shard.metadata.get(key)
            if type(found) is not int or found != expected:
                said = f"{key} is {str(found)[:80]}"
                raise FileError(f"{sibling}: {said}, where the name says {expected}")
    total = shards[0].metadata.get("split.tensors.count")
    held = sum(len(shard.tensors) for shard in shards)
    if total is not None and (type(total) is not int or total != held):
        said = f"split.tensors.count is {str(total)[:80]}"
        raise FileError(f"{path}: {said}, where the shards hold {held} tensors")
    return shards
