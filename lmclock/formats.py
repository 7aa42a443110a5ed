"""Number formats of stored weights and caches: name, GGUF type number, block size and bytes.

A format stores a row of numbers as blocks of `block` elements in `bytes` bytes each; a row's width
must be a
multiple of `block`. Layouts are those of GGUF (ggml), little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmclock.errors import UnsupportedError, choices


@dataclass(frozen=True)
class Format:
    """One number format. `code` is the GGUF type number, also used by the native machine."""

    name: str
    code: int
    block: int  # elements per block
    bytes: int  # bytes per block, scales included

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of `width` elements; ValueError when the width splits a block."""
        if width % self.block:
            message = f"width {width} is not a multiple of the {self.name} block, {self.block}"
            raise ValueError(message)
        return width // self.block * self.bytes


FORMATS: dict[str, Format] = {
    row[0]: Format(*row)
    for row in (
        ("f32", 0, 1, 4),
        ("f16", 1, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q4_1", 3, 32, 20),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q8_0", 8, 32, 34),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("bf16", 30, 1, 2),
    )
}
BY_CODE: dict[int, Format] = {f.code: f for f in FORMATS.values()}


def get_format(name: str) -> Format:
    """The format called `name`; UnsupportedError names the valid ones."""
    if name not in FORMATS:
        message = f"number format {name!r} is not supported; valid: {choices(FORMATS)}"
        raise UnsupportedError(message)
    return FORMATS[name]
