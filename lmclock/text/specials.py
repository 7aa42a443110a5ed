"""Special tokens and trust: which text may become a control token, and which may only spell one.

`<|im_start|>` written by a chat template opens a turn; the same letters from a user are letters. A
`Segment` carries text with that trust, `Specials.split` finds the special tokens of trusted text,
and `Specials.exposed` names the characters of a user's text that could help to spell one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segment:
    """A stretch of text; special tokens are recognised only inside one trusted segment."""

    text: str
    trusted: bool


@dataclass(frozen=True)
class Special:
    """One special token. `lstrip` and `rstrip` swallow the spaces beside it; `single_word` asks for
    no letter, digit or underscore beside it."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Specials:
    """The special tokens of one vocabulary, and the names (`bos_token`, ...) templates use.

    Lookup is one character class and a few set lookups per candidate, so a million tokens cost no
    more to search for than ten, and no pattern of the file is ever compiled.
    """

    def __init__(self, tokens: Iterable[Special], named: Mapping[str, str] | None = None) -> None:
        tokens = tuple(tokens)
        self.by_text: dict[str, Special] = {token.text: token for token in tokens if token.text}
        self.ids: frozenset[int] = frozenset(token.id for token in tokens)
        self.named: dict[str, str] = dict(named or {})
        lengths: dict[str, set[int]] = {}
        for text in self.by_text:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._lasts = {text[-1] for text in self.by_text}
        self._longest = max((found[0] for found in self._lengths.values()), default=0)
        firsts = "".join(re.escape(first) for first in self._lengths)
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str) -> Iterator[str | Special]:
        """The plain text and special tokens of trusted text, in order; leftmost, then longest."""
        begin = 0
        for at in self._candidates(text):
            token = self._match(text, at) if at >= begin else None
            if token is not None:
                if at > begin:
                    yield text[begin:at]
                yield token
                begin = at + len(token.text)
        if begin < len(text):
            yield text[begin:]

    def exposed(self, text: str) -> list[int]:
        """Positions of characters to set apart so that `text` cannot take part in a special token.

        Every special token that lies in the text, begins in it and runs off its end, or begins
        before it and ends inside holds one of them, whatever stands around the text and whether or
        not the spaces around it are trimmed. A text that is the middle of a token is not covered:
        templates that write `<|` + role + `|>` mean just that.
        """
        found = {at for at in self._candidates(text) if self._match(text, at, words=False)}
        body = text.strip()
        begin = text.index(body)
        for start in {0, begin}:
            # Where a special token could end: nearly nowhere in an ordinary text.
            ends = enumerate(text[start : start + self._longest - 1], 1)
            sizes = [size for size, character in ends if character in self._lasts]
            heads = (text[start : start + size] for size in sizes)
            if any(_begins_one(self._backward, head[::-1]) for head in heads):
                found.add(start)
        for stop in {len(text), begin + len(body)}:
            starts = range(max(stop - self._longest + 1, 0), stop)
            candidates = (at for at in starts if text[at] in self._lengths)
            found.update(at for at in candidates if _begins_one(self._forward, text[at:stop]))
        return sorted(found)

    def _candidates(self, text: str) -> Iterator[int]:
        return (hit.start() for hit in self._first.finditer(text)) if self._first else iter(())

    def _match(self, text: str, at: int, words: bool = True) -> Special | None:
        for length in self._lengths[text[at]]:
            token = self.by_text.get(text[at : at + length])
            if token is not None and not (
                words and token.single_word and _in_word(text, at, length)
            ):
                return token
        return None

    @cached_property
    def _forward(self) -> list[str]:
        return sorted(self.by_text)

    @cached_property
    def _backward(self) -> list[str]:
        return sorted(text[::-1] for text in self.by_text)


def _begins_one(ordered: list[str], part: str) -> bool:
    """Whether a string of the sorted list begins with `part` and goes on."""
    at = bisect_right(ordered, part)
    return at < len(ordered) and ordered[at].startswith(part)


def _in_word(text: str, at: int, length: int) -> bool:
    """Whether a letter, digit or underscore touches `text[at:at + length]`."""
    around = text[max(at - 1, 0) : at] + text[at + length : at + length + 1]
    return any(character.isalnum() or character == "_" for character in around)
