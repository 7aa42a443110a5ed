"""The Python API: a model loaded on a machine, ready to generate.

    import lmclock
    m = lmclock.load("smollm2")
    r = m.generate("The capital of France is", max_new_tokens=8)
    r.text, r.clock
    for piece in m.stream("Once upon a time"): print(piece, end="")

`m.program`, `m.tokenizer` and `m.engine` are there to look at. One model belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lmclock.assemble import Assembled, assemble
from lmclock.clock import Clock
from lmclock.cycle import Cycle
from lmclock.engine import Engine, Request, Sampling, capacity_for
from lmclock.errors import OptionError, choices
from lmclock.files import GGUF
from lmclock.files.pull import pull
from lmclock.machines import Machine, create
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.text import StopStrings, Tokeniser, from_folder, from_gguf

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
DEFAULT_CONTEXT = 8192  # cached positions when neither caller nor model asks for fewer
# What callers may write for each field of Sampling: our own name, and the names of other tools.
ALIASES = {
    "repetition_penalty": "repetition",
    "repeat_penalty": "repetition",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
}


def load(
    model: str = "smollm2",
    *,
    machine: str = "native",
    level: int = 2,
    threads: int | None = None,
    path: str | None = None,
    context: int = 0,
    sequences: int = 1,
    chunk: int = 512,
    cache: str = "f16",
    picks: int | None = None,
    keep: tuple[str, ...] = (),
    invariant: bool = False,
) -> Model:
    """A model ready to generate.

    model      catalogue name, file or folder (see `lmclock pull`); a missing one is fetched
    machine    native, or array (the reference)
    level      optimisation: 0 as assembled, 1 fused, 2 fused and activations rounded
    threads    of the native machine; path: its SIMD path (default: the widest found)
    context    most positions of a sequence; 0: the model's, at most DEFAULT_CONTEXT
    sequences  sequences that may run at once; chunk: most prompt rows of one of them in a cycle
    cache      number format of keys and values: f32, f16 or q8_0
    keep       values that stay readable through `m.machine.read` after their last use
    """
    if context < 0:
        raise OptionError(f"context={context} is out of range; valid: 0 (the model's) or more")
    if sequences < 1:
        raise OptionError(f"sequences={sequences} is out of range; valid: 1 or more")
    assembled = assemble(pull(model), cache)
    most = assembled.program.context or DEFAULT_CONTEXT
    if context > most:
        raise OptionError(f"context={context} is more than the model was made for, {most}")
    program = optimise(assembled.program, level, keep)
    options = {"threads": threads, "path": path} if machine == "native" else {}
    maker = create(machine, **options)
    capacity = capacity_for(
        program,
        sequences=sequences,
        tokens=sequences * (context or min(most, DEFAULT_CONTEXT)),
        chunk=chunk,
        picks=picks,
    )
    maker.load(program, assembled.weights, capacity, keep)
    return Model(assembled, program, maker, capacity, chunk, invariant)


@dataclass(frozen=True, eq=False)
class Reply:
    """A finished continuation. `finish` is stop, length or cancelled; `cycles` are what it took."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    model: Model = field(repr=False)
    cycles: tuple[Cycle, ...] = field(repr=False)

    @cached_property
    def clock(self) -> ReplyClock:
        """What the clock says of this reply; calibrates the machine the first time it is asked."""
        return ReplyClock(self.model.clock(self.cycles), self.model.machine)


