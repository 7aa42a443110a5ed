"""Byte-level BPE of short texts straight from the merges as a file lists them.

Building the library's merger takes a tenth of a second for 49k tokens, most of it for the merges. A
prompt of a few words asks for some tens of them: each is looked for in the bytes of the list, whose
order is the rank. The first text that is long, and whoever needs more than ids, has the library
built; both give the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SHORT = 32  # characters: a search takes up to 0.2 ms, and a word asks for about two a letter


class Merges(Protocol):
    """The lines `left right` of a file, first the ones to be merged first."""

    def find(self, text: str) -> int | None: ...


class Encoded:
    """Ids of a text, under the name the library gives them."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


class ShortTexts:
    """Stands in for the library's tokeniser, which `build` makes when it is needed.

    `ids` are the tokens a text may be merged into. With `whole` a word that is a token is that
    token, whatever the merges say.
    """

    def __init__(
        self, build: Callable[[], Tokenizer], words: PreTokenizer, ids: Mapping[str, int],
        hidden: Set[str], merges: Merges, whole: bool,
    ) -> None:  # fmt: skip
        self._build, self._words, self._ids, self._hidden = build, words, ids, hidden
        self._merges, self._whole = merges, whole
        self._ranks: dict[tuple[str, str], int | None] = {}

    @cached_property
    def library(self) -> Tokenizer:
        """The library's tokeniser; FileError when the merges do not fit the vocabulary."""
        return self._build()

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoded:
        """Ids of a text; there are no special tokens to add."""
        if len(text) > SHORT or "library" in self.__dict__:
            return Encoded(self.library.encode(text, add_special_tokens=False).ids)
        words = self._words.pre_tokenize_str(text)
        return Encoded([self._ids[piece] for word, _ in words for piece in self._pieces(word)])

    def token_to_id(self, piece: str) -> int | None:
        """The id of a token that is not special."""
        return self._ids[piece] if self._has(piece) else None

    def _has(self, piece: str) -> bool:
        return piece != "" and piece in self._ids and piece not in self._hidden

    def _pieces(self, word: str) -> list[str]:
        """The word's letters, those without a token left out, merged as often as it goes: each
        time the pair that stands first in the list, the leftmost of equals.
        """
        if self._whole and self._has(word):
            return [word]
        pieces = [letter for letter in word if self._has(letter)]
        while True:
            ranks = [self._rank(*pair) for pair in pairwise(pieces)]
            known = [rank for rank in ranks if rank is not None]
            if not known:
                return pieces
            at = ranks.index(min(known))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]

    def _rank(self, left: str, right: str) -> int | None:
        """Where the pair stands in the list; None when it is not to be merged."""
        pair = left, right
        if pair not in self._ranks:
            known = self._has(left + right)
            self._ranks[pair] = self._merges.find(f"{left} {right}") if known else None
        return self._ranks[pair]
