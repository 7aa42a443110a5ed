"""Tokenisers of encoders against transformers: WordPiece and RoBERTa's BPE, from old and new files
and from GGUF; single texts and pairs, on Unicode that was picked to hurt and on random Unicode.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast

from lmclock.errors import FileError, OptionError
from lmclock.text import Tokeniser, from_folder, from_gguf

TEXTS = [
    "", " ", "Hello, World!", "naïve CAFÉ Ångström", "unaffable\tembeddings\r\nnext  line",
    "你好，世界 hello你好",
    "中文テキスト한국어", "a\u0301e\u0300 İstanbul ẞ ﬁ", "\u200b\ufeff\x00\x07a\u00adb",
    "👩‍👩‍👧 emoji 🙂", "don't won't it's", "3.14159, 1,000,000 and #hashtag @you", "—“quoted”—…",
    "x" * 120, "العربية हिन्दी ไทย", "𠀀𪚥 rare", "[ CLS ] <not> special", "snake_case camelCase",
]  # fmt: skip
RANGES = [(32, 127), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x600), (0x2000, 0x2070),
          (0x3000, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAC80), (0x1F300, 0x1F650)]  # fmt: skip


def fuzz(count: int) -> list[str]:
    rng = random.Random(8)

    def word() -> str:
        return "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 9)))

    return [" ".join(word() for _ in range(rng.randrange(1, 8))) for _ in range(count)]


ALL = TEXTS + fuzz(300)


def train(kind: str) -> Tokenizer:
    """A vocabulary learned from the texts, so that words fall apart in many ways."""
    texts = [*TEXTS, *fuzz(40), "embedding embed bedding unaffordable affable world words " * 3]
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
        texts = [text.lower() for text in texts] + texts
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet
        )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_bert(folder: Path, **config: Any) -> Any:
    """vocab.txt and tokenizer_config.json; the tokenizer of transformers."""
    vocab = train("bert").get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{w}\n" for w in sorted(vocab, key=vocab.get)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", **config})
    )
    return BertTokenizerFast.from_pretrained(folder)


def write_roberta(folder: Path, kind: str = "Roberta", **config: Any) -> Any:
    train("roberta").model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": f"{kind}Tokenizer", **config})
    )
    return getattr(transformers, f"{kind}TokenizerFast").from_pretrained(folder)


WRITERS = {
    "bert": lambda folder: write_bert(folder),
    "bert-cased": lambda folder: write_bert(folder, do_lower_case=False),
    "bert-no-chinese": lambda folder: write_bert(
        folder, tokenize_chinese_chars=False, strip_accents=False
    ),
    "roberta": lambda folder: write_roberta(folder),
    "bart": lambda folder: write_roberta(folder, "Bart"),
    "roberta-space": lambda folder: write_roberta(folder, add_prefix_space=True),
}


def assert_same(ours: Tokeniser, theirs: Any) -> None:
    for text in ALL:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        plain = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = ours.spans(text)
        assert (ids, spans) == (plain["input_ids"], plain["offset_mapping"]), text
        assert ours.around(ids).ids == theirs(text)["input_ids"]
    for a, b in zip(ALL, ALL[5:], strict=False):
        want = theirs(a, b, return_token_type_ids=True)
        got = ours.around(ours.spans(a)[0], ours.spans(b)[0])
        assert (got.ids, got.types) == (want["input_ids"], want["token_type_ids"]), (a, b)
        assert got.ids[got.first :][: len(ours.spans(a)[0])] == ours.spans(a)[0]
        assert got.ids[got.second :][: len(ours.spans(b)[0])] == ours.spans(b)[0]


@pytest.mark.parametrize("kind", WRITERS)
def test_old_and_new_files(kind: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    theirs = WRITERS[kind](old)
    assert not (old / "tokenizer.json").exists()
    assert len({*theirs(" ".join(TEXTS))["input_ids"]}) > 80
    assert_same(from_folder(old), theirs)
    theirs.save_pretrained(new)
    assert (new / "tokenizer.json").exists()
    assert_same(from_folder(new), theirs)


def test_a_special_token_in_a_text_stays_text(tmp_path: Path) -> None:
    theirs = write_bert(tmp_path)
    ours = from_folder(tmp_path)
    assert theirs("[SEP]")["input_ids"] == [2, 3, 3]
    assert ours.encode("[SEP]").count(3) == 1 and ours.encode("[SEP]", allow_special=True)[1] == 3


def test_gguf(tmp_path: Path) -> None:
    theirs = write_bert(tmp_path)
    pieces = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    special = [piece[0] == "[" and piece[-1] == "]" and len(piece) > 2 for piece in pieces]
    stored = [p if s else p[2:] if p.startswith("##") else "\u2581" + p
              for p, s in zip(pieces, special, strict=True)]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": stored,
        "tokenizer.ggml.token_type": [3 if s else 1 for s in special],
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    ours = from_gguf(metadata)
    assert_same(ours, theirs)
    assert ours.decode(ours.encode("hello, world")) == "hello , world"
    stored[stored.index("[CLS]")] = "[BEGIN]"
    with pytest.raises(FileError, match="names no cls_token"):
        from_gguf(metadata)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"vocab\.txt, or vocab\.json with merges\.txt"):
        from_folder(tmp_path)
    write_roberta(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    del vocab["</s>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(FileError, match="lacks '<s>' or '</s>'"):
        from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": "yes"}')
    with pytest.raises(FileError, match="do_lower_case is 'yes'"):
        from_folder(tmp_path)


def test_no_pairs_for_a_tokeniser_without_them(tmp_path: Path) -> None:
    train("roberta").model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours = from_folder(tmp_path)
    assert ours.around([5, 6]).ids == [5, 6]
    with pytest.raises(OptionError, match="takes single texts"):
        ours.around([5], [6])
