"""SentencePiece's own files (spiece.model, source.spm): a strict reader of the protobuf they are,
and the normalising that goes with them, without the library.

    model = read(data)                     # ModelProto: pieces, scores, kinds, and the rules
    model.normalise(" Ｈｅｌｌｏ  world ")    # "▁Hello▁world"

Only what encoding needs is looked at; a file that is cut short, or lies about a length, is a
FileError. Source of the format: sentencepiece_model.proto and the Darts-clone double array.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmclock.errors import FileError, UnsupportedError
from lmclock.text.vocabulary import MAX_TOKENS, SPACE

NORMAL, UNKNOWN, CONTROL, USER, BYTE, UNUSED = range(1, 7)  # kinds of pieces
UNIGRAM = 1  # of trainer_spec.model_type
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class SentencePiece:
    """One file. `charsmap` holds the rules of its normalising: `trie` finds them, in `texts` is
    what they make, each with a zero byte behind it.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    kind: int  # of the model: UNIGRAM or another
    byte_fallback: bool
    charsmap: bytes
    trie: Sequence[int]
    texts: bytes
    dummy_prefix: bool
    squeeze: bool  # runs of spaces, and those around a text

    @property
    def unknown(self) -> int:
        """The id of the piece for unknown text."""
        return self.kinds.index(UNKNOWN)

    def mapped(self, text: str) -> str:
        """The text with the longest rule applied at each place, from left to right."""
        if not self.trie:
            return text
        data, out, at = text.encode(), bytearray(), 0
        while at < len(data):
            size, found = self._longest(data, at)
            if found is None:
                first = data[at]
                size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
                found = data[at : at + size]
            out += found
            at += size
        try:
            return out.decode()
        except UnicodeDecodeError:
            raise FileError("precompiled_charsmap holds a rule that is not UTF-8") from None

    def _longest(self, data: bytes, at: int) -> tuple[int, bytes | None]:
        """(bytes it covers, what it makes of them) of the longest rule that fits; None without one.

        The trie is a double array of 32-bit units: bits 0..7 the label (bit 31: none), 8 whether a
        value hangs here, 9 and 10..30 where the children are, relative to the unit.
        """
        units, size, value = self.trie, 0, -1
        unit = units[0]
        node = unit >> 10 << (unit >> 6 & 8)
        for length in range(1, len(data) - at + 1):
            node ^= data[at + length - 1]
            unit = units[node] if node < len(units) else -1
            if unit & 0x800000FF != data[at + length - 1]:
                break
            node ^= unit >> 10 << (unit >> 6 & 8)
            if unit & 0x100:
                size, value = length, units[node] & 0x7FFFFFFF if node < len(units) else -1
        if not size:
            return 0, None
        end = self.texts.find(b"\0", value) if value >= 0 else -1
        if end < 0:
            raise FileError("precompiled_charsmap points outside itself")
        return size, self.texts[value:end]

    def normalise(self, text: str) -> str:
        """What the model cuts into pieces: rules applied, spaces as U+2581, one before the text."""
        text = self.mapped(text)
        if self.squeeze:
            text = re.sub(" {2,}", " ", text.lstrip(" "))
        if not text:
            return ""
        text = (SPACE if self.dummy_prefix else "") + text.replace(" ", SPACE)
        return text.rstrip(SPACE) if self.squeeze else text


def read(data: bytes) -> SentencePiece:
    """The model in a file's bytes; FileError or UnsupportedError says what is wrong with them."""
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(_message(value, "a piece")))
            if len(pieces) >= MAX_TOKENS:
                raise FileError(f"the vocabulary has more than {MAX_TOKENS} pieces")
            pieces.append(_text(entry.get(1, b""), f"piece {len(pieces)}"))
            scores.append(_float(entry.get(2, b"\0\0\0\0")))
            kinds.append(int(entry.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(_message(value, "trainer_spec")))
        elif number == 3:
            normaliser = dict(_fields(_message(value, "normalizer_spec")))
    if not pieces or kinds.count(UNKNOWN) != 1:
        raise FileError(f"{len(pieces)} pieces, {kinds.count(UNKNOWN)} of them for unknown text")
    if trainer.get(24, 0) or not normaliser.get(5, 1):
        raise UnsupportedError("spaces behind words, or spaces that stay, are not supported")
    charsmap = _message(normaliser.get(2, b""), "precompiled_charsmap")
    return SentencePiece(
        tuple(pieces), tuple(scores), tuple(kinds), int(trainer.get(3, UNIGRAM)),
        bool(trainer.get(35, 0)), charsmap, *_rules(charsmap), bool(normaliser.get(3, 1)),
        bool(normaliser.get(4, 1)),
    )  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a message: a varint's number, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_EIGHT, _FOUR):
            size = 8 if wire == _EIGHT else 4
        else:
            raise FileError(f"byte {at}: wire type {wire} is none of protobuf's")
        if size > len(data) - at:
            raise FileError(f"byte {at}: a field of {size} bytes, but {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise FileError(f"the file ends within a number, at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise FileError(f"byte {at}: a number of more than ten bytes")


def _message(value: int | bytes, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise FileError(f"{what} is the number {value}; valid: bytes")
    return value


def _text(value: int | bytes, what: str) -> str:
    try:
        return _message(value, what).decode()
    except UnicodeDecodeError:
        raise FileError(f"{what} is not UTF-8") from None


def _float(value: int | bytes) -> float:
    data = _message(value, "a score")
    score = float(struct.unpack("<f", data)[0]) if len(data) == 4 else float("nan")
    if not abs(score) < 1e30:
        raise FileError(f"a score is {score}; valid: a finite number in four bytes")
    return score


def _rules(charsmap: bytes) -> tuple[list[int], bytes]:
    """The units of the map's trie, and its texts."""
    if not charsmap:
        return [], b""
    size = struct.unpack_from("<I", charsmap)[0] if len(charsmap) >= 4 else -1
    if size % 4 or not 0 < size <= len(charsmap) - 4:
        raise FileError(f"precompiled_charsmap: a trie of {size} bytes, {len(charsmap)} in all")
    return list(struct.unpack_from(f"<{size // 4}I", charsmap, 4)), charsmap[4 + size :]
