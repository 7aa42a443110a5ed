"""A tokeniser from the metadata of a GGUF file: byte-level BPE (`gpt2`), SentencePiece (`llama`) or
WordPiece (`bert`).

Token types decide: control and unknown tokens are special, user-defined ones are found whole in any
text, the rest is reached by merging only. Where a file is silent the format's readers fix the
meaning: no `pre` is `default`, `llama` adds the token that begins a text and a space before its
first word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.text.short_texts import ShortTexts
from lmclock.text.specials import Special, Specials
from lmclock.text.splits import split_named
from lmclock.text.tokeniser import Tokeniser
from lmclock.text.vocabulary import (
    END_NAMES,
    SPACE,
    Pair,
    Vocabulary,
    add_tokens,
    build_bpe,
    byte_named,
    check_byte_pieces,
    check_pieces,
    derive_merges,
    end_ids,
)

MODELS = ("gpt2", "llama", "bert")
# Values of tokenizer.ggml.token_type; 5 is unused, 6 a byte, and both say what the piece says.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}

_NOT_BETWEEN = bytes(byte for byte in range(256) if byte not in b" \n")


def from_gguf(metadata: Mapping[str, Any]) -> Tokeniser:
    """The tokeniser that `tokenizer.*` keys of a GGUF file describe.

    FileError for keys that are missing, of a wrong type or in contradiction; UnsupportedError for a
    tokeniser model or pre-tokeniser there is no row for.
    """
    keys = _Keys(metadata)
    model = keys.value("model", str)
    if model not in MODELS:
        raise UnsupportedError(
            f"tokenizer.ggml.model {model!r} is not supported; valid: {choices(MODELS)}"
        )
    pieces = keys.array("tokens", str)
    if pieces is None:
        raise FileError("tokenizer.ggml.tokens is missing")
    check_pieces(pieces)
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) != len(pieces):
        at = next(at for at, piece in enumerate(pieces) if ids[piece] != at)
        raise FileError(f"token {pieces[at]!r} is there twice, as {at} and {ids[pieces[at]]}")
    special, user = _kinds(keys, pieces, ids)
    if model == "bert":
        return _word_piece(keys, pieces, special)
    build = _byte_level if model == "gpt2" else _sentencepiece
    return build(keys, pieces, ids, special, user)


class _Keys:
    """The `tokenizer.ggml.*` keys, each read with the type it must have."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """One value, `default` if the key is missing, FileError if that is None too."""
        name = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        found = self._metadata.get(name, default)
        if found is None:
            raise FileError(f"{name} is missing")
        if type(found) is not kind:
            raise FileError(f"{name} is {found!r:.60}; valid: {kind.__name__}")
        return found

    def found(self, key: str) -> Any:
        """What the file holds, unchecked; None if the key is missing."""
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.value(key, bool, default))

    def array(self, key: str, *kinds: type, length: int | None = None) -> list[Any] | None:
        """One array as a list of `kinds`, of that length if one is given; None if missing."""
        found = self.found(key)
        if found is None:
            return None
        if isinstance(found, str | bytes) or not hasattr(found, "__len__"):
            raise FileError(f"tokenizer.ggml.{key} is {found!r:.60}; valid: an array")
        values = found.tolist() if hasattr(found, "tolist") else list(found)
        if not set(map(type, values)) <= set(kinds):
            wrong = next(value for value in values if type(value) not in kinds)
            raise FileError(
                f"tokenizer.ggml.{key} holds {wrong!r:.60}; "
                f"valid: {choices(kind.__name__ for kind in kinds)}"
            )
        if length is not None and len(values) != length:
            raise FileError(f"tokenizer.ggml.{key} has {len(values)} values for {length} tokens")
        return values

    def token(self, key: str, size: int) -> int | None:
        """A token id, None if the key is missing."""
        if self._metadata.get(f"tokenizer.ggml.{key}") is None:
            return None
        token = self.value(key, int)
        if not 0 <= token < size:
            raise FileError(f"tokenizer.ggml.{key} is {token}; valid: 0 to {size - 1}")
        return int(token)


def _kinds(keys: _Keys, pieces: list[str], ids: dict[str, int]) -> tuple[set[int], set[int]]:
    """(special ids, user-defined ids).

    Converters have mistyped tokens that end a text, so those are special by name: where the file
    has no types, where the type is not the one of plain text, and where the name is `<|...|>`,
    which no text is merged into. (`</s>` may be a plain token of a vocabulary that learned HTML.)
    """
    types = keys.array("token_type", int, length=len(pieces))
    ends = {name: ids[name] for name in END_NAMES & ids.keys()}
    if types is None:
        named = (keys.token(key, len(pieces)) for key in (*ENDS, *NAMED.values()))
        return {*ends.values(), *(token for token in named if token is not None)}, set()
    odd = [(at, kind) for at, kind in enumerate(types) if kind != NORMAL]
    special = {at for at, kind in odd if kind in (UNKNOWN, CONTROL)}
    special |= {at for name, at in ends.items() if types[at] != NORMAL or "|" in name}
    return special, {at for at, kind in odd if kind == USER_DEFINED and pieces[at]} - special


def _vocabulary(
    keys: _Keys, pieces: list[str], special: set[int], user: set[int], **options: Any
) -> Vocabulary:
    """What both models share: which tokens are special, and what stands around a text."""
    add_bos = keys.flag("add_bos_token", options.pop("add_bos"))
    named = {name: keys.token(key, len(pieces)) for name, key in NAMED.items()}
    specials = Specials(
        (Special(token, pieces[token]) for token in sorted(special)),
        {name: pieces[token] for name, token in named.items() if token is not None},
    )
    bos, eos = named["bos_token"], named["eos_token"]
    separator = keys.token("seperator_token_id", len(pieces))  # spelled so in the format
    prefix = _wanted("bos", add_bos, bos)
    suffix = _wanted("eos", keys.flag("add_eos_token", False), eos)
    suffix += _wanted("sep", keys.flag("add_sep_token", False), separator)
    return Vocabulary(
        pieces=pieces,
        verbatim=frozenset(special | user),
        specials=specials,
        bos_id=bos,
        eos_ids=end_ids((keys.token(key, len(pieces)) for key in ENDS), specials),
        prefix=prefix,
        suffix=suffix,
        chat_template=keys.value("tokenizer.chat_template", str, "") or None,
        **options,
    )


def _wanted(name: str, wanted: bool, token: int | None) -> tuple[int, ...]:
    if wanted and token is None:
        raise FileError(f"the file adds a {name} token around a text but names none")
    return (token,) if wanted and token is not None else ()


def _byte_level(
    keys: _Keys, pieces: list[str], ids: dict[str, int], special: set[int], user: set[int]
) -> Tokeniser:
    """Byte-level BPE: the file lists the merges, `pre` names the words they stay within.

    A vocabulary may lack bytes (SmolLM2 lacks 21 that its training text never had); such bytes of a
    text are dropped, as the tokenisers these files were made from drop them.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    split = split_named(keys.value("pre", str, "default"))
    listed = keys.found("merges")
    if listed is None:
        raise FileError("tokenizer.ggml.merges is missing")
    bos = keys.token("bos_token_id", len(pieces))
    vocabulary = _vocabulary(
        keys,
        pieces,
        special,
        user,
        spelling="byte_level",
        add_bos=split.add_bos and bos is not None,
    )
    hidden = {pieces[token] for token in special}
    stages = [pre_tokenizers.Split(Regex(stage), "isolated") for stage in split.stages]
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Sequence([*stages, alphabet])

    def build() -> Tokenizer:
        pairs = _pairs(keys.array("merges", str) or [])
        tokenizer = Tokenizer(build_bpe(ids, pairs, hidden, ignore_merges=split.ignore_merges))
        tokenizer.pre_tokenizer = words
        add_tokens(tokenizer, ((Special(token, pieces[token]), False) for token in sorted(user)))
        return tokenizer

    if hasattr(listed, "find") and not user:  # the list lies in a file
        short = ShortTexts(build, words, ids, hidden, listed, split.ignore_merges)
        return Tokeniser(vocabulary, short, short)
    tokenizer = build()
    return Tokeniser(vocabulary, tokenizer, tokenizer)


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    """`a b` lines as pairs, the first of equal ones; FileError for a line that is no pair."""
    joined = "\n".join(merges)
    # Spaces and line ends must alternate: one pass over the bytes, not one check per merge.
    between = joined.encode("utf-8", "replace").translate(None, delete=_NOT_BETWEEN)
    if merges and between != (b" \n" * len(merges))[:-1]:
        wrong = next(merge for merge in merges if merge.count(" ") != 1 or "\n" in merge)
        raise FileError(f"merge {wrong!r:.60} is not two tokens with a space between")
    parts = iter(joined.replace(" ", "\n").split("\n") if merges else ())
    pairs = list(zip(parts, parts, strict=True))
    if len(set(merges)) != len(merges):
        pairs = list(dict.fromkeys(pairs))
    return pairs


