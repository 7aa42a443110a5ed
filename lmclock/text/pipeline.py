"""The pipeline of a `tokenizer.json`, rebuilt around a vocabulary without special tokens.

What may stay is what the library does with text: normalising, cutting, merging. What the file could
use against its reader is refused here: patterns that take more than linear time, replacements that
grow a text without bound, a decoder whose spelling of bytes is unknown.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from lmclock.errors import FileError, UnsupportedError
from lmclock.text.splits import SPLITS
from lmclock.text.vocabulary import SPACE, Pair, build_bpe, check_byte_pieces, library_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import Model
    from tokenizers.pre_tokenizers import Split

MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")
BPE_OPTIONS = ("end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
MAX_GROWTH = 1024  # characters that a file's own replacements may make of one
MAX_AROUND = 16  # tokens that a file may put around a text

# A pattern is run over each of these, repeated to these lengths, with its own letters at the end (a
# search first looks for letters that a match must have). Linear ones take a microsecond a letter,
# quadratic ones 16 to 40 at the last length; worse ones show at a shorter one, before they take
# long, or exhaust the library's limit of retries.
PROBES = ("a", "A", "1", " ", "\n", "!", "é", "中", "aA", " a", "a1", "'s", "\t ", "a'", "1 ")
PROBE_LENGTHS = tuple(96 << step for step in range(8))
PROBE_SECONDS, PROBE_SECONDS_PER_LETTER = 0.01, 8e-6

# DeepSeek-LLM's files hold a quadratic pattern; this finds the same matches in linear time, since
# the first match of a run of spaces begins where the run does, and takes the last line end in it.
LINEAR = {r"\s+$": r"(?<!\s)\s+$"}


def build_model(
    model: Mapping[str, Any],
    ids: Mapping[str, int],
    pieces: Sequence[str | None],
    special: Set[str],
) -> Model:
    """The library's model over the vocabulary `ids` from which no text reaches a `special` piece.

    The piece for unknown text stays where the model needs it: it says so of the text, truthfully.
    """
    from tokenizers import models

    unknown = model.get("unk_token")
    if unknown is not None and unknown not in ids:
        raise FileError(f"unk_token {unknown!r:.60} is not in the vocabulary")
    plain = {piece: at for piece, at in ids.items() if piece == unknown or piece not in special}
    kind = model["type"]
    if kind == "BPE":
        if model.get("byte_fallback"):
            check_byte_pieces(ids, unknown)
        options = {name: model[name] for name in BPE_OPTIONS if model.get(name) is not None}
        merges, continues = _merges(model), model.get("continuing_subword_prefix") or ""
        hidden = special - {unknown}
        return build_bpe(ids, merges, hidden, continues, unk_token=unknown, **options)
    with library_errors("the model cannot be used"):
        if kind == "Unigram":
            scores = _scores(model, pieces, special)
            return models.Unigram(scores, model.get("unk_id"), bool(model.get("byte_fallback")))
        if unknown is None:
            raise FileError(f"unk_token is missing; a {kind} model cannot do without")
        if kind == "WordLevel":
            return models.WordLevel(vocab=plain, unk_token=unknown)
        return models.WordPiece(
            vocab=plain,
            unk_token=unknown,
            max_input_chars_per_word=model.get("max_input_chars_per_word", 100),
            continuing_subword_prefix=model.get("continuing_subword_prefix", "##"),
        )


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; a file lists them as `"a b"` or as `["a", "b"]`."""
    found = model.get("merges")
    if not isinstance(found, list):
        raise FileError(f"merges is {found!r:.60}; valid: a list")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in found]
    for merge, pair in zip(found, pairs, strict=True):
        if type(pair) is not list or len(pair) != 2 or {str} != set(map(type, pair)):
            raise FileError(f"merge {merge!r:.60} is not two tokens")
    return list(dict.fromkeys((left, right) for left, right in pairs))


def _scores(
    model: Mapping[str, Any], pieces: Sequence[str | None], special: Set[str]
) -> list[tuple[str, float]]:
    """Unigram's pieces with their scores.

    Ids are positions, so a special piece keeps its place under a name that no text reaches:
    pipelines of this model let no plain space through.
    """
    scores = [float(score) for _, score in model["vocab"]]
    # Added tokens may follow the list; the library finds those whole, their score does not matter.
    scores += [min(scores, default=0.0)] * (len(pieces) - len(scores))
    names = [
        f" {at}" if piece is None or piece in special else piece for at, piece in enumerate(pieces)
    ]
    return list(zip(names, scores, strict=True))


