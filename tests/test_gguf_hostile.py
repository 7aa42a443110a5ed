"""The GGUF reader against damaged and hostile files: a typed error, at once, in little memory."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmclock.errors import FileError, LmclockError, UnsupportedError
from lmclock.files import GGUF, open_weights
from lmclock.files.gguf import MAX_STRINGS, MAX_TEXT, OTHER_TYPES, Strings
from tests.gguf_bytes import (
    ARCH,
    ARRAY,
    BOOL,
    SMALL,
    STRING,
    U8,
    U32,
    U64,
    array_of,
    build,
    entry,
    key,
    open_bytes,
    tensors,
    text,
)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    for size in range(len(SMALL)):
        with pytest.raises(FileError):
            open_bytes(tmp_path, SMALL[:size])
    open_bytes(tmp_path, SMALL + b"\0" * 30).close()


def nested(depth: int) -> bytes:
    inner = struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U8, 1) + b"\0"
    return build((key("k", ARRAY, inner),))


def aligned(value: bytes, kind: int = U32) -> bytes:
    return build((key("general.alignment", kind, value),))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "wrong magic": (b"GGUX" + SMALL[4:], "is not a GGUF file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", "is a web page"),
    "zip": (b"PK\3\4" + bytes(100), "`lmclock convert FOLDER`"),
    "old ggml": (b"tjgg" + bytes(100), "before GGUF"),
    "version 0": (build(head=b"GGUF\0\0\0\0"), "version 0 is not supported; valid: 2 or 3"),
    "version 1": (build(head=b"GGUF\1\0\0\0"), "version 1 is not supported"),
    "version 2^31": (build(head=b"GGUF\0\0\0\x80"), "version 2147483648 is not supported"),
    "big-endian": (build(head=b"GGUF\0\0\0\3"), "is big-endian; convert it"),
    "2^62 tensors": (build(counts=(1 << 62, 0)), f"number of tensors {1 << 62} cannot fit"),
    "2^62 keys": (build(counts=(0, 1 << 62)), f"number of metadata keys {1 << 62} cannot fit"),
    "a key too many": (build((ARCH,), counts=(0, 2), alignment=1), "cannot fit|needs"),
    "string of 2^63": (
        build((key("k", STRING, struct.pack("<Q", 1 << 63)),)),
        f"k needs {1 << 63} bytes",
    ),
    "string too long": (build((key("k", STRING, struct.pack("<Q", 99) + b"abc"),)), "needs 99"),
    "key of 2^64 - 1": (build((struct.pack("<Q", (1 << 64) - 1),)), "cannot fit|needs 1844674"),
    "array of 2^40": (build((array_of(U32, 1 << 40),)), f"length of k {1 << 40} cannot fit"),
    "array of 2^61 u64": (build((array_of(U64, 1 << 61),)), "cannot fit"),
    "strings of 2^40": (build((array_of(STRING, 1 << 40),)), "cannot fit"),
    "strings cut": (
        build((array_of(STRING, 2, text("ab") + b"\xff" + bytes(20)),)),
        "past the end",
    ),
    "long string past the end": (
        build((array_of(STRING, 1, struct.pack("<Q", 1 << 63)),)),
        "past the end",
    ),
    "nested 10^5": (nested(100_000), "nests arrays deeper than 4"),
    "value type 13": (build((key("k", 13, bytes(8)),)), "unknown value type 13; valid: 0 to 12"),
    "element type 99": (build((array_of(99, 1, bytes(8)),)), "unknown element type 99"),
    "bool 2": (build((key("k", BOOL, b"\2"),)), "bool of value 2; valid: 0 or 1"),
    "bool 2 in an array": (build((array_of(BOOL, 2, b"\1\2"),)), "bool of value 2"),
    "duplicate key": (build((ARCH, ARCH)), "'general.architecture' appears twice"),
    "empty key": (build((key("", U8, b"\0"),)), "is empty, too long or not printable"),
    "NUL in key": (build((key("a\0b", U8, b"\0"),)), "is empty, too long or not printable"),
    "key not UTF-8": (build((key(b"\xff\xfe", U8, b"\0"),)), "key is not UTF-8"),
    "value not UTF-8": (build((key("k", STRING, text(b"\xff")),)), "k is not UTF-8"),
    "alignment 0": (aligned(struct.pack("<I", 0)), "alignment is 0; valid: a power of two"),
    "alignment 3": (aligned(struct.pack("<I", 3)), "alignment is 3"),
    "alignment 2^31": (aligned(struct.pack("<I", 1 << 31)), "alignment is 2147483648"),
    "alignment text": (aligned(text("32"), STRING), "alignment is 32"),
    "alignment bool": (aligned(b"\1", BOOL), "alignment is True"),
    "rank 0": (tensors(entry("t", ())), "has 0 dimensions; valid: 1 to 4"),
    "rank 5": (tensors(entry("t", (1,) * 5)), "has 5 dimensions"),
    "rank 2^31": (
        tensors(text("t") + struct.pack("<I", 1 << 31) + bytes(64)),
        "has 2147483648 dimensions",
    ),
    "dimension 0": (tensors(entry("t", (4, 0))), r"shape \(0, 4\)"),
    "dimension -1": (tensors(entry("t", ((1 << 64) - 1,))), "valid: from 1 to 2"),
    "product of 2^64": (tensors(entry("t", (1 << 32, 1 << 32))), "lies past the 256 bytes"),
    "product over 2^64": (tensors(entry("t", (1 << 40, 1 << 40))), "lies past the 256 bytes"),
    "block split": (tensors(entry("t", (33,), 8)), "not a multiple of the q8_0 block, 32"),
    "past the end": (tensors(entry("t", (4,), 0, 256)), "at offset 256 of 16 bytes lies past"),
    "one past the end": (tensors(entry("t", (65,))), "lies past the 256 bytes"),
    "unaligned": (tensors(entry("t", (4,), 0, 8)), "offset 8, not a multiple of 32"),
    "offset wraps": (tensors(entry("t", (4,), 0, (1 << 64) - 32)), "lies past"),
    "overlap": (tensors(entry("a", (9,)), entry("b", (4,), 0, 32)), "b at offset 32 .* overlaps"),
    "same place": (tensors(entry("a", (4,)), entry("b", (4,))), "b at offset 0 .* overlaps"),
    "duplicate tensor": (
        tensors(entry("a", (4,)), entry("a", (4,), 0, 32)),
        "two tensors are called 'a'",
    ),
    "name of 65 bytes": (tensors(entry("n" * 65, (4,))), "name of 65 bytes; valid: 1 to 64"),
    "name empty": (tensors(entry("", (4,))), "name of 0 bytes"),
    "NUL in name": (tensors(entry("a\0b", (4,))), "unprintable character"),
    "escape in name": (tensors(entry("a\x1b[2J", (4,))), "unprintable character"),
    "path in name": (tensors(entry("../../etc/passwd", (4,))), "path step"),
    "absolute name": (tensors(entry("/etc/passwd", (4,))), "path step"),
    "name not UTF-8": (tensors(entry(b"\xc3\x28", (4,))), "name is not UTF-8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(FileError, match=message) as caught:
        GGUF.open(path)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 20e6
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    with pytest.raises(FileError):
        open_weights(path)


@pytest.mark.parametrize("code", [*OTHER_TYPES, 99, 1 << 31])
def test_types_without_a_decoder_are_named(code: int, tmp_path: Path) -> None:
    called = OTHER_TYPES.get(code, "unknown")
    with pytest.raises(UnsupportedError, match=rf"tensor t has type {code} \({called}\)") as caught:
        open_bytes(tmp_path, tensors(entry("t", (256,), code)))
    assert "valid: f32, f16" in str(caught.value)
    assert ("removed" in str(caught.value)) == (code in (4, 5, 31, 32, 33, 36, 37, 38))


def test_limit_on_strings(tmp_path: Path) -> None:
    """A file that really holds millions of empty strings is refused before they are walked."""
    path = tmp_path / "x.gguf"
    count = MAX_STRINGS + 1
    with open(path, "wb") as file:
        file.write(build((array_of(STRING, count),), alignment=1))
        file.truncate(file.tell() + 8 * count)  # sparse: every length is 0
    with pytest.raises(FileError, match=f"{count} is above the limit of {MAX_STRINGS}"):
        GGUF.open(path)


def test_limit_on_text(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    half = MAX_TEXT // 2
    raw = build((key("k", STRING, struct.pack("<Q", half)),), counts=(0, 2), alignment=1)
    with open(path, "wb") as file:  # sparse: 16 MB of zero bytes, then 3 GB more
        file.write(raw)
        file.seek(half, os.SEEK_CUR)
        file.write(key("l", STRING, struct.pack("<Q", 3 << 30)))
        file.truncate(file.tell() + (3 << 30))
    with pytest.raises(FileError, match=f"l brings the file's text above the limit of {MAX_TEXT}"):
        GGUF.open(path)


def test_sparse_file_of_ten_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build((array_of(STRING, 1 << 40),), alignment=1))
    try:
        os.truncate(path, 10 << 40)
    except OSError:
        pytest.skip("this file system has no files of 10 TB")
    with pytest.raises(FileError, match=r"is above the limit|cannot read"):
        GGUF.open(path)


@given(data=st.data())
@settings(max_examples=150, deadline=1000)
def test_flipped_bytes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is changed, a file opens or is refused; nothing else escapes."""
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255) | st.just(raw[at] ^ 0x80))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(raw)
    try:
        with open_weights(path) as weights:
            for value in weights.metadata.values():
                if isinstance(value, Strings):
                    value.tolist()
            for tensor in weights.tensors.values():
                tensor.unpack()
    except LmclockError as error:
        assert len(str(error)) < 1000


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    cases = {
        fifo: "is a FIFO, not a regular file",
        tmp_path: "is a folder, not a regular file",
        Path("/dev/zero"): "is a device, not a regular file",
        tmp_path / "missing.gguf": "No such file",
        tmp_path / "nul\0.gguf": "cannot read",
        tmp_path / "gone" / "x.gguf": "No such file",
    }
    for path, message in cases.items():
        with pytest.raises(FileError, match=message):
            GGUF.open(path)


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EIO, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("call", [(os, "open"), (os, "fstat"), (mmap, "mmap")])
def test_refusals_of_the_operating_system(
    call: tuple[Any, str], reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(SMALL)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(*call, refuse)
        with pytest.raises(FileError, match=rf"cannot read .*x.gguf': {os.strerror(reason)}"):
            GGUF.open(path)
