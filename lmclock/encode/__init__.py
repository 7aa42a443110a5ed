"""Encoders over texts: `Encoder` runs many of them through an engine, embed.py and classify.py say
what becomes of their rows.

    encoder = Encoder(engine, program, config, tokenizer)
    rows = encoder.run([encoder.marked("a text")])       # what the model's head gives

Texts enter the longest first, so that those of one cycle are alike; a cycle holds the rows of many
texts one after the other, without padding. What a text gets does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lmclock.config import ModelConfig
from lmclock.config.encoder import EncoderConfig
from lmclock.config.recurrent import LstmConfig
from lmclock.cycle import Cycles
from lmclock.engine import Engine, Event, Request
from lmclock.errors import LmclockError, OptionError, UnsupportedError, choices
from lmclock.program import Program
from lmclock.text import Marked, Tokeniser
from lmclock.text.segments import Span, cut

# What models with each head are for, in words of the Python API and the command line.
USES = {
    "embed": "embed",
    "sequence": "classify",
    "next": "classify",
    "token": "classify",
    "answer": "classify (with a question)",
    "masked": "diff, disasm and stat only",
}


@dataclass(frozen=True)
class Part:
    """A segment of a text: `span` are its tokens, `characters` what each of them covers."""

    marked: Marked
    span: Span
    characters: list[Span]


@dataclass(eq=False)
class Watch:
    """Keeps the cycles it is told of."""

    cycles: Cycles = field(default_factory=Cycles)


class Encoder:
    """An engine with an encoder's program, and what its texts need. UnsupportedError for a model of
    another kind.
    """

    def __init__(
        self, engine: Engine, program: Program, config: ModelConfig, tokenizer: Tokeniser
    ) -> None:
        if not isinstance(config, EncoderConfig | LstmConfig) or not config.head:
            raise UnsupportedError(
                f"model {program.name!r} is no encoder, but generates text; valid: generate"
            )
        self.engine, self.config, self.tokenizer = engine, config, tokenizer
        self.name = program.name
        (self.value,) = program.section("encode").instructions[-1].outs
        self.with_types = any(i.name == "types" for i in engine.facts.inputs)
        self.width = program.types("encode")[self.value].width
        rows = engine.capacity.rows
        context = engine.facts.context or rows
        self.longest = min(config.sentence.longest or rows, context, rows)

    @property
    def use(self) -> str:
        """What the model's head is for."""
        return USES[self.config.head]

    def need(self, *heads: str) -> None:
        """UnsupportedError unless the model has one of these heads."""
        if self.config.head not in heads:
            wanted = choices({USES[head].split(" ")[0]: None for head in heads})
            raise UnsupportedError(f"model {self.name!r} cannot {wanted}; valid: {self.use}")

    def parts(
        self, text: str, before: Sequence[int] | None = None, whole: bool = False
    ) -> list[Part]:
        """The text as the model takes it, in segments where it is too long: behind the ids `before`
        (a question), or alone. `whole` cuts off what is too long instead.
        """
        ids, characters = self.tokenizer.spans(text)
        around = self.tokenizer.around
        extra = len(around(()).ids if before is None else around(before, ()).ids)
        room = self.longest - extra
        if room < 1:
            raise OptionError(
                f"{extra} tokens stand around a text, and the model takes {self.longest}"
            )
        spans = [(0, min(room, len(ids)))] if whole else cut(len(ids), room)
        found = []
        for first, end in spans:
            piece = ids[first:end]
            marked = around(piece) if before is None else around(before, piece)
            found.append(Part(marked, (first, end), characters[first:end]))
        return found

    def run(self, texts: Sequence[Marked]) -> list[np.ndarray]:
        """Per text, the rows of the program's last value: one of the text, or one per token."""
        found: list[np.ndarray] = [np.empty(0)] * len(texts)
        failed: list[Event] = []

        def heard(event: Event) -> None:
            if event.finish == "error":
                failed.append(event)

        for at in sorted(range(len(texts)), key=lambda at: -len(texts[at].ids)):
            text = texts[at]

            def receive(_: int, rows: np.ndarray, at: int = at) -> None:
                found[at] = rows.copy()  # not a view that keeps the rows of a whole cycle

            inputs = {}
            if self.with_types and self.config.types > 1 and any(text.types):
                inputs["types"] = np.array(text.types, np.int32)[:, None]
            self.engine.add(
                Request(text.ids, 0, inputs=inputs, want={self.value: receive}, ended=heard)
            )
        while self.engine.busy:
            self.engine.step()
        if failed:
            raise LmclockError(failed[0].message)
        return found
