"""GGUF files byte by byte, sound or not, for the tests of the reader."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from lmclock.files import GGUF

U8, I8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def entry(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def build(
    keys: tuple[bytes, ...] = (),
    entries: tuple[bytes, ...] = (),
    data: bytes = b"",
    head: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file; `counts` overrides the numbers of tensors and of metadata keys."""
    raw = head + struct.pack("<QQ", *(counts or (len(entries), len(keys))))
    raw += b"".join(keys) + b"".join(entries)
    return raw + b"\0" * (-len(raw) % alignment) + data


ARCH = key("general.architecture", STRING, text("llama"))
WORDS = key("w", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("") + text("é" * 200))
FLAGS = key("flags", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\1\0")
SMALL = build(
    (ARCH, WORDS, FLAGS, key("n", U32, b"\7\0\0\0")),
    (entry("a.weight", (4, 2), 0), entry("b.weight", (32,), 8, 32)),
    np.arange(8, dtype="<f4").tobytes() + b"\0\x3c" + bytes(range(32)),
)


def array_of(kind: int, count: int, raw: bytes = b"") -> bytes:
    return key("k", ARRAY, struct.pack("<IQ", kind, count) + raw)


def tensors(*entries: bytes, data: bytes = bytes(256)) -> bytes:
    return build((), entries, data)


def open_bytes(folder: Path, raw: bytes) -> GGUF:
    """The reader's view of a file of these bytes, written to `folder`."""
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return GGUF.open(path)
