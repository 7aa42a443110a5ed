"""How a model's files want text to be searched for: generation_config.json, or in folders older
than it the same fields of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmclock.errors import FileError
from lmclock.fields import Fields

MAX_BANNED = 1 << 16
FILE = "generation_config.json"


@dataclass(frozen=True)
class Searching:
    """Settings of a search that a model's files can state and a caller can choose.

    early_stopping   True: as soon as `width` beams have ended; False: when the best running beam
                     scores less than the worst result; "never": when no length can change that
    min_length       least tokens, the prompt among them, before an end; min_new_tokens: without it
    no_repeat_ngram  no run of so many tokens comes twice; 0: off
    first, final     tokens that must come first, and where the length runs out; None: off
    banned           runs of tokens that must not come
    """

    width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    min_length: int = 0
    min_new_tokens: int = 0
    no_repeat_ngram: int = 0
    repetition: float = 1.0
    first: int | None = None
    final: tuple[int, ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Generation(Searching):
    """What the files say; `longest` is the length of a target, the token that begins it among them,
    `max_new_tokens` without it; 0: not said.
    """

    longest: int = 0
    max_new_tokens: int = 0


def generation(f: Fields) -> Generation:
    """The settings among the fields of either file."""
    early = f.take("early_stopping", False)
    if not isinstance(early, bool) and early != "never":
        raise f.wrong("early_stopping", early, "true, false or 'never'")
    return Generation(
        width=f.integer("num_beams", 1, high=256),
        length_penalty=f.number("length_penalty", 1.0, low=-100.0),
        early_stopping=early,
        min_length=f.integer("min_length", 0, low=0),
        min_new_tokens=f.integer("min_new_tokens", 0, low=0),
        no_repeat_ngram=f.integer("no_repeat_ngram_size", 0, low=0),
        repetition=f.number("repetition_penalty", 1.0),
        first=next(iter(f.ids("forced_bos_token_id")), None),
        final=f.ids("forced_eos_token_id"),
        banned=_banned(f),
        longest=f.integer("max_length", 0, low=0),
        max_new_tokens=f.integer("max_new_tokens", 0, low=0),
    )


def beside(config: Any, read: Callable[[str], Any]) -> dict[str, Any]:
    """What a translator's function of this name gives: the file's settings, where there is one."""
    data = read(FILE)
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise FileError(f"{FILE} holds no JSON object")
    f = Fields(FILE, data)
    start = next(iter(f.ids("decoder_start_token_id")), config.start)
    return {"generation": generation(f), "start": start, "eos": f.ids("eos_token_id") or config.eos}


def _banned(f: Fields) -> tuple[tuple[int, ...], ...]:
    runs = f.take("bad_words_ids", [])
    good = isinstance(runs, list) and len(runs) <= MAX_BANNED
    good = good and all(
        isinstance(run, list) and run and all(type(token) is int and token >= 0 for token in run)
        for run in runs
    )
    if not good:
        raise f.wrong("bad_words_ids", runs, "a list of lists of token ids")
    return tuple(tuple(run) for run in runs)
