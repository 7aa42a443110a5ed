"""Texts through a model with an encoder: translation, summaries, whatever it was trained for.

    translator = Translator(engine, program, config, tokenizer)
    for found in translator.run(["A text.", "Another."], width=4):
        print(found.text, found.score)

All texts are searched at once, as far as the engine has room. What is longer than the model takes
is cut where sentences end, and the parts' results are joined; a sentence that is too long by itself
is cut between words. Settings that nobody names are those of the model's files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lmclock.config import ModelConfig
from lmclock.config.generation import Searching
from lmclock.engine import Beams, Engine, Event, Request
from lmclock.errors import LmclockError, OptionError, UnsupportedError, choices
from lmclock.program import Program
from lmclock.text import Tokeniser

# transformers' words for our settings, as far as they differ.
ALIASES = {
    "beams": "width", "num_beams": "width", "num_return_sequences": "results",
    "no_repeat_ngram_size": "no_repeat_ngram", "repetition_penalty": "repetition",
    "forced_bos_token_id": "first", "forced_eos_token_id": "final", "bad_words_ids": "banned",
}  # fmt: skip
# Behind a sign that ends a sentence, and what closes quotes; Chinese writes no space there.
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'»”’)\]]*\s+|(?<=[。！？])[”’」』）]*\s*|\n+")


@dataclass(frozen=True)
class Translation:
    """The best result of one text. `alternatives` are all results that were asked for, the best
    first; of a text in `segments` parts, `score` is the mean, and the k-th is made of the k-th of
    each.
    """

    text: str
    score: float
    finish: str
    source_tokens: int
    tokens: int
    segments: int
    alternatives: tuple[tuple[str, float], ...]


class Translator:
    """See the module's header. UnsupportedError for a model without an encoder and a decoder."""

    def __init__(
        self, engine: Engine, program: Program, config: ModelConfig, tokenizer: Tokeniser
    ) -> None:
        if not engine.facts.encodes or config.start is None:
            why = "no encoder" if not engine.facts.encodes else "no token that begins a target"
            raise UnsupportedError(f"model {program.name!r} has {why}, so it does not translate")
        self.engine, self.config, self.tokenizer = engine, config, tokenizer
        self.start = config.start
        facts, frozen = engine.facts, engine.cache.sources.size * engine.cache.page_size
        limits = (facts.source_context, engine.capacity.rows, frozen)
        self.longest = min(limit for limit in limits if limit)

    def beams(self, options: dict[str, Any]) -> Beams:
        """The settings of a search: `options`, other tools' names included, else the model's."""
        names = {f.name for f in fields(Beams)}
        named = {ALIASES.get(name, name): value for name, value in options.items()}
        for name in named:
            if name not in names:
                known = choices(sorted({*names, *ALIASES, "max_new_tokens", "prefix"}))
                raise OptionError(f"option {name!r} is unknown; valid: {known}")
        own = {f.name: getattr(self.config.generation, f.name) for f in fields(Searching)}
        if isinstance(named.get("final"), int):
            named["final"] = (named["final"],)
        if "banned" in named:
            named["banned"] = tuple(tuple(run) for run in named["banned"])
        return Beams(**own | {k: v for k, v in named.items() if v is not None})

    def limit(self, max_new_tokens: int | None) -> int | None:
        """Most new tokens: as asked, else the model's, else as many as there is room for."""
        g = self.config.generation
        if max_new_tokens is None:
            max_new_tokens = g.max_new_tokens or (g.longest - 1 if g.longest > 1 else None)
            if max_new_tokens is None:
                return None
            rooms = [self.engine.facts.context, self.engine.cache.positions]
            most = min((room for room in rooms if room), default=max_new_tokens + 1)
            return min(max_new_tokens, most - 1)
        return max_new_tokens

    def run(
        self,
        texts: Sequence[str],
        *,
        prefix: str = "",
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> list[Translation]:
        """The result of each text, `prefix` put before each of its parts (T5's task, or a language
        such as >>fr<<); options are those of engine.Beams, or transformers' names for them.
        """
        beams, most = self.beams(options), self.limit(max_new_tokens)
        parts = [self.parts(text, prefix) for text in texts]
        requests = [
            Request([self.start], most, source=ids, beams=beams, stop_ids=self.tokenizer.eos_ids)
            for text in parts
            for ids, _ in text
        ]
        for request in requests:
            self.engine.check(request)
        numbers = [self.engine.add(request) for request in requests]
        last: dict[int, Event] = {}
        while not last.keys() >= set(numbers):
            self.engine.step()
            last |= {event.sequence: event for event in self.engine.events if event.finish}
        found, at = [], 0
        for text in parts:
            events = [last[number] for number in numbers[at : at + len(text)]]
            at += len(text)
            found.append(self._joined(text, events))
        return found

    def _joined(self, parts: list[tuple[list[int], str]], events: list[Event]) -> Translation:
        for event in events:
            if event.finish == "error":
                raise LmclockError(event.message)
        alternatives = []
        for k in range(min(len(event.results) for event in events)):
            results = [event.results[k] for event in events]
            texts = [self.tokenizer.decode(result.tokens) for result in results]
            text = "".join(t + gap for t, (_, gap) in zip(texts, parts, strict=True))
            score = sum(result.score for result in results) / len(results)
            alternatives.append((text, score))
        finish = "stop" if all(event.finish == "stop" for event in events) else "length"
        text, score = alternatives[0] if alternatives else ("", 0.0)
        return Translation(
            text, score, finish, sum(len(ids) for ids, _ in parts),
            sum(len(event.tokens) for event in events), len(parts), tuple(alternatives),
        )  # fmt: skip

    def parts(self, text: str, prefix: str = "") -> list[tuple[list[int], str]]:
        """(token ids, what stands behind) of each part of a text that the model takes at once."""
        whole = self._ids(prefix + text)
        if len(whole) <= self.longest:
            return [(whole, "")]
        found: list[tuple[list[int], str]] = []
        held = gap = ""
        for piece, behind in _sentences(text):
            joined = f"{held}{gap}{piece}" if held else piece
            if held and len(self._ids(prefix + joined)) > self.longest:
                found += self._cut(prefix, held, gap)
                joined = piece
            held, gap = joined, behind
        return [*found, *self._cut(prefix, held, gap)]

    def _cut(self, prefix: str, text: str, gap: str) -> list[tuple[list[int], str]]:
        """A part that fits, or halves of it, cut between words where there are some."""
        ids = self._ids(prefix + text)
        if len(ids) <= self.longest:
            return [(ids, gap)]
        if len(text) < 2:
            raise OptionError(
                f"{prefix + text!r:.60} has {len(ids)} tokens, and the model takes {self.longest}"
            )
        middle = len(text) // 2
        spaces = [hit.start() for hit in re.finditer(r"\s", text[1:-1])]
        at = min((n + 1 for n in spaces), key=lambda n: abs(n - middle), default=middle)
        between = " " if spaces else ""
        first, second = text[:at].rstrip(), text[at:].lstrip()
        return [*self._cut(prefix, first, between), *self._cut(prefix, second, gap)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


def _sentences(text: str) -> list[tuple[str, str]]:
    """(sentence, white space behind it) of a text."""
    found, begin = [], 0
    for hit in _SENTENCE.finditer(text):
        gap = re.search(r"\s*$", hit[0])
        assert gap is not None
        end = hit.end() - len(gap[0])
        if end > begin:
            found.append((text[begin:end], gap[0]))
            begin = hit.end()
    return [*found, (text[begin:], "")] if text[begin:] else found


def source_request(config: ModelConfig, request: Request) -> Request:
    """The request with its prompt as the source, for a reply sampled token by token."""
    if config.start is None:
        raise UnsupportedError(f"model {config.name!r} does not say which token begins a target")
    return replace(request, prompt=[config.start], source=request.prompt)
