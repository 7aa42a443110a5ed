"""Tokenisers against the libraries the models were made with, on Unicode fuzz."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import (
    BYTES,
    LINES,
    PIPELINES,
    SPELLING,
    TEXT,
    WHOLE,
    gguf_metadata,
    hide,
    sentencepiece_metadata,
    trained,
)
from tokenizers import (
    Tokenizer,
    models,
)

from lmclock.errors import OptionError
from lmclock.text import Segment, Tokeniser, from_gguf
from lmclock.text.splits import SPLITS


@cache
def ours(pre: str) -> Tokeniser:
    return from_gguf(gguf_metadata(trained(pre), pre))


@cache
def sentencepiece(prefix: bool, fallback: bool = True) -> tuple[Any, Tokeniser]:
    model, metadata = sentencepiece_metadata(prefix, fallback)
    return model, from_gguf(metadata)


@cache
def wrapped(pre: str) -> Any:
    """The reference as `transformers` wraps it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=trained(pre))


@pytest.mark.parametrize("pre", PIPELINES)
@settings(max_examples=100)
@given(text=TEXT)
def test_bytes_merge_as_in_transformers(pre: str, text: str) -> None:
    text = hide(text)
    ids = ours(pre).encode(text)
    assert ids == wrapped(pre).encode(text, add_special_tokens=False)
    assert ours(pre).decode(ids) == text


def test_every_row_is_compared_or_equal_to_one_that_is() -> None:
    compared = [SPLITS[pre] for pre in PIPELINES]
    assert {pre for pre, split in SPLITS.items() if split not in compared} == {"default"}


@given(text=st.text(alphabet="aé中 1234567.,!$+<=>^~|-'_s\n\t", max_size=60))
def test_the_default_row_cuts_stage_by_stage(text: str) -> None:
    import regex

    metadata = gguf_metadata(trained("gpt-2"), "default")
    words = [text]
    for stage in (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        "[0-9][0-9][0-9]",
    ):
        words = [part for word in words for part in regex.split(f"({stage})", word) if part]
    # Words are merged alone, so the text's tokens are its words' tokens, one word at a time.
    reference = trained("gpt-2")
    model = Tokenizer(reference.model)
    model.pre_tokenizer = BYTES
    expected = [token for word in words for token in model.encode(word).ids]
    assert from_gguf(metadata).encode(text) == expected


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@settings(max_examples=100)
@given(text=SPELLING)
def test_special_tokens_are_found_as_transformers_finds_them(pre: str, text: str) -> None:
    ids = ours(pre).encode(text, allow_special=True)
    assert ids == wrapped(pre).encode(text, add_special_tokens=False)
    assert ours(pre).decode(ids, skip_special=False) == text


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "tekken"])
@settings(max_examples=100)
@given(text=SPELLING)
def test_spelled_special_tokens_stay_text(pre: str, text: str) -> None:
    ids = ours(pre).encode(text)
    assert ours(pre).special_ids.isdisjoint(ids)
    assert ours(pre).decode(ids) == text


@settings(max_examples=100)
@given(text=SPELLING, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_words_span_segments_and_special_tokens_do_not(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges)]
    tokeniser = ours("smollm")
    assert tokeniser.encode_segments([Segment(part, False) for part in parts]) == tokeniser.encode(
        text
    )
    ids = tokeniser.encode_segments([Segment(part, True) for part in parts])
    assert tokeniser.decode(ids, skip_special=False) == text
    found = [token for token in ids if token in tokeniser.special_ids]
    spelled = [tokeniser.encode(part, allow_special=True) for part in parts]
    assert found == [token for part in spelled for token in part if token in tokeniser.special_ids]


@pytest.mark.parametrize("prefix", [True, False])
@settings(max_examples=200)
@given(text=TEXT)
def test_scores_merge_as_in_sentencepiece(prefix: bool, text: str) -> None:
    model, tokeniser = sentencepiece(prefix)
    text = hide(text)
    ids = tokeniser.encode(text, add_bos=False)
    assert ids == model.encode(text)
    assert tokeniser.decode(ids) == text.replace("\u2581", " ")


@given(text=st.text(alphabet="The quickbrown中文👩\n 12", max_size=40))
def test_unknown_text_without_byte_tokens_is_one_unknown_token(text: str) -> None:
    model, tokeniser = sentencepiece(True, fallback=False)
    assert tokeniser.encode(text, add_bos=False) == model.encode(text)


@given(text=st.text(alphabet="</s>un k", max_size=12))
def test_sentencepiece_text_never_becomes_a_control_token(text: str) -> None:
    _, tokeniser = sentencepiece(True)
    assert tokeniser.special_ids.isdisjoint(tokeniser.encode(text, add_bos=False))
    assert 2 in tokeniser.encode("a</s>b", allow_special=True)


