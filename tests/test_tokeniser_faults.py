"""Damaged tokeniser files: a typed error of one sentence that names what is wrong."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_vocabularies import (
    LINES,
    gguf_metadata,
    save_folder,
    sentencepiece_metadata,
    trained,
)

from lmclock.errors import FileError, LmclockError, UnsupportedError
from lmclock.text import from_folder, from_gguf

# Each case is what is done to a good file, and what the message must name.

GGUF_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "tokenizer.ggml.model is missing"),
    "model type": ({"model": 3}, "tokenizer.ggml.model is 3; valid: str"),
    "other model": ({"model": "rwkv"}, "'rwkv' is not supported; valid: gpt2, llama"),
    "other pre": ({"pre": "x"}, "'x' is not a known pre-tokeniser; valid: default"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    "empty": ({"tokens": []}, "has 0 tokens"),
    "a text for tokens": ({"tokens": "abc"}, "valid: an array"),
    "tokens type": ({"tokens": [1, 2]}, "tokens holds 1; valid: str"),
    "long token": ({"tokens": ["a", "b" * 5000]}, "token 1 has 5000 characters"),
    "surrogate": ({"tokens": ["a", "\ud800"]}, "token 1.*not Unicode"),
    "twice": ({"tokens": ["a", "b", "a"]}, "token 'a' is there twice, as 0 and 2"),
    "types length": ({"token_type": [1]}, "token_type has 1 values for"),
    "types type": ({"token_type": ["x"] * 3}, "token_type holds 'x'"),
    "bos range": ({"bos_token_id": 10**6}, "bos_token_id is 1000000; valid: 0 to"),
    "bos negative": ({"bos_token_id": -1}, "bos_token_id is -1"),
    "bos type": ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'; valid: int"),
    "bos bool": ({"bos_token_id": True}, "bos_token_id is True; valid: int"),
    "eot range": ({"eot_token_id": 2**32 - 1}, "eot_token_id is 4294967295"),
    "bos missing": ({"bos_token_id": None, "add_bos_token": True}, "adds a bos token"),
    "flag type": ({"add_bos_token": 1}, "add_bos_token is 1; valid: bool"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing"),
    "merge of one": ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
    "merge of three": ({"merges": ["a b c", "d"]}, "merge 'a b c' is not two tokens"),
    "merge line": ({"merges": ["a\nb", "c d e"]}, "is not two tokens"),
    "merge of nothing": ({"merges": ["a "]}, "merges do not fit.*out of vocabulary"),
    "merge unknown": ({"merges": ["a zzzz"]}, "merges do not fit.*zzzz"),
    "merge result": ({"merges": ["q 7"]}, "merges do not fit.*q7"),
    "template type": ({"chat_template": 3}, "chat_template is 3; valid: str"),
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_damaged_byte_level_metadata(fault: str) -> None:
    change, message = GGUF_FAULTS[fault]
    metadata = gguf_metadata(trained("gpt-2"), "gpt-2")
    for key, value in change.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        metadata[name] = value
        if key == "tokens":
            metadata["tokenizer.ggml.token_type"] = None
            metadata["tokenizer.ggml.bos_token_id"] = metadata["tokenizer.ggml.eos_token_id"] = None
    with pytest.raises((FileError, UnsupportedError), match=message) as error:
        from_gguf(metadata)
    assert "\n" not in str(error.value)


def with_piece(metadata: dict[str, Any], at: int, piece: str) -> dict[str, Any]:
    changed = copy.deepcopy(metadata)
    changed["tokenizer.ggml.tokens"][at] = piece
    return changed


def test_damaged_sentencepiece_metadata() -> None:
    _, good = sentencepiece_metadata(True)
    byte = good["tokenizer.ggml.tokens"].index("<0x41>")
    scores = good["tokenizer.ggml.scores"]
    faults = [
        (with_piece(good, byte, "<0x-1>"), "token '<0x-1>' names no byte"),
        (with_piece(good, byte, "<0xZZ>"), "token '<0xZZ>' names no byte"),
        (with_piece(good, byte, "<0x041>"), "token '<0x041>' names no byte"),
        (with_piece(good, byte, "AAAA"), "255 of the 256 byte tokens.*'<0x41>' is missing"),
        ({**good, "tokenizer.ggml.scores": None}, "scores is missing"),
        ({**good, "tokenizer.ggml.scores": scores[:-1]}, "scores has"),
        ({**good, "tokenizer.ggml.scores": [*scores[:-1], float("nan")]}, "has the score nan"),
        ({**good, "tokenizer.ggml.scores": ["x"] * len(scores)}, "scores holds 'x'"),
        ({**good, "tokenizer.ggml.unknown_token_id": 9999}, "unknown_token_id is 9999"),
    ]
    for metadata, message in faults:
        with pytest.raises(FileError, match=message):
            from_gguf(metadata)
    long = [*good["tokenizer.ggml.tokens"], *(f"{at:04d}" + "x" * 4000 for at in range(100))]
    with pytest.raises(FileError, match="pieces are too long"):
        from_gguf(
            {
                **good,
                "tokenizer.ggml.tokens": long,
                "tokenizer.ggml.scores": [0.0] * len(long),
                "tokenizer.ggml.token_type": good["tokenizer.ggml.token_type"] + [1] * 100,
            }
        )
    _, bare = sentencepiece_metadata(True, fallback=False)
    bare["tokenizer.ggml.unknown_token_id"] = None
    with pytest.raises(FileError, match="neither byte tokens nor"):
        from_gguf(bare)


def test_repeated_merges_and_empty_tokens_are_harmless() -> None:
    metadata = gguf_metadata(trained("gpt-2"), "gpt-2")
    expected = from_gguf(metadata).encode(LINES[0])
    metadata["tokenizer.ggml.merges"] += metadata["tokenizer.ggml.merges"][:50]
    assert from_gguf(metadata).encode(LINES[0]) == expected
    metadata["tokenizer.ggml.tokens"].append("")
    metadata["tokenizer.ggml.token_type"].append(5)
    tokeniser = from_gguf(metadata)
    assert tokeniser.encode(LINES[0]) == expected
    assert tokeniser.decode([tokeniser.vocab_size - 1]) == ""


@given(data=st.data())
def test_any_wrong_value_is_a_typed_error(data: st.DataObject) -> None:
    """Whatever one key holds, the result is a tokeniser or one of our errors."""
    metadata = gguf_metadata(trained("gpt-2"), "gpt-2")
    scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
    odd = st.one_of(scalar, st.binary(max_size=3), st.lists(scalar, max_size=4))
    metadata[data.draw(st.sampled_from(sorted(metadata)))] = data.draw(odd)
    with suppress(LmclockError):
        from_gguf(metadata).encode("a b")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


FOLDER_FAULTS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "deep": (nested(100_000), "not valid JSON"),
    "a list": ("[]", "holds a list"),
    "repeated key": ('{"model": {"vocab": {"a": 0, "a": 1}}}', "key 'a' is there twice"),
    "no model": ({"model": None}, "model is None; valid: dict"),
    "model type": ({"model": {"type": "RNN"}}, "'RNN' is not supported; valid: BPE"),
    "vocab type": ({"model": {"vocab": [1]}}, "vocab is .*valid: dict"),
    "id type": ({"model": {"vocab": {"a": "0"}}}, "token 'a' has id '0'"),
    "id negative": ({"model": {"vocab": {"a": -1}}}, "token 'a' has id -1"),
    "id huge": ({"model": {"vocab": {"a": 2**40}}}, "token 'a' has id 1099511627776"),
    "id twice": ({"model": {"vocab": {"a": 0, "b": 0}}}, "token 0 is 'a' and 'b'"),
    "surrogate": ({"model": {"vocab": {"\ud800": 0}}}, "token 0.*not Unicode"),
    "added id": ({"added_tokens": [{"id": 1, "content": "<s>"}]}, "token 1 is '!' and '<s>'"),
    "added twice": ({"added_tokens": [{"id": i, "content": "!"} for i in (1, 2)]}, "'!'"),
    "added type": ({"added_tokens": [{"id": 1, "content": 5}]}, "content is 5; valid: str"),
    "added huge": (
        {"added_tokens": [{"id": 2**31, "content": "x"}]},
        "token 'x' has id 2147483648",
    ),
    "added list": ({"added_tokens": [3]}, "added_tokens holds something"),
    "merges": ({"model": {"merges": [["a"]]}}, "merge .* is not two tokens"),
    "merge unknown": ({"model": {"merges": [["a", "zzzz"]]}}, "merges do not fit"),
    "unknown": ({"model": {"unk_token": "zzzz"}}, "unk_token 'zzzz' is not in the vocabulary"),
    "fallback": ({"model": {"byte_fallback": True}}, "neither byte tokens nor"),
    "option": ({"model": {"fuse_unk": "x"}}, "merges do not fit"),
    "pre-tokeniser": ({"pre_tokenizer": {"type": "x"}}, "pipeline cannot be used"),
    "decoder": ({"decoder": {"type": "CTC"}}, "decoder CTC is not supported"),
    "growth": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 5000}},
        "normalizer makes 5000 characters of one",
    ),
}
SLOW_PATTERNS = (r"(a+)+$", r"(a|a)*$", r"\s+x$", r"(\w+\s?)*!", "a*a*b")


def change_document(document: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            document[key].update(value)
        else:
            document[key] = value
    return document


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_damaged_folders(tmp_path: Path, fault: str) -> None:
    change, message = FOLDER_FAULTS[fault]
    folder = save_folder(tmp_path, trained("gpt-2"))
    if not isinstance(change, str):
        change = json.dumps(change_document(json.loads(trained("gpt-2").to_str()), change))
    (folder / "tokenizer.json").write_text(change)
    with pytest.raises((FileError, UnsupportedError), match=message) as error:
        from_folder(folder)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
def test_patterns_that_take_too_long_are_refused(tmp_path: Path, pattern: str) -> None:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    document = {**json.loads(trained("gpt-2").to_str()), "pre_tokenizer": step}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FileError, match=r"the pattern .* (linear|cannot be used)"):
        from_folder(tmp_path)


def test_a_folder_without_a_tokeniser_or_with_strange_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"has no tokenizer\.json"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(FileError, match="not a regular file"):
        from_folder(tmp_path)
    folder = save_folder(tmp_path / "ends", trained("gpt-2"))
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
    with pytest.raises(FileError, match="eos_token_id holds 99999"):
        from_folder(folder)
    (folder / "generation_config.json").write_bytes(b"\xff")
    with pytest.raises(FileError, match="cannot be read"):
        from_folder(folder)