def _sentencepiece(
    keys: _Keys, pieces: list[str], ids: dict[str, int], special: set[int], user: set[int]
) -> Tokeniser:
    """SentencePiece BPE: scores, not merges; spaces as U+2581; unknown characters as bytes."""
    from tokenizers import Tokenizer, normalizers

    scores = keys.array("scores", float, int, length=len(pieces))
    if scores is None:
        raise FileError("tokenizer.ggml.scores is missing")
    if not all(map(math.isfinite, scores)):
        at = next(at for at, score in enumerate(scores) if not math.isfinite(score))
        raise FileError(f"token {pieces[at]!r} has the score {scores[at]}; valid: finite numbers")
    unknown = keys.token("unknown_token_id", len(pieces))
    unknown_piece = None if unknown is None else pieces[unknown]
    space = keys.flag("add_space_prefix", True)
    bos = keys.token("bos_token_id", len(pieces))
    vocabulary = _vocabulary(
        keys,
        pieces,
        special,
        user,
        spelling="metaspace",
        strip_space=space,
        add_bos=bos is not None,
    )
    fallback = check_byte_pieces(pieces, unknown_piece)
    # What text is merged from and into: no special tokens and no bytes.
    plain = {
        piece: scores[at]
        for piece, at in ids.items()
        if at not in special and not (piece.startswith("<0x") and byte_named(piece) is not None)
    }
    hidden = {pieces[token] for token in special if token != unknown}
    tokenizer = Tokenizer(
        build_bpe(
            ids,
            derive_merges(plain),
            hidden,
            unk_token=unknown_piece,
            fuse_unk=True,
            byte_fallback=fallback,
        )
    )
    # Each stretch of text between tokens gets its own space, as readers of this format give it.
    spaces = [normalizers.Prepend(SPACE)] if space else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    add_tokens(tokenizer, ((Special(token, pieces[token]), False) for token in sorted(user)))
    return Tokeniser(vocabulary, tokenizer, tokenizer)


