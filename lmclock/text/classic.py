"""Tokenisers from before `tokenizer.json`: their files, as the document that one would hold.

    vocab.txt                    WordPiece, a token a line (BERT, DistilBERT)
    vocab.json and merges.txt    byte-level BPE (GPT-2, RoBERTa)

What the files leave open their class fixes: which one it is says `tokenizer_config.json`, else
the model type of `config.json`. Special tokens have their defaults where nothing else names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lmclock.errors import FileError

FILES = "vocab.txt, or vocab.json with merges.txt"
Text = Callable[[str], str | None]  # a file's text by name, None where there is no such file
Json = Callable[[str], dict[str, Any] | None]


# Named tokens of each kind, as they are spelled where no file says otherwise.
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
         "mask_token": "[MASK]"}  # fmt: skip
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
            "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}  # fmt: skip
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
# Beginnings of class names and model types -> what they are; the first that fits counts.
KINDS = {"roberta": _ROBERTA, "bart": _ROBERTA, "longformer": _ROBERTA, "": _GPT2}


def document(text: Text, read: Json, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The document, None where the folder has neither kind of files; `config` is
    tokenizer_config.json, and has the named tokens that special_tokens_map.json adds to it.
    """
    words = text("vocab.txt")
    if words is not None:
        return _word_piece(words, read, config)
    vocab, merges = read("vocab.json"), text("merges.txt")
    if vocab is None or merges is None:
        return None
    name = str(config.get("tokenizer_class") or (read("config.json") or {}).get("model_type"))
    kind = next(kind for start, kind in KINDS.items() if name.lower().startswith(start))
    return _byte_level(vocab, merges, kind, read, config)


def named_tokens(config: Mapping[str, Any], kind: Mapping[str, str]) -> dict[str, str]:
    """bos_token and its like -> how it is spelled: from the file, else the class's default."""
    found = dict(kind)
    for name in kind:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _word_piece(words: str, read: Json, config: Mapping[str, Any]) -> dict[str, Any]:
    vocab = {line.removesuffix("\r"): at for at, line in enumerate(words.split("\n"))}
    if words.endswith("\n") and vocab.get("") == words.count("\n"):
        del vocab[""]
    named = named_tokens(config, _BERT)
    return {
        "added_tokens": _added(vocab, named, read, config),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": _flag(config, "tokenize_chinese_chars", True),
            "strip_accents": _flag(config, "strip_accents", None),
            "lowercase": _flag(config, "do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _template(vocab, named),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": named["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def _byte_level(
    vocab: dict[str, Any],
    merges: str,
    kind: Mapping[str, str],
    read: Json,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    named = named_tokens(config, kind)
    lines = [line.rstrip("\r") for line in merges.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    space = _flag(config, "add_prefix_space", False)
    step = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True}
    return {
        "added_tokens": _added(vocab, named, read, config),
        "pre_tokenizer": step | {"use_regex": True},
        "post_processor": _roberta(vocab, named, step) if "cls_token" in named else None,
        "decoder": step | {"use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocab,
            "merges": [line for line in lines if line],
        },
    }


def _flag(config: Mapping[str, Any], name: str, default: bool | None) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise FileError(f"tokenizer_config.json: {name} is {value!r:.60}; valid: true or false")
    return default if value is None else value


def _added(
    vocab: Mapping[str, Any], named: Mapping[str, str], read: Json, config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Entries of `added_tokens`: what the files list, and the named tokens they do not."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    found: dict[str, dict[str, Any]] = {}
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        if not isinstance(entry, dict) or not token.isdecimal():
            raise FileError(f"tokenizer_config.json: added_tokens_decoder holds {token!r:.60}")
        found[str(entry.get("content"))] = {**flags, "special": False, **entry, "id": int(token)}
    for text, token_id in (read("added_tokens.json") or {}).items():
        entry = flags | {"id": token_id, "content": text, "special": text in named.values()}
        found.setdefault(text, entry)
    for text in named.values():
        if text in vocab:
            entry = flags | {"id": vocab[text], "content": text, "special": True}
            found.setdefault(text, entry)
    for entry in found.values():
        entry.pop("__type", None)
    return list(found.values())


def _around(vocab: Mapping[str, Any], named: Mapping[str, str]) -> tuple[str, str]:
    """What stands before and after a text, which must be in the vocabulary."""
    before, after = named["cls_token"], named["sep_token"]
    if not {before, after} <= vocab.keys():
        raise FileError(f"the vocabulary lacks {before!r} or {after!r}, which stand around a text")
    return before, after


def _roberta(
    vocab: Mapping[str, Any], named: Mapping[str, str], step: Mapping[str, Any]
) -> dict[str, Any]:
    before, after = _around(vocab, named)
    return {**step, "type": "RobertaProcessing", "cls": [before, vocab[before]],
            "sep": [after, vocab[after]]}  # fmt: skip


def _template(vocab: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
    """[CLS] A [SEP], and B [SEP] of token type 1 behind it."""
    before, after = _around(vocab, named)

    def special(text: str, kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": kind}}

    one, other = ({"Sequence": {"id": name, "type_id": t}} for t, name in enumerate("AB"))
    single = [special(before), one, special(after)]
    tokens = {text: {"id": text, "ids": [vocab[text]], "tokens": [text]}
              for text in (before, after)}  # fmt: skip
    return {"type": "TemplateProcessing", "single": single,
            "pair": [*single, other, special(after, 1)], "special_tokens": tokens}  # fmt: skip