def test_a_special_token_gives_the_next_word_its_space_again() -> None:
    model, tokeniser = sentencepiece(True)
    ids = tokeniser.encode("<s>the</s>the", allow_special=True, add_bos=False)
    assert ids == [1, *model.encode("the"), 2, *model.encode("the")]


def test_what_stands_around_a_text() -> None:
    _, tokeniser = sentencepiece(True)
    body = tokeniser.encode("the", add_bos=False)
    assert tokeniser.encode("the") == [1, *body] and tokeniser.bos_id == 1
    assert tokeniser.encode("") == [1] and tokeniser.encode("", add_bos=False) == []
    smollm = ours("smollm")
    assert smollm.encode("the") == smollm.encode("the", add_bos=False)
    assert smollm.encode("the", add_bos=True)[0] == smollm.bos_id
    metadata = gguf_metadata(trained("llama-bpe"), "llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    metadata["tokenizer.ggml.add_eos_token"] = True
    both = from_gguf(metadata)
    assert both.encode("")[0] == both.bos_id and both.encode("")[-1] in both.eos_ids
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(OptionError, match="no token that begins"):
        from_gguf(metadata).encode("a", add_bos=True)


def test_ends_are_the_named_ids_and_the_names_of_published_models() -> None:
    tokeniser = ours("gpt-2")
    assert tokeniser.eos_ids == {trained("gpt-2").token_to_id("<|end|>")}
    metadata = gguf_metadata(trained("gpt-2"), "gpt-2")
    pieces = metadata["tokenizer.ggml.tokens"]
    pieces[300], pieces[301] = "<|im_end|>", "</s>"  # both mistyped as plain text
    metadata["tokenizer.ggml.merges"] = []
    assert from_gguf(metadata).eos_ids == {pieces.index("<|end|>"), 300}


def test_decoding_shows_or_hides_special_tokens() -> None:
    tokeniser = ours("smollm")
    ids = tokeniser.encode("<s>hi<think>  \n<|end|>", allow_special=True)
    assert tokeniser.decode(ids) == "hi<think>  \n"
    assert tokeniser.decode(ids, skip_special=False) == "<s>hi<think>  \n<|end|>"
    assert tokeniser.token_bytes(ids[0]) == b"<s>" and tokeniser.token_id("<s>") == ids[0]


@pytest.mark.parametrize("token", [-1, 10**9, -(2**40)])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    tokeniser = ours("smollm")
    with pytest.raises(OptionError, match=f"{token} is outside.*valid: 0 to"):
        tokeniser.decode([token])


@pytest.mark.parametrize("text", ["a\ud800", 7, None, b"bytes"])
def test_what_is_no_unicode_text_is_refused(text: Any) -> None:
    with pytest.raises(OptionError):
        ours("smollm").encode(text)


@pytest.mark.parametrize("unit", ["a", " ", "A", "\n", "!", "中", "aA", "1"])
def test_one_endless_word_is_encoded(unit: str) -> None:
    text = unit * (60_000 // len(unit))
    for tokeniser in (ours("smollm"), ours("tekken"), sentencepiece(True)[1]):
        assert tokeniser.decode(tokeniser.encode(text)) == text


# The real model.


def test_smollm2_against_transformers_and_the_bytes(smollm2: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from lmclock.files.gguf import GGUF

    metadata = GGUF.open(smollm2).metadata
    tokeniser = from_gguf(metadata)
    # SmolLM2's own tokenizer.json: digits alone, then GPT-2's words, over this vocabulary.
    pieces = list(metadata["tokenizer.ggml.tokens"])
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = PIPELINES["smollm"]
    backend.add_special_tokens(pieces[:17])
    reference = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokeniser.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (tokeniser.bos_id, tokeniser.vocab_size) == (1, 49152)
    assert tokeniser.eos_ids == {0, 2} and len(tokeniser.special_ids) == 17
    assert tokeniser.encode("<|im_end|>", allow_special=True) == [2]
    # 21 bytes have no token (0x04, 0xF1, ...): what stands for them is dropped, as everywhere.
    assert tokeniser.encode("\x04") == reference.encode("\x04") == []

    @given(text=TEXT)
    def same(text: str) -> None:
        ids = tokeniser.encode(text)
        assert ids == reference.encode(text)
        assert tokeniser.special_ids.isdisjoint(ids)

    same()
    for line in LINES:
        assert tokeniser.decode(tokeniser.encode(line)) == line
        assert tokeniser.encode(line) == reference.encode(line)
    assert WHOLE[0] not in tokeniser.specials.by_text
