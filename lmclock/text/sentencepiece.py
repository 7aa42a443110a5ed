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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lmclock.errors import FileError, UnsupportedError
from lmclock.text.vocabulary import MAX_TOKENS, SPACE

MAX_RULES = 1 << 20  # of a character map; NFKC with case folding has about 2^16
NORMAL, UNKNOWN, CONTROL, USER, BYTE, UNUSED = range(1, 7)  # kinds of pieces
UNIGRAM = 1  # of trainer_spec.model_type
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


@dataclass(frozen=True)
class SentencePiece:
    """One file. `charsmap` is what the file holds, `rules` text -> what it becomes."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    kind: int  # of the model: UNIGRAM or another
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool  # runs of spaces, and those around a text

    @property
    def unknown(self) -> int:
        """The id of the piece for unknown text."""
        return self.kinds.index(UNKNOWN)

    @cached_property
    def rules(self) -> dict[str, str]:
        return _rules(self.charsmap)

    @cached_property
    def _first(self) -> tuple[re.Pattern[str] | None, dict[str, list[int]]]:
        """Characters that begin a rule, and the lengths of such rules, the longest first."""
        lengths: dict[str, set[int]] = {}
        for text in self.rules:
            lengths.setdefault(text[0], set()).add(len(text))
        if not lengths:
            return None, {}
        found = re.compile(f"[{''.join(map(re.escape, lengths))}]")
        return found, {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}

    def mapped(self, text: str) -> str:
        """The text with the longest rule applied at each place, from left to right."""
        pattern, lengths = self._first
        if pattern is None:
            return text
        parts, begin = [], 0
        for hit in pattern.finditer(text):
            at = hit.start()
            if at < begin:
                continue
            for size in lengths[hit[0]]:
                found = self.rules.get(text[at : at + size])
                if found is not None:
                    parts += [text[begin:at], found]
                    begin = at + size
                    break
        return "".join([*parts, text[begin:]])

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
    return SentencePiece(
        tuple(pieces), tuple(scores), tuple(kinds), int(trainer.get(3, UNIGRAM)),
        bool(trainer.get(35, 0)), _message(normaliser.get(2, b""), "precompiled_charsmap"),
        bool(normaliser.get(3, 1)), bool(normaliser.get(4, 1)),
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


def _rules(charsmap: bytes) -> dict[str, str]:
    """Every key of the map's trie and its text. The trie is a double array of 32-bit units: bits
    0..7 the label (with bit 31), 8 whether a value hangs here, 9 and 10..30 the offset.
    """
    if not charsmap:
        return {}
    size = struct.unpack_from("<I", charsmap)[0] if len(charsmap) >= 4 else -1
    if size % 4 or not 0 < size <= len(charsmap) - 4:
        raise FileError(
            f"precompiled_charsmap has a trie of {size} bytes, and {len(charsmap)} in all"
        )
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = charsmap[4 + size :]
    found: dict[bytes, bytes] = {}
    # A unit at p bears its label c where its parent's children begin at p ^ c.
    labels = units & 0x800000FF
    at = np.flatnonzero((labels > 0) & (labels < 256))
    at = at[np.argsort(at ^ labels[at], kind="stable")]
    parents = at ^ labels[at]
    keys, nodes = [b""], _offset(units[:1])  # of each key, and where its children begin
    while keys:
        first = np.searchsorted(parents, nodes)
        counts = np.searchsorted(parents, nodes, "right") - first
        rows = np.repeat(np.arange(len(keys)), counts)
        inner = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        child = at[first[rows] + inner]
        pairs = zip(rows.tolist(), labels[child].tolist(), strict=True)
        keys = [keys[row] + bytes((label,)) for row, label in pairs]
        below, nodes = units[child], child ^ _offset(units[child])
        for n in np.flatnonzero(below >> 8 & 1):
            if nodes[n] >= len(units) or len(found) >= MAX_RULES:
                raise FileError("precompiled_charsmap points outside itself")
            start = int(units[nodes[n]]) & 0x7FFFFFFF
            end = texts.find(b"\0", start)
            if end < 0:
                raise FileError("precompiled_charsmap points outside itself")
            found[keys[n]] = texts[start:end]
        if len(keys) > MAX_RULES or (keys and len(keys[0]) > 64):
            raise FileError("precompiled_charsmap has more rules than sense, or longer ones")
    try:
        return {key.decode(): text.decode() for key, text in found.items()}
    except UnicodeDecodeError:
        raise FileError("precompiled_charsmap holds a rule that is not UTF-8") from None


def _offset(units: np.ndarray) -> np.ndarray:
    return np.asarray((units >> 10 & 0x1FFFFF) << ((units & 0x200) >> 6))