class ReplyClock:
    """Accounts of a reply's cycles; prints as one line, `summary` holds every number."""

    def __init__(self, clock: Clock, machine: Machine) -> None:
        self.clock, self.machine = clock, machine

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Numbers by kind of cycle, as `lmclock stat --json` prints them."""
        from lmclock.reports.summary import summary

        return summary(self.clock, self.machine.traits)

    def __str__(self) -> str:
        from lmclock.reports.summary import one_line

        return one_line(self.clock)

    __repr__ = __str__


class Model:
    """A program on a machine with an engine and a tokenizer; made by `load`."""

    def __init__(
        self,
        assembled: Assembled,
        program: Program,
        machine: Machine,
        capacity: Any,
        chunk: int = 512,
        invariant: bool = False,
    ) -> None:
        self.assembled, self.program, self.machine = assembled, program, machine
        self.config = assembled.config
        self.recorded: list[Cycle] = []
        # The tokenizer's own end tokens are joined lazily, in `request`: token ids need none.
        self.engine = Engine(
            machine, program, capacity=capacity, eos=frozenset(self.config.eos),
            chunk=chunk, invariant=invariant, on_cycle=self.recorded.append,
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokeniser:
        return tokenizer_of(self.assembled)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of chat messages (through the model's template), or ids as given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            from lmclock.text import encode_chat

            return encode_chat(self.tokenizer, list(prompt))  # type: ignore[arg-type]
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """The whole continuation; options as for `stream`."""
        text = TextStream(self, prompt, **options)
        for _ in text:
            pass
        return text.reply

    def stream(self, prompt: Prompt, **options: Any) -> TextStream:
        """An iterator of text pieces; its `reply` is there when it has ended.

        Options: max_new_tokens, stop (a string or several), ignore_eos, and the settings of
        Sampling: temperature (0: greedy), top_k, top_p, min_p, repetition_penalty,
        presence_penalty, frequency_penalty, seed, logit_bias.
        """
        return TextStream(self, prompt, **options)

    def clock(self, cycles: Iterable[Cycle]) -> Clock:
        """The clock's accounts of some cycles of this model, held against the machine's limits."""
        from lmclock.hardware.calibrate import limits

        traits = self.machine.traits
        found = limits(traits.threads, getattr(self.machine, "path", None))
        clock = Clock(self.program, traits.threads, traits.tick_rate, found)
        for cycle in cycles:
            clock.add(cycle)
        return clock

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class TextStream:
    """The text of one sequence, piece by piece. Leaving the loop early cancels the sequence."""

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop: str | Iterable[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> None:
        self.model = model
        ids = model.encode(prompt)
        self.prompt_tokens = len(ids)
        self.tokens: list[int] = []
        self.finish = ""
        self.text = ""
        self._pieces: list[str] = []
        self._decoder = model.tokenizer.stream(continued=True)
        self._stops = StopStrings((stop,) if isinstance(stop, str) else stop)
        self._first = len(model.recorded)
        settings, stops = sampling_of(sampling), model.tokenizer.eos_ids
        request = Request(ids, max_new_tokens, settings, stops, ignore_eos, sink=self._take)
        self.number = model.engine.add(request)

    def _take(self, token: int) -> bool:
        """The engine's sink: one new token; False when a stop string is complete."""
        self.tokens.append(token)
        piece, stopped = self._stops.feed(self._decoder.push(token))
        self._pieces.append(piece)
        if stopped:
            self.finish = "stop"
        return not stopped

    def __iter__(self) -> Iterator[str]:
        engine = self.model.engine
        try:
            while not self._ended():
                engine.step()
                for event in engine.events:
                    if event.sequence == self.number and event.finish:
                        self._end(event.finish)
                yield from self._drain()
        finally:
            if not self._ended():
                engine.cancel(self.number)
                engine.step()
                self._end("cancelled")
                self._drain()

    def _ended(self) -> bool:
        return self.number not in self.model.engine.live and bool(self.finish)

    def _end(self, reason: str) -> None:
        if self.finish != "stop":
            tail, _ = self._stops.feed(self._decoder.flush())
            self._pieces += [tail, self._stops.flush()]
        self.finish = self.finish or reason

    def _drain(self) -> list[str]:
        pieces = [piece for piece in self._pieces if piece]
        self._pieces.clear()
        self.text += "".join(pieces)
        return pieces

    @property
    def reply(self) -> Reply:
        """What has come so far, complete once the iteration has ended."""
        cycles = tuple(self.model.recorded[self._first :])
        return Reply(
            self.text, tuple(self.tokens), self.finish, self.prompt_tokens, self.model, cycles
        )


def tokenizer_of(assembled: Assembled) -> Tokeniser:
    """The tokenizer in a GGUF file's metadata, or in the files beside safetensors."""
    reader = assembled.reader
    if isinstance(reader, GGUF):
        return from_gguf(reader.metadata)
    return from_folder(Path(reader.path).parent)


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Sampling settings from keyword options, other tools' names included."""
    named = {ALIASES.get(name, name): value for name, value in options.items()}
    valid = set(Sampling.__dataclass_fields__)
    for name in named:
        if name not in valid:
            raise OptionError(f"option {name!r} is unknown; valid: {choices(sorted(valid))}")
    return Sampling(**named)
