"""How an encoder's rows become one embedding: what sentence-transformers keeps beside a model.

modules.json                 the steps after the encoder: Pooling, perhaps Normalize
1_Pooling/config.json        which rows, in which way
sentence_bert_config.json    the most tokens of a text, and whether it is lower-cased first
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.fields import Fields

# `pooler` is BERT's own: the first row through a dense layer and tanh.
POOLINGS = ("mean", "cls", "max", "last", "pooler")
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_OTHER_MODES = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
_NAMES = {"cls": "cls", "max": "max", "mean": "mean", "lasttoken": "last"}
Read = Callable[[str], Any]


@dataclass(frozen=True)
class Sentence:
    """`pooling` names one way or several, whose results stand side by side; `normalise` makes the
    embedding's length one. `said`: files say so, it is not a default.
    """

    pooling: tuple[str, ...] = ("mean",)
    normalise: bool = False
    said: bool = False
    longest: int = 0  # tokens of a text; 0: the model's context
    lower: bool = False  # texts are lower-cased before they are cut into tokens
    prompt: str = ""  # stands before every text


def from_folder(read: Read) -> Sentence:
    """The files of a folder, through `read(name)`; the default where there are none."""
    modules = read("modules.json")
    if modules is None:
        return Sentence()
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise FileError("modules.json must be a list of objects")
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules]
    paths = [str(m.get("path", "")) for m in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedError(
            f"modules.json: the steps {' '.join(kinds)[:80]!r} are not supported; "
            "valid: Transformer Pooling, and Normalize after them"
        )
    if not re.fullmatch(r"[\w-]+", paths[1]):
        raise FileError(f"modules.json: {paths[1]!r:.80} is not the name of a folder")
    where = f"{paths[1]}/config.json"
    pooling = read(where)
    if not isinstance(pooling, dict):
        raise FileError(f"{where} is missing, which modules.json names")
    about = Fields("sentence_bert_config.json", read("sentence_bert_config.json") or {})
    prompts = Fields("config_sentence_transformers.json",
                     read("config_sentence_transformers.json") or {})  # fmt: skip
    return Sentence(
        _pooling(Fields(where, pooling)), kinds[2:] == ["Normalize"], said=True,
        longest=about.integer("max_seq_length", 0), lower=about.flag("do_lower_case", False),
        prompt=_prompt(prompts),
    )  # fmt: skip


def _pooling(f: Fields) -> tuple[str, ...]:
    stated = f.take("pooling_mode")
    if stated is not None:
        names = stated if isinstance(stated, list) else [stated]
        wrong = [name for name in names if name not in _NAMES]
        found = [_NAMES[name] for name in names if name in _NAMES]
    else:
        wrong = [mode for mode in _OTHER_MODES if f.flag(mode, False)]
        found = [name for mode, name in _MODES.items() if f.flag(mode, False)]
    if wrong or not found:
        raise UnsupportedError(
            f"{f.where}: pooling {str(wrong[0] if wrong else stated)[:80]!r} is not supported; "
            f"valid: {choices(_NAMES)}"
        )
    return tuple(found)


def _prompt(f: Fields) -> str:
    """The prompt that stands before every text unless another one is asked for."""
    name, known = f.take("default_prompt_name"), f.take("prompts", {})
    if name is None:
        return ""
    if not isinstance(known, dict) or not isinstance(known.get(name), str):
        raise f.wrong("default_prompt_name", name, "the name of one of its prompts")
    return str(known[name])
