"""Tokens to text as they arrive: whole characters only, and nothing a stop string may yet claim.

    stream = tokeniser.stream()
    stops = StopStrings(["\\nUser:"])
    for token in tokens:
        text, stopped = stops.feed(stream.push(token))
    text, stopped = stops.feed(stream.flush())
    text += stops.flush()

Whatever the tokens, the pieces joined are the text that `Tokeniser.decode` gives for all of them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

from lmclock.errors import OptionError

MAX_STOPS = 256
MAX_STOP_LENGTH = 4096


class IncrementalDetokeniser:
    """One sequence's bytes on their way to text.

    `bytes_of` maps a token id to its bytes (b"" for one not shown). `strip_space` drops one space
    at the very beginning, which SentencePiece vocabularies put before the first word of a text.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], strip_space: bool = False) -> None:
        self._bytes_of = bytes_of
        self._strip_space = strip_space
        # A byte that can never become a character is shown as U+FFFD, as `bytes.decode` shows it.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became certain with this token: "" while a character is incomplete."""
        data = self._bytes_of(token)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string in text that comes in pieces; holds back only its possible start.

    The stop string that is complete first wins, however the text is cut into pieces; of two that
    end together, the longer. Text from its first character on is never given out.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if len(self._stops) > MAX_STOPS:
            raise OptionError(
                f"{len(self._stops)} stop strings are too many; valid: at most {MAX_STOPS}"
            )
        for stop in self._stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise OptionError(
                    f"stop string {str(stop)[:40]!r} is not valid; "
                    f"valid: text of 1 to {MAX_STOP_LENGTH} characters"
                )
        self._borders = tuple(_borders(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.stopped: str | None = None  # the stop string that was found

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string is complete); nothing after a stop."""
        if self.stopped is not None:
            return "", True
        held = self._held + piece
        for at, character in enumerate(piece, len(self._held)):
            found = self._advance(character)
            if found:
                self.stopped = found
                self._held = ""
                return held[: at + 1 - len(found)], True
        keep = len(held) - max(self._matched, default=0)
        self._held = held[keep:]
        return held[:keep], False

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str:
        """One Knuth-Morris-Pratt step of every stop string; the longest now complete, or ""."""
        longest = ""
        for which, stop in enumerate(self._stops):
            borders, matched = self._borders[which], self._matched[which]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop) > len(longest):
                longest = stop
            self._matched[which] = matched
        return longest


def _borders(text: str) -> list[int]:
    """Per prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for at in range(1, len(text)):
        while length and text[at] != text[length]:
            length = borders[length - 1]
        length += text[at] == text[length]
        borders[at] = length
    return borders
