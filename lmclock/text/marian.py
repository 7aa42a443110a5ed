"""Marian's two-sided tokenisers, and T5's spiece.model: SentencePiece files in model folders.

    source.spm, target.spm           how each language is cut into pieces
    vocab.json                       piece -> id; the source's where target_vocab.json is there
    spiece.model                     T5: pieces are numbered as they stand, extra ids behind them

A text may begin with a language token such as `>>fr<<`, where one vocabulary serves both sides.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import lmclock.text.sentencepiece as sentencepiece
from lmclock.errors import FileError, UnsupportedError
from lmclock.text.sentencepiece import CONTROL, UNIGRAM, UNKNOWN, UNUSED, USER, SentencePiece
from lmclock.text.specials import Special, Specials
from lmclock.text.tokeniser import Tokeniser
from lmclock.text.vocabulary import MAX_TOKENS, Vocabulary, check_pieces, library_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = "source.spm with target.spm and vocab.json"
NAMED = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
MOST_EXTRA = 1000
Bytes = Callable[[str], bytes | None]
Json = Callable[[str], dict[str, Any] | None]


class Encoded(NamedTuple):
    """What the `tokenizers` library calls an encoding, as far as it is used here."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class PieceEncoder:
    """Text to ids: SentencePiece's pieces, numbered by another vocabulary."""

    def __init__(self, model: SentencePiece, ids: Mapping[str, int], unknown: int) -> None:
        if model.kind != UNIGRAM:
            raise UnsupportedError(f"SentencePiece model type {model.kind}; valid: 1 (unigram)")
        self.model, self.ids, self.unknown = model, ids, unknown
        self._library = _unigram(model)
        self._codes = frozenset(p for p in ids if p.startswith(">>") and p.endswith("<<"))

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoded:
        """Ids of a text. Offsets are those of the normalised text."""
        found = []
        if text.startswith(">>") and "<<" in text:
            end = text.index("<<") + 2
            found.append(self.ids.get(text[:end], self.unknown))
            text = text[end:]
        normal = self.model.normalise(text)
        encoding = self._library.encode(normal, add_special_tokens=False)
        # A piece the model does not know may be one of the vocabulary all the same.
        pieces = [normal[a:b] for a, b in encoding.offsets]
        ids = [self.ids.get(piece, self.unknown) for piece in pieces]
        return Encoded(found + ids, [(0, 0)] * len(found) + encoding.offsets)

    def token_to_id(self, piece: str) -> int | None:
        """As the library has it."""
        return self.ids.get(piece)


def _unigram(model: SentencePiece) -> Tokenizer:
    """The library's model over the pieces that a text may reach."""
    from tokenizers import Tokenizer, models

    best = max(model.scores)
    entries = []
    for at, (piece, score, kind) in enumerate(
        zip(model.pieces, model.scores, model.kinds, strict=True)
    ):
        if kind == USER:  # they win against any pieces they are made of
            score = len(piece) * best - 0.1
        hidden = kind in (UNKNOWN, CONTROL, UNUSED)
        entries.append((f" {at}" if hidden else piece, score))  # no text has a plain space left
    with library_errors("the pieces cannot be used"):
        return Tokenizer(models.Unigram(entries, model.unknown, model.byte_fallback))


def from_files(
    data: Bytes, read: Json, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Tokeniser | None:
    """The tokeniser of a Marian folder, None where it has no source.spm."""
    source, vocab = data("source.spm"), read("vocab.json")
    if source is None:
        return None
    if vocab is None:
        raise FileError("there is a source.spm, but no vocab.json")
    apart = config.get("separate_vocabs") is True
    target = read("target_vocab.json") if apart else vocab
    if target is None:
        raise FileError("separate_vocabs is true, but there is no target_vocab.json")
    names = {name: str(config.get(name) or text) for name, text in NAMED.items()}
    ids = _checked(vocab, "vocab.json")
    eos, unknown = (ids.get(names[name]) for name in ("eos_token", "unk_token"))
    if eos is None or unknown is None:
        raise FileError(f"vocab.json lacks {names['eos_token']!r} or {names['unk_token']!r}")
    encoder = PieceEncoder(sentencepiece.read(source), ids, unknown)
    own = _checked(target, "target_vocab.json") if apart else ids
    pieces: list[str | None] = [None] * (max(own.values()) + 1)
    for piece, token in own.items():
        pieces[token] = piece
    special = [Special(own[text], text) for text in names.values() if text in own]
    ends = generation.get("eos_token_id")
    ends = (
        ends if isinstance(ends, list) else [own.get(names["eos_token"]) if ends is None else ends]
    )
    vocabulary = Vocabulary(
        pieces=pieces, spelling="metaspace", verbatim=frozenset(s.id for s in special),
        specials=Specials(special, names), bos_id=None,
        eos_ids=frozenset(e for e in ends if isinstance(e, int)), suffix=(eos,), strip_space=True,
    )  # fmt: skip
    return Tokeniser(vocabulary, encoder, encoder)  # type: ignore[arg-type]


def _checked(vocab: Mapping[str, Any], name: str) -> dict[str, int]:
    check_pieces([*vocab])
    wrong = [t for t in vocab.values() if type(t) is not int or not 0 <= t < MAX_TOKENS]
    if wrong or len(set(vocab.values())) != len(vocab):
        raise FileError(f"{name}: ids must be numbers, each used once; found {str(wrong[:1])[:60]}")
    return dict(vocab)


def t5_document(data: bytes, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer.json would say of T5's spiece.model."""
    model = sentencepiece.read(data)
    if model.kind != UNIGRAM:
        raise UnsupportedError(f"SentencePiece model type {model.kind}; valid: 1 (unigram)")
    extra = config.get("extra_ids", 100)
    if type(extra) is not int or not 0 <= extra <= MOST_EXTRA:
        raise FileError(f"extra_ids is {extra!r:.60}; valid: 0 to {MOST_EXTRA}")
    vocab: list[list[Any]] = [list(pair) for pair in zip(model.pieces, model.scores, strict=True)]
    held = set(model.pieces)
    vocab += [
        [name, 0.0] for n in reversed(range(extra)) if (name := f"<extra_id_{n}>") not in held
    ]
    names = {name: str(config.get(name) or text) for name, text in NAMED.items()}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    at = {piece: n for n, (piece, _) in enumerate(vocab)}
    special = [text for text in names.values() if text in at]
    special += [piece for piece in at if piece.startswith("<extra_id_")]
    end = names["eos_token"]
    if end not in at:
        raise FileError(f"the pieces lack {end!r}, which ends a text")
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    rules = base64.b64encode(model.charsmap).decode()
    return {
        "added_tokens": [flags | {"id": at[s], "content": s, "special": True} for s in special],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": rules} if rules else None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": end, "type_id": 0}}],
            "pair": [],
            "special_tokens": {end: {"id": end, "ids": [at[end]], "tokens": [end]}},
        },
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": model.unknown, "vocab": vocab,
                  "byte_fallback": model.byte_fallback},
    }  # fmt: skip
