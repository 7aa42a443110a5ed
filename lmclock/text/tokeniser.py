"""Text to token ids and back, for one vocabulary. Merging is the `tokenizers` library's; the rest,
which text may become a special token above all, is decided here.

    tokeniser = from_gguf(GGUF.open(path).metadata)       # or from_folder(path)
    ids = tokeniser.encode("The capital of France is")
    tokeniser.decode(ids)

A special token that a text spells stays text unless the caller allows it: the library is never told
of special tokens, and the vocabulary it merges with does not hold them. Encoding takes time in
proportion to the text, about half a second a megabyte, whatever the text (one letter repeated too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lmclock.errors import OptionError
from lmclock.text.detokenise import IncrementalDetokeniser
from lmclock.text.short_texts import ShortTexts
from lmclock.text.specials import Segment, Special
from lmclock.text.template import Template
from lmclock.text.vocabulary import SPELLINGS, Vocabulary, library_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class _Run:
    """The plain text since the last special token, and what that token left to do to it."""

    texts: list[str] = field(default_factory=list)
    first: bool = True
    lstrip: bool = False


@dataclass(frozen=True)
class Marked:
    """Token ids and token types of one text or a pair; `first` and `second` say where they begin
    (`second` is the end where there is none).
    """

    ids: list[int]
    types: list[int]
    first: int
    second: int


class Tokeniser:
    """One vocabulary with the library tokenisers that merge it.

    `first` encodes text at the start of a sequence and `later` text after a special token; they
    differ where only the first word of a text gets a space before it.
    """

    def __init__(
        self, vocabulary: Vocabulary, first: Tokenizer | ShortTexts, later: Tokenizer | ShortTexts
    ) -> None:
        assert vocabulary.spelling in SPELLINGS
        self._vocabulary = vocabulary
        self._first, self._later = first, later
        self._bytes: dict[int, bytes] = {}
        self.specials = vocabulary.specials
        self.special_ids: frozenset[int] = vocabulary.specials.ids
        self.vocab_size: int = len(vocabulary.pieces)
        self.bos_id: int | None = vocabulary.bos_id
        self.eos_ids: frozenset[int] = vocabulary.eos_ids
        self.chat_template: str | None = vocabulary.chat_template

    def encode(
        self, text: str, allow_special: bool = False, add_bos: bool | None = None
    ) -> list[int]:
        """Token ids of a text; special tokens spelled in it stay text unless allowed.

        `add_bos` None adds what the file says belongs around a text, True adds at least the token
        that begins one, False adds nothing. OptionError for text that is not Unicode.
        """
        if not isinstance(text, str):
            raise OptionError(f"a prompt is a {type(text).__name__}; valid: text")
        return self.encode_segments((Segment(text, allow_special),), add_bos)

    def encode_segments(
        self, segments: Iterable[Segment], add_bos: bool | None = None
    ) -> list[int]:
        """Token ids of segments as one text: words may span segments, special tokens may not."""
        prefix, suffix = self._around(add_bos)
        ids, run = list(prefix), _Run()
        for segment in segments:
            for part in self.specials.split(segment.text) if segment.trusted else (segment.text,):
                if isinstance(part, str):
                    run.texts.append(part)
                else:
                    self._close(run, ids, part)
                    ids.append(part.id)
        self._close(run, ids, None)
        return [*ids, *suffix]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text with nothing around it, and which characters each one covers."""
        if not isinstance(text, str):
            raise OptionError(f"a text is a {type(text).__name__}; valid: text")
        with library_errors("this text cannot be encoded", OptionError):
            first = self._first
            library = first.library if isinstance(first, ShortTexts) else first
            found = library.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def around(self, first: Sequence[int], second: Sequence[int] | None = None) -> Marked:
        """Token ids of one text or a pair, from `spans`, with what the file wants around them."""
        if second is None:
            prefix, suffix = self._around(None)
            ids = [*prefix, *first, *suffix]
            return Marked(ids, [0] * len(ids), len(prefix), len(ids))
        pair = self._vocabulary.pair
        if pair is None:
            raise OptionError("this model's tokeniser takes single texts; valid: no second text")
        a, b = ([(token, kind) for token in part]
                for part, kind in zip((first, second), pair.types, strict=True))  # fmt: skip
        marks = [*pair.before, *a, *pair.between, *b, *pair.after]
        begin = len(pair.before), len(pair.before) + len(a) + len(pair.between)
        return Marked([token for token, _ in marks], [kind for _, kind in marks], *begin)

    def decode(self, ids: Iterable[int], skip_special: bool = True, continued: bool = False) -> str:
        """The text of token ids; U+FFFD for bytes that are no character.

        `continued` keeps the space a vocabulary puts before the first word of a text, for ids that
        continue one. OptionError for an id outside the vocabulary.
        """
        data = b"".join(map(self._shown(skip_special), ids))
        if self._vocabulary.strip_space and not continued:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def stream(self, skip_special: bool = True, continued: bool = False) -> IncrementalDetokeniser:
        """A detokeniser for ids that arrive one by one; its pieces joined equal `decode`."""
        strip = self._vocabulary.strip_space and not continued
        return IncrementalDetokeniser(self._shown(skip_special), strip)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for, a special token's own spelling included."""
        known = self._bytes.get(token)
        if known is None:
            if not 0 <= token < self.vocab_size:
                raise OptionError(
                    f"token id {token} is outside the vocabulary; valid: 0 to {self.vocab_size - 1}"
                )
            known = self._bytes[token] = self._vocabulary.bytes_of(token)
        return known

    def token_id(self, piece: str) -> int | None:
        """The id of a token as the file spells it, special or not; None if there is none."""
        special = self.specials.by_text.get(piece)
        return special.id if special else self._first.token_to_id(piece)

    @cached_property
    def template(self) -> Template:
        """The model's chat template, or the default its vocabulary calls for."""
        return Template(self.chat_template, self.specials)

    def _around(self, add_bos: bool | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prefix, suffix = self._vocabulary.prefix, self._vocabulary.suffix
        if add_bos is None:
            return prefix, suffix
        if not add_bos:
            return (), ()
        if not prefix and self.bos_id is None:
            raise OptionError("add_bos is set, but this vocabulary has no token that begins a text")
        return prefix or (self.bos_id or 0,), suffix

    def _close(self, run: _Run, ids: list[int], before: Special | None) -> None:
        """Encode the plain text gathered so far, which `before` (or the end) follows."""
        text = "".join(run.texts)
        text = text.lstrip() if run.lstrip else text
        text = text.rstrip() if before and before.lstrip else text
        if text:
            tokenizer = self._first if run.first else self._later
            with library_errors("this text cannot be encoded", OptionError):
                ids += tokenizer.encode(text, add_special_tokens=False).ids
        run.texts.clear()
        run.first, run.lstrip = False, before is not None and before.rstrip

    def _shown(self, skip_special: bool) -> Callable[[int], bytes]:
        hidden = self.special_ids if skip_special else frozenset()
        return lambda token: b"" if token in hidden else self.token_bytes(token)


def encode_chat(
    tokeniser: Tokeniser,
    messages: Sequence[Mapping[str, Any]],
    template: Template | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation; `options` are those of `Template.render`.

    Without `template` the model's own is used. A template of the model writes the token that begins
    a text itself where it wants one; before the default ones it is added as before any text.
    """
    template = template or tokeniser.template
    segments = template.render(messages, **options)
    return tokeniser.encode_segments(segments, add_bos=False if template.origin == "file" else None)
