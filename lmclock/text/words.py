"""Word-level vocabularies in a `vocab.txt`, a word a line, as the tokenizer.json they stand for.

`tokenizer_config.json` beside it may say

    do_lower_case   true: text is lowered first (default false)
    split           words (default): runs of letters and digits, and runs of other marks, are words;
                    spaces: what stands between spaces is a word
    unk_token       the word for all that are not in the vocabulary
    bos_token, eos_token, pad_token, add_bos_token     special words; the last is a flag

Without those, the usual spellings are looked for in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmclock.errors import FileError, choices

MODEL_TYPES = ("lstm", "lstm_classifier")
SPLITS = {"words": "Whitespace", "spaces": "WhitespaceSplit"}
UNKNOWN = ("<unk>", "[UNK]", "<UNK>", "UNK")
USUAL = ("<pad>", "[PAD]", "<s>", "</s>", "<bos>", "<eos>", "[BOS]", "[EOS]", "[CLS]", "[SEP]")


def document(text: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json would say of the words in `text`; FileError where they are none."""
    lines = text.removesuffix("\n").split("\n")
    vocab = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
    if len(vocab) != len(lines):
        again = next(w for n, w in enumerate(lines) if vocab[w.removesuffix("\r")] != n)
        raise FileError(f"the word {again!r:.60} is there twice")
    unknown = _word(config, "unk_token") or next((u for u in UNKNOWN if u in vocab), None)
    if unknown is None:
        raise FileError(
            f"there is no word for unknown ones; valid: {choices(UNKNOWN)}, or an unk_token in "
            "tokenizer_config.json"
        )
    split = config.get("split") or "words"
    if split not in SPLITS:
        raise FileError(
            f"split is {split!r:.60} in tokenizer_config.json; valid: {choices(SPLITS)}"
        )
    named = [_word(config, f"{name}_token") for name in ("bos", "eos", "pad")]
    special = [
        word for word in dict.fromkeys([*named, *USUAL]) if word in vocab and word != unknown
    ]
    lower = config.get("do_lower_case") is True
    return {
        "added_tokens": [{"id": vocab[word], "content": word, "special": True} for word in special],
        "normalizer": {"type": "Lowercase"} if lower else None,
        "pre_tokenizer": {"type": SPLITS[split]},
        "post_processor": _beginning(config, vocab),
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": unknown},
    }


def _word(config: Mapping[str, Any], key: str) -> str | None:
    """A special word: given as it stands, or as an object with its flags."""
    found = config.get(key)
    found = found.get("content") if isinstance(found, Mapping) else found
    return found if isinstance(found, str) else None


def _beginning(config: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, Any] | None:
    """The word that begins every text, where add_bos_token says so."""
    if config.get("add_bos_token") is not True:
        return None
    word = _word(config, "bos_token")
    if word not in vocab:
        raise FileError(
            f"add_bos_token is set, but bos_token {word!r:.60} is not in the vocabulary"
        )
    mark = {"SpecialToken": {"id": word, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ids = {word: {"id": word, "ids": [vocab[str(word)]], "tokens": [word]}}
    return {"type": "TemplateProcessing", "single": [mark, first],
            "pair": [mark, first, second], "special_tokens": ids}  # fmt: skip
