"""Text that arrives token by token: the same text as at once, whole characters, no leaked stops."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import TEXT, gguf_metadata, sentencepiece_metadata, trained

from lmclock.errors import OptionError
from lmclock.text import IncrementalDetokeniser, StopStrings, Tokeniser, from_gguf


@cache
def tokeniser(kind: str) -> Tokeniser:
    if kind == "bytes":
        return from_gguf(gguf_metadata(trained("gpt-2"), "gpt-2"))
    return from_gguf(sentencepiece_metadata(kind == "spaced")[1])


KINDS = pytest.mark.parametrize("kind", ["bytes", "spaced", "bare"])


@KINDS
@settings(max_examples=100)
@given(data=st.data(), skip=st.booleans(), continued=st.booleans())
def test_any_ids_stream_to_what_they_decode_to(
    kind: str, data: st.DataObject, skip: bool, continued: bool
) -> None:
    tokens = tokeniser(kind)
    ids = data.draw(st.lists(st.integers(0, tokens.vocab_size - 1), max_size=40))
    stream = tokens.stream(skip_special=skip, continued=continued)
    pieces = [stream.push(token) for token in ids]
    text = "".join(pieces) + stream.flush()
    assert text == tokens.decode(ids, skip_special=skip, continued=continued)


@KINDS
@settings(max_examples=100)
@given(text=TEXT)
def test_a_text_streams_in_whole_characters(kind: str, text: str) -> None:
    tokens = tokeniser(kind)
    text = text.replace("\ufffd", "")
    stream = tokens.stream()
    shown = ""
    for token in tokens.encode(text, add_bos=False):
        piece = stream.push(token)
        assert "\ufffd" not in piece
        shown += piece
        assert text.replace("\u2581", " ").startswith(shown) or kind == "bytes"
        assert text.startswith(shown) or kind != "bytes"
    assert stream.flush() == ""
    assert shown == (text if kind == "bytes" else text.replace("\u2581", " "))


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=10))
def test_bytes_that_are_no_text_show_as_python_shows_them(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[a:b] for a, b in pairwise(edges)]
    stream = IncrementalDetokeniser(lambda at: parts[at])
    text = "".join(stream.push(at) for at in range(len(parts))) + stream.flush()
    assert text == data.decode("utf-8", "replace")


def test_an_unfinished_character_waits_and_then_shows() -> None:
    parts = [b"\xf0\x9f", b"\x91", b"\xa9!", b"\xe4"]
    stream = IncrementalDetokeniser(lambda at: parts[at])
    assert [stream.push(at) for at in range(4)] == ["", "", "👩!", ""]
    assert stream.flush() == "\ufffd"


def test_one_leading_space_is_dropped_unless_the_text_goes_on() -> None:
    tokens = tokeniser("spaced")
    ids = tokens.encode("  the", add_bos=False)
    assert tokens.decode(ids) == "  the"
    assert tokens.decode(ids, continued=True) == "   the"
    assert tokens.decode([1, *ids]) == "  the"
    assert tokens.decode([1, *ids], skip_special=False) == "<s>   the"


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Letter by letter: (text before the first complete stop, that stop)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


LETTERS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=4)


@settings(max_examples=300)
@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=10))
def test_stop_strings_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, stop = naive(text, stops)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher, shown, stopped = StopStrings(stops), "", False
    for begin, end in pairwise(edges):
        piece, stopped = matcher.feed(text[begin:end])
        shown += piece
        # Nothing is shown that a stop string may claim, and nothing else is held back.
        kept = max(
            (n for s in stops for n in range(len(s)) if text[:end].endswith(s[:n])), default=0
        )
        assert stopped or shown == text[: end - kept]
    assert (matcher.stopped, stopped) == (stop, stop is not None)
    assert shown + matcher.flush() == expected


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopStrings("END")
    assert matcher.feed("so E") == ("so ", False)
    assert matcher.feed("ND of it") == ("", True)
    assert matcher.feed("more") == ("", True)
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], ["x"] * 300, ["y" * 5000], [3], [None]])
def test_stop_strings_that_cannot_be(stops: list[str]) -> None:
    with pytest.raises(OptionError, match="stop string"):
        StopStrings(stops)


def test_a_hostile_stop_string_is_linear() -> None:
    matcher = StopStrings(["a" * 4000 + "b"] * 3)
    shown = "".join(matcher.feed("a")[0] for _ in range(20_000)) + matcher.flush()
    assert shown == "a" * 20_000