def build_pipelines(document: Mapping[str, Any], model: Model) -> tuple[Tokenizer, Tokenizer]:
    """(the pipeline for text that begins a sequence, the one for text after a special token).

    They are one object unless the file puts a space before the first word of a sequence only.
    """
    steps = {name: document.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
    steps = copy.deepcopy(steps)
    for step in _objects(steps):
        if step.get("Regex") in LINEAR:
            step["Regex"] = LINEAR[step["Regex"]]
    _check_patterns(steps)
    growth = _growth(steps["normalizer"])
    if growth > MAX_GROWTH:
        raise FileError(f"normalizer makes {growth} characters of one; valid: up to {MAX_GROWTH}")
    first = _pipeline(steps, model)
    later = copy.deepcopy(steps)
    marks = [step for step in _objects(later) if step.get("prepend_scheme") == "first"]
    for step in marks:
        step["prepend_scheme"] = "never"
    return first, _pipeline(later, model) if marks else first


def _pipeline(steps: Mapping[str, Any], model: Model) -> Tokenizer:
    from tokenizers import Tokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    document = {"version": "1.0", "added_tokens": [], "model": empty, **steps}
    with library_errors("the pipeline cannot be used"):
        tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.model = model
    return tokenizer


def ids_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids the file's post-processor puts before and after a text, seen on a text."""
    with library_errors("post_processor cannot be used"):
        for text in ("a", "0", " ", "."):
            inner = tokenizer.encode(text, add_special_tokens=False).ids
            whole = tokenizer.encode(text, add_special_tokens=True).ids
            if inner:
                break
    extra = len(whole) - len(inner)
    for at in range(extra + 1) if extra <= MAX_AROUND else ():
        if whole[at : at + len(inner)] == inner:
            return tuple(whole[:at]), tuple(whole[at + len(inner) :])
    raise FileError(f"post_processor adds {extra} tokens to a text; valid: 0 to {MAX_AROUND}")


def pair_around(tokenizer: Tokenizer) -> Pair | None:
    """What the file's post-processor puts around two texts, seen on two; None where it is more
    than a few tokens, or nothing.
    """
    for text in ("a", "0", " ", "."):
        with library_errors("post_processor cannot be used"):
            found = tokenizer.encode(text, text, add_special_tokens=True)
        marks = list(zip(found.ids, found.type_ids, strict=True))
        owners = found.sequence_ids
        firsts = [at for at, owner in enumerate(owners) if owner == 0]
        others = [at for at, owner in enumerate(owners) if owner == 1]
        if firsts and others:
            break
    else:
        return None
    between = marks[firsts[-1] + 1 : others[0]]
    extra = len(marks) - len(firsts) - len(others)
    if not between or extra > MAX_AROUND or firsts[-1] > others[0]:
        return None
    types = marks[firsts[0]][1], marks[others[0]][1]
    before, after = marks[: firsts[0]], marks[others[-1] + 1 :]
    return Pair(tuple(before), tuple(between), tuple(after), types)


def spelling_of(decoder: object) -> dict[str, Any]:
    """How pieces stand for bytes, as fields of `Vocabulary`, from the file's decoder."""
    steps = {str(step.get("type")): step for step in _objects(decoder) if "type" in step}
    if "ByteLevel" in steps:
        return {"spelling": "byte_level"}
    if "Metaspace" in steps:
        step = steps["Metaspace"]  # older files have the flag, newer ones the scheme
        space = step.get("prepend_scheme") != "never" and step.get("add_prefix_space") is not False
        return {"spelling": "metaspace", "strip_space": space}
    if steps.get("Replace", {}).get("pattern") == {"String": SPACE}:
        return {"spelling": "metaspace", "strip_space": bool(steps.get("Strip", {}).get("start"))}
    if "WordPiece" in steps:
        continues = str(steps["WordPiece"].get("prefix", "##"))
        return {"spelling": "words", "strip_space": True, "continues": continues}
    if not steps:
        return {"spelling": "words", "strip_space": True}
    raise UnsupportedError(
        f"decoder {'+'.join(steps)} is not supported; "
        "valid: ByteLevel, Metaspace, Replace of U+2581, WordPiece or none"
    )


def _objects(found: object) -> Iterator[dict[str, Any]]:
    """Every object within a JSON value, outermost first."""
    if isinstance(found, dict):
        yield found
    if isinstance(found, dict | list):
        for inner in found.values() if isinstance(found, dict) else found:
            yield from _objects(inner)


def _growth(normaliser: object) -> int:
    """An upper bound on the characters that the file's own replacements make of one."""
    growth = 1
    for step in _objects(normaliser):
        text = step.get("content", step.get("prepend", ""))
        if step.get("type") in ("Replace", "Prepend") and isinstance(text, str):
            pattern = step.get("pattern")
            least = len(str(pattern.get("String", ""))) if isinstance(pattern, dict) else 0
            growth *= max(1, -(-len(text) // least) if least else 1 + len(text))
    return growth


def _check_patterns(steps: Mapping[str, Any]) -> None:
    """FileError for a pattern that takes more than linear time on a text made to hurt it."""
    from tokenizers import Regex, pre_tokenizers

    known = {stage for split in SPLITS.values() for stage in split.stages}
    for pattern in {str(step["Regex"]) for step in _objects(steps) if "Regex" in step} - known:
        shown = f"the pattern {pattern!r:.60}"
        with library_errors(f"{shown} cannot be used"):
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            for probe, length in itertools.product(PROBES, PROBE_LENGTHS):
                text = (probe * length)[:length] + f"\0{pattern}\0"
                limit = PROBE_SECONDS + length * PROBE_SECONDS_PER_LETTER
                # Three times, since a busy machine can charge one run with another's time.
                if all(_seconds(split, text) > limit for _ in range(3)):
                    raise FileError(f"{shown} takes more than linear time on a run of {probe!r}")


def _seconds(split: Split, text: str) -> float:
    """Processor time of cutting a text."""
    begin = time.thread_time()
    split.pre_tokenize_str(text)
    return time.thread_time() - begin