def _word_piece(keys: _Keys, pieces: list[str], special: set[int]) -> Tokeniser:
    """WordPiece: pieces that begin a word have U+2581 before them, the others nothing."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    names = {"cls_token": ("cls_token_id", "bos_token_id"), "sep_token": ("seperator_token_id",
             "eos_token_id"), "unk_token": ("unknown_token_id",)}  # fmt: skip
    named = {}
    for name, stated in names.items():
        ids = [token for key in stated if (token := keys.token(key, len(pieces))) is not None]
        default = f"[{name[:3].upper()}]"
        if not ids and default not in pieces:
            raise FileError(f"the file names no {name}, and no token is {default}")
        named[name] = ids[0] if ids else pieces.index(default)
    special = special | set(named.values())
    spelled = [
        piece if at in special else piece[1:] if piece.startswith(SPACE) else f"##{piece}"
        for at, piece in enumerate(pieces)
    ]
    plain = {p: at for at, p in enumerate(spelled) if at not in special}
    unknown = pieces[named["unk_token"]]
    model = WordPiece(vocab=plain | {unknown: named["unk_token"]}, unk_token=unknown,
                      max_input_chars_per_word=100)  # fmt: skip
    tokenizer = Tokenizer(model)
    # Readers of this format lower-case every text: the file has no flag of its own for it.
    lower = keys.flag("normalizer.lowercase", True)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = named["cls_token"], named["sep_token"]
    vocabulary = Vocabulary(
        pieces=spelled,
        spelling="words",
        verbatim=frozenset(special),
        specials=Specials((Special(token, pieces[token]) for token in sorted(special)),
                          {name: pieces[token] for name, token in named.items()}),
        bos_id=None,
        eos_ids=frozenset(),
        prefix=(cls,),
        suffix=(sep,),
        pair=Pair(((cls, 0),), ((sep, 0),), ((sep, 1),), (0, 1)),
        strip_space=True,
        continues="##",
    )  # fmt: skip
    return Tokeniser(vocabulary, tokenizer, tokenizer)
