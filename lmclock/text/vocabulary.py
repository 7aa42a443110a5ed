"""What a file says about its tokens, and the rules both kinds of file share.

`from_gguf` and `from_folder` each read one kind of file into a `Vocabulary` and hand it to
`Tokeniser` with the library tokenisers that merge it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from lmclock.errors import FileError, LmclockError
from lmclock.text.specials import Special, Specials

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

MAX_TOKENS = 1 << 22
MAX_TOKEN_LENGTH = 4096  # characters; the longest of published vocabularies are runs of spaces
MAX_CUTS = 1 << 28  # characters in all cuts of all pieces; Gemma's 256k pieces have 2^24
SPELLINGS = ("byte_level", "metaspace", "words")
SPACE = "\u2581"  # how SentencePiece spells a space

# Tokens that end a turn or a text in the vocabularies of published models. Files name one or two
# of them; a model trained with the others emits those too.
END_NAMES = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<|return|>", "<|call|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>", "</s>"),
        *("<eos>", "[EOS]", "<｜end▁of▁sentence｜>"),
    }
)
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_LIKE_A_BYTE = re.compile("<0x[^<>]{0,8}>")


@dataclass(frozen=True)
class Pair:
    """What stands before, between and after two texts, as (token id, token type); `types` are
    those of the texts.
    """

    before: tuple[tuple[int, int], ...]
    between: tuple[tuple[int, int], ...]
    after: tuple[tuple[int, int], ...]
    types: tuple[int, int]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one file.

    `pieces[id]` is the token as the file spells it, None where an id has no token. `spelling` says
    how a piece stands for bytes: `byte_level` (each character is a byte, in GPT-2's alphabet),
    `metaspace` (U+2581 is a space, `<0x0A>` a byte), `words` (a space before each piece, unless it
    begins with `continues`). Pieces of `verbatim` ids are text as they stand. `prefix` and `suffix`
    are the ids the file wants around a text, `pair` those around two; `strip_space` says that its
    first word has a space too many.
    """

    pieces: Sequence[str | None]
    spelling: str
    verbatim: frozenset[int]
    specials: Specials
    bos_id: int | None
    eos_ids: frozenset[int]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    pair: Pair | None = None
    strip_space: bool = False
    continues: str = ""
    chat_template: str | None = None

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token of the vocabulary stands for."""
        piece = self.pieces[token] or ""
        if token in self.verbatim:
            return piece.encode()
        if self.spelling == "byte_level":
            alphabet = byte_alphabet()
            known = all(character in alphabet for character in piece)
            return bytes(map(alphabet.__getitem__, piece)) if known else piece.encode()
        if self.spelling == "metaspace":
            byte = byte_named(piece)
            return piece.replace(SPACE, " ").encode() if byte is None else bytes((byte,))
        if self.continues and piece.startswith(self.continues):
            return piece.removeprefix(self.continues).encode()
        return f" {piece}".encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet, character to byte: the printable bytes of Latin-1 stand for themselves, the
    others for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + at): byte for at, byte in enumerate(others)}


def byte_named(piece: str) -> int | None:
    """The byte that a piece like `<0x0A>` names; None for any other piece."""
    match = _BYTE.fullmatch(piece)
    return int(match[1], 16) if match else None


def check_byte_pieces(pieces: Iterable[str], unknown: str | None) -> bool:
    """Whether a SentencePiece vocabulary spells unknown characters as bytes.

    It has a token for each of the 256, or none and a token `unknown`; else FileError.
    """
    candidates = [piece for piece in pieces if piece.startswith("<0x")]
    for piece in candidates:
        if byte_named(piece) is None and _LIKE_A_BYTE.fullmatch(piece):
            raise FileError(f"token {piece!r} names no byte; valid: '<0x00>' to '<0xFF>'")
    found = {byte_named(piece) for piece in candidates} - {None}
    if len(found) == 256:
        return True
    if found:
        missing = min(set(range(256)) - found)
        raise FileError(
            f"{len(found)} of the 256 byte tokens are there, '<0x{missing:02X}>' is missing"
        )
    if unknown is None:
        raise FileError("the vocabulary has neither byte tokens nor a token for unknown characters")
    return False


def check_pieces(pieces: Sequence[object]) -> None:
    """FileError unless the tokens are Unicode texts of a sane length and number."""
    if not 0 < len(pieces) <= MAX_TOKENS:
        raise FileError(f"the vocabulary has {len(pieces)} tokens; valid: 1 to {MAX_TOKENS}")
    if set(map(type, pieces)) == {str}:
        texts = cast(Sequence[str], pieces)
        if len(max(texts, key=len)) <= MAX_TOKEN_LENGTH and _is_unicode("".join(texts)):
            return
    # Something is wrong: find it. The checks above look at a whole vocabulary in a millisecond.
    for at, piece in enumerate(pieces):
        if not isinstance(piece, str):
            raise FileError(f"token {at} is a {type(piece).__name__}; valid: text")
        if len(piece) > MAX_TOKEN_LENGTH:
            raise FileError(
                f"token {at} has {len(piece)} characters; valid: at most {MAX_TOKEN_LENGTH}"
            )
        if not _is_unicode(piece):
            raise FileError(f"token {at}, {piece!r}, is not Unicode text")


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def end_ids(named: Iterable[int | None], specials: Specials) -> frozenset[int]:
    """The ids that end a generation: those a file names, and special tokens named in END_NAMES."""
    names = set(END_NAMES & specials.by_text.keys())
    if "<|return|>" in names:
        names.discard("<|end|>")  # ends a message within a turn where <|return|> ends the turn
    found = {specials.by_text[name].id for name in names}
    return frozenset(found | {token for token in named if token is not None})


def derive_merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply, in the order a rank-based merger must try them.

    SentencePiece joins the two neighbours whose joined piece scores highest, the leftmost of
    equals. So each way to cut a piece into two others is a merge, ranked by the piece's score. Cuts
    of one piece compete only where they overlap; the longer left part starts further left.
    """
    work = sum(len(piece) ** 2 for piece in scores)
    if work > MAX_CUTS:
        raise FileError(f"the pieces are too long to be merged from others: {work} > {MAX_CUTS}")
    ordered = sorted(scores, key=scores.__getitem__, reverse=True)
    return [
        (piece[:cut], piece[cut:])
        for piece in ordered
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def build_bpe(
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    special: Set[str],
    continues: str = "",
    **options: Any,
) -> BPE:
    """The library's merger without the `special` pieces, so that no text is merged into one.

    FileError if a merge uses or makes a piece that is not in the vocabulary.
    """
    from tokenizers.models import BPE

    vocab = dict(vocab)
    for piece in ("", *special):
        vocab.pop(piece, None)
    if continues:
        options["continuing_subword_prefix"] = continues
    try:
        return BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library has no narrower class
        # Most files have no merge that touches a special token: look for them only after a refusal.
        plain = [
            (left, right)
            for left, right in merges
            if special.isdisjoint((left, right, left + right.removeprefix(continues)))
        ]
        if len(plain) == len(merges):
            raise FileError(f"the merges do not fit the vocabulary: {error}") from None
        with library_errors("the merges do not fit the vocabulary"):
            return BPE(vocab=vocab, merges=plain, **options)


@contextmanager
def library_errors(what: str, kind: type[LmclockError] = FileError) -> Iterator[None]:
    """Turn what the `tokenizers` library raises into one sentence that begins with `what`.

    The library raises bare `Exception` (or what its arguments' conversion raises), and panics as a
    class it does not export, so the catch cannot be narrower; everything else passes through.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise kind(f"{what}: U+{half:04X} in it is half of a character") from None
    except BaseException as error:
        kinds = (Exception, TypeError, ValueError, OverflowError)
        if type(error) not in kinds and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"{what}: {reason[:200]}") from None


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[tuple[Special, bool]]) -> None:
    """Make the library find tokens whole in any text; each with whether normalised text counts."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [
            AddedToken(
                token.text,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=normalised,
            )
            for token, normalised in tokens
        ]
    )
