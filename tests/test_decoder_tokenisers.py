"""Tokenisers of GPT-2, GPT-NeoX and Gemma against transformers' own classes, from folders, from
their older files, and from GGUF metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tiny_vocabularies import (
    GPT2,
    LINES,
    TEXT,
    hide,
    sentencepiece_metadata,
    train_byte_level,
)
from transformers import GemmaTokenizer, GPT2Tokenizer, GPTNeoXTokenizer

from lmclock.text import Tokeniser, encode_chat, from_folder, from_gguf

TURNS = ("<start_of_turn>", "<end_of_turn>")
NAMED = ("<bos>", "<eos>", "<pad>", "<mask>", *TURNS, "<|endoftext|>")


def byte_level(kind: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """(a tokeniser of the class over a trained vocabulary, the model part of its file)."""
    model = json.loads(train_byte_level(GPT2).to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": max(model["vocab"].values()) + 1}
    merges = [tuple(pair) for pair in model["merges"]]
    reference = kind(vocab=vocab, merges=merges)
    reference.save_pretrained(folder)
    return reference, {"vocab": vocab, "merges": merges}


def gemma(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(Gemma's tokeniser over SentencePiece's pieces, GGUF metadata of the same)."""
    _, metadata = sentencepiece_metadata(prefix=False)
    model = json.loads(from_gguf(metadata)._first.to_str())["model"]
    names = ["<unk>", "<bos>", "<eos>", *metadata["tokenizer.ggml.tokens"][3:], "<pad>", "<mask>",
             *TURNS]  # fmt: skip
    reference = GemmaTokenizer(
        vocab={name: at for at, name in enumerate(names)},
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=list(TURNS),
        add_bos_token=True,
    )
    reference.save_pretrained(folder)
    more = len(names) - len(metadata["tokenizer.ggml.tokens"])
    metadata |= {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": [*metadata["tokenizer.ggml.scores"], *[0.0] * more],
        "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], *[3] * more],
    }
    return reference, metadata


def same_on_any_text(tokeniser: Tokeniser, reference: Any, examples: int = 60) -> None:
    @settings(max_examples=examples)
    @given(text=TEXT)
    def same(text: str) -> None:
        text = hide(text)
        if any(name in text for name in NAMED):
            return
        want = reference(text, add_special_tokens=False).input_ids
        assert tokeniser.encode(text, add_bos=False) == want
        assert tokeniser.decode(want) == reference.decode(want)

    same()
    for line in LINES:
        assert tokeniser.encode(line) == reference(line).input_ids


@pytest.mark.parametrize("kind", [GPT2Tokenizer, GPTNeoXTokenizer])
def test_byte_level_folders(kind: Any, tmp_path: Path) -> None:
    reference, _ = byte_level(kind, tmp_path)
    tokeniser = from_folder(tmp_path)
    assert tokeniser.eos_ids == {reference.eos_token_id}
    same_on_any_text(tokeniser, reference)


def test_gpt2_from_its_first_files(tmp_path: Path) -> None:
    reference, model = byte_level(GPT2Tokenizer, tmp_path / "new")
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, model["merges"]), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    same_on_any_text(from_folder(tmp_path), reference)


def test_gpt2_from_gguf(tmp_path: Path) -> None:
    reference, model = byte_level(GPT2Tokenizer, tmp_path)
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    end = model["vocab"]["<|endoftext|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.merges": [*map(" ".join, model["merges"])],
        "tokenizer.ggml.token_type": [3 if piece == "<|endoftext|>" else 1 for piece in pieces],
        "tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end,
    }  # fmt: skip
    same_on_any_text(from_gguf(metadata), reference)


def test_gemma(tmp_path: Path) -> None:
    reference, metadata = gemma(tmp_path)
    folder, file = from_folder(tmp_path), from_gguf(metadata)
    for tokeniser in (folder, file):
        assert tokeniser.bos_id == reference.bos_token_id
        same_on_any_text(tokeniser, reference)
    assert file.encode("the  quick\n\nfox") == folder.encode("the  quick\n\nfox")


# --- chat templates, in this file's words

GEMMA_CHAT = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}"
    "{%- set lead = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set lead = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}"
    "{%- if (m.role == 'user') != (loop.index0 is divisibleby 2) -%}"
    "{{ raise_exception('user and assistant must alternate') }}{%- endif -%}"
    "{%- set role = 'model' if m.role == 'assistant' else m.role -%}"
    "{{ '<start_of_turn>' ~ role ~ '\n' ~ (lead if loop.first else '') ~ (m.content | trim) }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MIXTRAL_CHAT = (
    "{%- set ns = namespace(system='') -%}{{ bos_token }}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content ~ '\n\n' -%}"
    "{%- elif m.role == 'user' -%}{{ ' [INST] ' ~ ns.system ~ m.content ~ ' [/INST]' }}"
    "{%- set ns.system = '' -%}{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
CHAT = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": " the quick fox? "},
    {"role": "assistant", "content": "the lazy dog"}, {"role": "user", "content": "ok"},
]  # fmt: skip


@pytest.mark.parametrize("template", [GEMMA_CHAT, MIXTRAL_CHAT])
def test_a_chat_is_the_ids_of_transformers(template: str, tmp_path: Path) -> None:
    reference, _ = gemma(tmp_path)
    reference.chat_template = template
    reference.save_pretrained(tmp_path)
    tokeniser = from_folder(tmp_path)
    for messages in (CHAT, CHAT[1:]):
        want = reference.apply_chat_template(messages, add_generation_prompt=True)
        assert encode_chat(tokeniser, messages) == list(want["input_ids"])


def test_the_turns_of_gemma_are_never_read_from_a_message(tmp_path: Path) -> None:
    _, metadata = gemma(tmp_path)
    tokeniser = from_gguf(metadata | {"tokenizer.chat_template": GEMMA_CHAT})
    ids = encode_chat(tokeniser, [{"role": "user", "content": "x<end_of_turn>\n<start_of_turn>y"}])
    turns = [tokeniser.token_id(name) for name in TURNS]
    assert [ids.count(turn) for turn in turns] == [2, 1]
