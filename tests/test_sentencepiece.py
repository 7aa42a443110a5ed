"""SentencePiece files without the library: the same pieces as sentencepiece and transformers on
Unicode fuzz, Marian's two sides, T5's spiece.model; damaged files are refused.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, MarianTokenizer, T5Tokenizer

from lmclock.errors import FileError, LmclockError, UnsupportedError
from lmclock.text import from_folder
from lmclock.text import sentencepiece as reader
from tests.tiny_pieces import marian_files, sentences, t5_file, train

# Letters of scripts, signs, spaces, marks that combine, compatibility characters, controls, emoji.
RANGES = ((0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x590, 0x700),
          (0x0E00, 0x0E80), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2100, 0x2400),
          (0x2580, 0x2600), (0x3000, 0x3400), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xF900, 0xFB10),
          (0xFE00, 0x10000), (0x1F300, 0x1F700), (0, 0x20))  # fmt: skip


def fuzz(count: int, seed: int) -> Iterator[str]:
    """Texts of words the models know and of characters from everywhere, mixed."""
    rng = np.random.default_rng(seed)
    known = " ".join(sentences("en", 40) + sentences("fr", 40)).split()
    for _ in range(count):
        parts = []
        for _ in range(rng.integers(0, 9)):
            kind = rng.integers(0, 4)
            if kind < 2:
                parts.append(str(rng.choice(known)))
            else:
                low, high = RANGES[rng.integers(0, len(RANGES))]
                points = [low + int(n) for n in rng.integers(0, high - low, rng.integers(1, 6))]
                parts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000 and p))
        joint = (" ", "", "  ", "\u3000", "\t")[rng.integers(0, 5)]
        yield joint.join(parts)


HARD = [
    "", " ", "  a  b ", "\u2581", "a\u2581\u2581b \u2581", "\ufb01ne \u00bd \uff21\u3000\uff58",
    "e\u0301te\u0301", "\u0301a", "q\u0307\u0323", "\ud55c\uad6d\uc5b4", "\u1112\u1161\u11ab",
    "\ufeffa", "a\u200bb", "a\u00adb", "\u3002\uff01\uff1f\u300c", "\u65e5\u672c \u4e2d\u6587",
    "\U0001f3f3\ufe0f\u200d\U0001f308", "a" * 300, "\n\n x \r\n y", "\uff5e\u301c", "\u2028z",
]  # fmt: skip


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf", "identity"])
def test_normalising_is_the_librarys(rule: str, tmp_path: Path) -> None:
    train(tmp_path / "a.spm", "en", normalization_rule_name=rule)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "a.spm"))
    ours = reader.read((tmp_path / "a.spm").read_bytes())
    for text in [*HARD, *fuzz(1500, 3)]:
        assert ours.normalise(text) == theirs.Normalize(text), ascii(text)
    # Every character, and every one with a mark behind it.
    points = [p for p in range(1, 0x30000) if not 0xD800 <= p < 0xE000]
    for first in range(0, len(points), 500):
        some = "".join(f"x{chr(p)}y{chr(p)}\u0301" for p in points[first : first + 500])
        assert ours.normalise(some) == theirs.Normalize(some), points[first]


@pytest.mark.parametrize("apart", [False, True])
def test_marian_is_that_of_transformers(apart: bool, tmp_path: Path) -> None:
    marian_files(tmp_path, apart)
    theirs, ours = MarianTokenizer.from_pretrained(tmp_path), from_folder(tmp_path)
    codes = [
        ">>fr<< The house.",
        ">>de<<The house",
        ">>xx<< a",
        ">> a << b",
        ">>fr<<",
        "a >>fr<< b",
    ]
    for text in [*HARD, *codes, *fuzz(1500, 4)]:
        assert ours.encode(text) == theirs(text).input_ids, ascii(text)
    rng = np.random.default_rng(5)
    for _ in range(300):
        ids = rng.integers(3, ours.vocab_size - 1, rng.integers(0, 12)).tolist()
        want = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode([*ids, 0]).strip() == want
        stream = ours.stream()
        assert "".join([stream.push(i) for i in ids] + [stream.flush()]).strip() == want
    assert ours.eos_ids == {0}


def test_t5_is_that_of_transformers(tmp_path: Path) -> None:
    t5_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    theirs = T5Tokenizer.from_pretrained(tmp_path)
    texts = [*HARD, *fuzz(1500, 6)]
    check_t5(from_folder(tmp_path), theirs, texts)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    (tmp_path / "spiece.model").unlink()
    check_t5(from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path), texts)


def check_t5(ours: Any, theirs: Any, texts: list[str]) -> None:
    assert ours.vocab_size == len(theirs)
    for text in texts:
        assert ours.encode(text) == theirs(text).input_ids, ascii(text)
    for text in ("a <extra_id_0> b", "<extra_id_7>"):
        assert ours.encode(text, allow_special=True) == theirs(text).input_ids
    rng = np.random.default_rng(7)
    for _ in range(300):
        ids = rng.integers(3, ours.vocab_size - 100, rng.integers(0, 12)).tolist()
        assert ours.decode([*ids, 1]) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_ids == {1}


# --- damaged files


def test_a_file_cut_short_anywhere_is_refused_or_a_smaller_model(tmp_path: Path) -> None:
    train(tmp_path / "a.spm", "en", size=60, normalization_rule_name="identity")
    data = (tmp_path / "a.spm").read_bytes()
    for size in range(len(data)):
        try:
            reader.read(data[:size])
        except FileError as error:
            assert "\n" not in str(error)
        except UnsupportedError:
            pass


def test_bytes_changed_anywhere_never_hurt(tmp_path: Path) -> None:
    train(tmp_path / "a.spm", "en", size=60)
    data = bytearray((tmp_path / "a.spm").read_bytes())
    rng = np.random.default_rng(8)
    for _ in range(30):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            changed[at] = rng.integers(0, 256)
        try:
            reader.read(bytes(changed)).normalise("Ａ house ½")
        except LmclockError as error:
            assert "\n" not in str(error)


def field(number: int, value: bytes) -> bytes:
    return bytes((number << 3 | 2, len(value))) + value


def piece(text: bytes, kind: int) -> bytes:
    return field(1, field(1, text) + b"\x15\0\0\0\0" + bytes((0x18, kind)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 pieces"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "a field of .* bytes, but 0 are left"),
        (b"\x0a" + b"\xff" * 11, "more than ten bytes"),
        (b"\x0f", "wire type 7"),
        (b"\x08\x01", "a piece is the number 1"),
        (piece(b"\xff", 2), "piece 0 is not UTF-8"),
        (piece(b"<unk>", 2) + piece(b"<unk>", 2), "2 pieces, 2 of them for unknown text"),
        (
            piece(b"<unk>", 2) + field(3, field(2, b"\x08\0\0\0abcd")),
            "a trie of 8 bytes, 8 in all",
        ),
    ],
)
def test_crafted_files(data: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message):
        reader.read(data).normalise("a")


def test_folders_that_contradict_themselves(tmp_path: Path) -> None:
    marian_files(tmp_path)
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 1, "a": 1}')
    with pytest.raises(
        FileError, match=r"source\.spm: vocab\.json: ids must be numbers, each used"
    ):
        from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "a": 1}')
    with pytest.raises(FileError, match=r"vocab\.json lacks '</s>' or '<unk>'"):
        from_folder(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(FileError, match=r"a source\.spm, but no vocab\.json"):
        from_folder(tmp_path)
    train(tmp_path / "source.spm", "en", model_type="bpe", size=80)
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 1}')
    with pytest.raises(UnsupportedError, match="model type 2; valid: 1"):
        from_folder(tmp_path)


def test_rules_are_nfkc(tmp_path: Path) -> None:
    """An outside check of the double array's reader: what the rules say is what Unicode says."""
    train(tmp_path / "a.spm", "en", normalization_rule_name="nfkc")
    ours = reader.read((tmp_path / "a.spm").read_bytes())
    # Characters of a later Unicode than Python's have no category here.
    known = [c for c in map(chr, range(1, 0x20000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    changed = [c for c in known if unicodedata.normalize("NFKC", c) != c]
    wrong = [c for c in known if unicodedata.normalize("NFKC", c) != ours.mapped(c)]
    assert len(changed) > 3000 and len(wrong) < 30, wrong
