"""Tokenisers from Hugging Face folders, against the library that reads them whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import (
    BYTES,
    FRAGMENTS,
    GPT2,
    LINES,
    PIPELINES,
    TEXT,
    add_start,
    chain,
    cut,
    hide,
    save_folder,
    sentencepiece_metadata,
    train_byte_level,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from lmclock.text import from_folder, from_gguf


def test_a_folder_equals_its_own_tokeniser(tmp_path: Path) -> None:
    reference = train_byte_level(PIPELINES["llama-bpe"], ignore_merges=True)
    add_start(reference)
    config = {"bos_token": "<s>", "eos_token": {"content": "<|end|>"}, "chat_template": "{{ 1 }}"}
    folder = save_folder(tmp_path, reference, **config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    tokeniser = from_folder(folder)
    assert tokeniser.bos_id == reference.token_to_id("<s>")
    assert tokeniser.eos_ids == {5, 7, reference.token_to_id("<|end|>")}
    assert tokeniser.chat_template == "{{ 1 }}"
    for text in (*LINES, *FRAGMENTS, "", "<s> a <|end|>  \n <think>x"):
        assert tokeniser.encode(text, allow_special=True) == reference.encode(text).ids
        plain = tokeniser.encode(text, add_bos=False)
        assert tokeniser.special_ids.isdisjoint(plain) and tokeniser.decode(plain) == text
    (folder / "chat_template.jinja").write_text("{{ 2 }}")
    assert from_folder(folder).chat_template == "{{ 2 }}"


def metaspace(scheme: str) -> Tokenizer:
    """A tokeniser with the pipeline of Llama-2's successors, merges from SentencePiece's scores."""
    _, metadata = sentencepiece_metadata(True)
    source = json.loads(from_gguf(metadata)._first.to_str())["model"]
    names = metadata["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: at for at, piece in enumerate(names)},
            merges=[tuple(pair) for pair in source["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([] if scheme == "never" else [decoders.Strip(" ", 1, 0)]),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_folder_with_metaspace(tmp_path: Path, scheme: str) -> None:
    reference = metaspace(scheme)
    tokeniser = from_folder(save_folder(tmp_path, reference))

    @given(text=TEXT, special=st.sampled_from(["", "<s>", "</s>"]), more=TEXT)
    def same(text: str, special: str, more: str) -> None:
        text = f"{hide(text)}{special}{hide(more)}"
        ids = tokeniser.encode(text, allow_special=True)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokeniser.decode(ids) == reference.decode(ids)

    same()


def word_piece() -> Tokenizer:
    """BERT's pipeline."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def unigram() -> Tokenizer:
    """T5's pipeline."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_level() -> Tokenizer:
    words = sorted({word for line in LINES for word in line.split()})
    names = ["[UNK]", "</s>", *words]
    tokenizer = Tokenizer(
        models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[UNK]", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [word_piece, unigram, word_level])
def test_folders_of_the_other_models(tmp_path: Path, make: Any) -> None:
    reference = make()
    tokeniser = from_folder(save_folder(tmp_path, reference))
    words = st.sampled_from([word for line in LINES for word in line.split()])

    @given(text=st.one_of(TEXT, st.lists(words).map(" ".join)))
    def same(text: str) -> None:
        assert tokeniser.encode(text) == reference.encode(text).ids

    same()
    unknown = tokeniser.specials.by_text.get("[UNK]") or tokeniser.specials.by_text["<unk>"]
    for name in tokeniser.specials.by_text:
        ids = tokeniser.encode(f"{name}a{name} {name}", add_bos=False)
        assert not (tokeniser.special_ids - {unknown.id}) & set(ids), name
    line = "the quick brown fox"
    assert tokeniser.decode(tokeniser.encode(line)) == reference.decode(reference.encode(line).ids)


def test_stripping_flags_of_special_tokens(tmp_path: Path) -> None:
    reference = train_byte_level(GPT2)
    reference.add_special_tokens(
        [AddedToken("<m>", lstrip=True, rstrip=True), AddedToken("<w>", single_word=True)]
    )
    tokeniser = from_folder(save_folder(tmp_path, reference))
    for text in ("a <m> b", "  <m>", "<m>  <m>\n", "a<w>b <w> <w>", "x_<w>", "<w><w>"):
        assert tokeniser.encode(text, allow_special=True) == reference.encode(text).ids, text


def test_published_patterns_are_accepted(tmp_path: Path) -> None:
    """DeepSeek-LLM's spaces, whose pattern is replaced by a linear one, and EXAONE's words."""
    words = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    steps = (cut("[\r\n]"), cut(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+"), cut(r"\s+$"), cut(words), BYTES)
    reference = train_byte_level(chain(*steps))
    tokeniser = from_folder(save_folder(tmp_path, reference))

    @settings(max_examples=200)
    @given(text=st.one_of(TEXT, st.text(alphabet=" \t\n\r\u3000a.", max_size=12)))
    def same(text: str) -> None:
        assert tokeniser.encode(hide(text)) == reference.encode(hide(text)).ids

    same()
    assert tokeniser.decode(tokeniser.encode(" " * 200_000 + "a")) == " " * 200_000 + "a"
