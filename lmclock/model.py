"""The Python API: a model loaded on a machine, ready to generate.

    import lmclock
    m = lmclock.load("smollm2")
    r = m.generate("The capital of France is", max_new_tokens=8)
    r.text, r.clock
    for piece in m.stream("Once upon a time"): print(piece, end="")
    lmclock.load("minilm").embed(["a text", "another"])        # encoders: embed, classify
    lmclock.load("folder").translate(["Ein Text."])            # encoder-decoders: translate

`m.program`, `m.tokenizer` and `m.engine` are there to look at. One model belongs to one thread, in
which several of its streams may be read by turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmclock.assemble import Assembled
from lmclock.capacity import DEFAULT_CONTEXT, capacity_of
from lmclock.cycle import Cycle, Cycles
from lmclock.engine import Engine, Event, Request
from lmclock.engine.burst import BURST, LONGEST
from lmclock.engine.sampling import sampling_of
from lmclock.errors import LmclockError, OptionError, UnsupportedError
from lmclock.files import stored_bytes
from lmclock.files.pull import pull
from lmclock.machines import Capacity, Machine, create
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.reading import pooled, read, tokenizer_of
from lmclock.reports.reply import Reply
from lmclock.text import StopStrings, Tokeniser, encode_chat

if TYPE_CHECKING:
    from lmclock.clock import Clock
    from lmclock.encode import Encoder, Watch
    from lmclock.encode.classify import Classes
    from lmclock.hardware.limits import Limits
    from lmclock.translate import Translation, Translator

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
FRAME = 1 / 60  # seconds: text that comes together within a frame of a screen looks steady
LISTING = ".lmc"  # ending of a program written by hand


def load(
    model: str = "smollm2",
    *,
    machine: str = "native",
    level: int = 2,
    threads: int | None = None,
    path: str | None = None,
    context: int = 0,
    sequences: int | None = None,
    chunk: int = 512,
    cache: str = "f16",
    picks: int | None = None,
    keep: tuple[str, ...] = (),
    invariant: bool = False,
    prefix_reuse: bool = True,
    weights: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
) -> Model:
    """A model ready to generate, or to embed or classify texts.

    model      catalogue name, file or folder (see `lmclock pull`); a missing one is fetched
    machine    native, or array (the reference)
    level      optimisation: 0 as assembled, 1 fused, 2 fused and activations rounded
    threads    of the native machine; path: its SIMD path (default: the widest found)
    context    most positions of a sequence; 0: the model's, at most DEFAULT_CONTEXT
    sequences  sequences that may run at once (default: 1, of an encoder's texts TEXTS, BEAMS where
               there is a decoder too); chunk: most prompt rows of one of them in a cycle
    cache      number format of keys and values: f32, f16 or q8_0
    keep       values that stay readable through `m.machine.read` after their last use
    picks      most rows of a cycle that get logits; invariant, prefix_reuse: see Engine
    weights    round float weights when they are loaded, to bf16 or q8_0
    pooling    of an encoder whose files do not say: mean, cls, max, last or pooler; normalize: make
               the length of its embeddings one
    """
    _check(model, machine, context, sequences, threads, path)
    options = {"threads": threads, "path": path} if machine == "native" else {}
    with ExitStack() as undo:
        maker = create(machine, **options)
        undo.callback(maker.close)
        source = pull(model)
        if weights is None:  # else what is loaded is not what the files hold
            maker.prepare(stored_bytes(source))
        assembled = read(source, cache, weights, pooled(pooling, normalize), checked=False)
        most = assembled.program.context or DEFAULT_CONTEXT
        if context > most:
            raise OptionError(f"context={context} is more than the model was made for, {most}")
        program = optimise(assembled.program, level, keep, invariant=invariant)
        if context:  # pages round it up: what does not fit is to be said by this number
            program = replace(program, context=context)
        capacity = capacity_of(program, sequences, context, most, chunk, picks)
        maker.load(program, assembled.weights, capacity, keep)
        undo.pop_all()
    return Model(
        assembled, program, maker, capacity,
        chunk=chunk, invariant=invariant, prefix_reuse=prefix_reuse,
    )  # fmt: skip


def _check(
    model: str, machine: str, context: int, sequences: int | None, threads: int | None,
    path: str | None,
) -> None:  # fmt: skip
    """What is wrong with the options of `load` whatever the model is."""
    if context < 0:
        raise OptionError(f"context={context} is out of range; valid: 0 (the model's) or more")
    if sequences is not None and sequences < 1:
        raise OptionError(f"sequences={sequences} is out of range; valid: 1 or more")
    if machine != "native" and (threads, path) != (None, None):
        raise OptionError(f"threads and path are options of machine 'native', not of {machine!r}")
    if Path(model).suffix == LISTING:
        raise UnsupportedError(
            f"{model} is a listing, a program without tokenizer; valid: models (see pull). "
            "`lmclock disasm` prints it, and examples/neurons.py runs one"
        )


class Model:
    """A program on a machine with an engine (given `options`) and a tokenizer; made by `load`."""

    def __init__(
        self,
        assembled: Assembled,
        program: Program,
        machine: Machine,
        capacity: Capacity,
        **options: Any,
    ) -> None:
        self.assembled, self.program, self.machine = assembled, program, machine
        self.config = assembled.config
        self.streams: list[TextStream | Watch] = []  # each keeps the cycles it sees
        self._limits: Limits | None = None
        self.closed = False
        # The tokenizer's own end tokens are joined lazily, by each stream: token ids need none.
        self.engine = Engine(
            machine, program, capacity=capacity, eos=frozenset(self.config.eos),
            on_cycles=self._hear, **options,
        )  # fmt: skip

    def _hear(self, cycles: Sequence[Cycle]) -> None:
        for stream in self.streams:
            stream.cycles.parts.append(cycles)

    @cached_property
    def tokenizer(self) -> Tokeniser:
        return tokenizer_of(self.assembled)

    @property
    def endless(self) -> bool:
        """Whether nothing bounds a sequence, as in a recurrence: then the default of max_new_tokens
        is DEFAULT_CONTEXT.
        """
        return self.engine.facts.context is None and self.engine.cache.positions is None

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of chat messages (through the model's template), or ids as given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
            raise OptionError(f"the prompt is a {type(prompt).__name__}; valid: {_PROMPTS}")
        items = list(prompt)
        if items and isinstance(items[0], Mapping):
            return encode_chat(self.tokenizer, items)  # type: ignore[arg-type]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, Integral):
                raise OptionError(f"the prompt holds {item!r:.40}; valid: {_PROMPTS}")
        return [int(item) for item in items]  # type: ignore[call-overload]

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """The whole continuation; options as for `stream`."""
        text = TextStream(self, prompt, **options)
        text.patience = LONGEST
        "".join(text)
        return text.reply

    def cycles_of(self, prompt: str, **options: Any) -> Sequence[Cycle]:
        """The cycles of a prompt's continuation (with `options` of `stream`); of an encoder, those
        of one pass over the text.
        """
        if self.program.has("step"):
            return self.generate(prompt, **options).cycles
        from lmclock.encode import Watch

        watch = Watch()
        self.streams.append(watch)
        try:
            self.encoder.run([part.marked for part in self.encoder.parts(prompt)])
        finally:
            self.streams.remove(watch)
        return watch.cycles

    def stream(self, prompt: Prompt, **options: Any) -> TextStream:
        """An iterator of text pieces; its `reply` is there when it has ended.

        Options: max_new_tokens, stop (a string or several), ignore_eos, and the settings of
        Sampling: temperature (0: greedy), top_k, top_p, min_p, repetition_penalty,
        presence_penalty, frequency_penalty, window (how far penalties look back), seed, logit_bias.
        """
        return TextStream(self, prompt, **options)

    @cached_property
    def encoder(self) -> Encoder:
        """What runs texts through the model; UnsupportedError when it is no encoder."""
        from lmclock.encode import Encoder

        return Encoder(self.engine, self.program, self.config, self.tokenizer)

    def embed(self, texts: Sequence[str], truncate: bool = False) -> np.ndarray:
        """(texts, width) float32: see encode/embed.py."""
        from lmclock.encode.embed import embed

        return embed(self.encoder, texts, truncate)

    def classify(self, texts: Sequence[str], second: Sequence[str] | None = None) -> list[Classes]:
        """Classes and scores of texts, or of pairs; entities and answers: encode/classify.py. A net
        of numbers takes rows of them, "0.5 2".
        """
        from lmclock.encode.classify import classify

        if self.config.family == "mlp":
            from lmclock.encode.numbers import classify_numbers

            return classify_numbers(self.engine, self.config, texts)
        return classify(self.encoder, texts, second)

    @cached_property
    def translator(self) -> Translator:
        """What searches for translations; UnsupportedError when the model has no encoder."""
        from lmclock.translate import Translator

        return Translator(self.engine, self.program, self.config, self.tokenizer)

    def translate(self, texts: Sequence[str], **options: Any) -> list[Translation]:
        """The best result of each text by beam search: see translate.py for the options."""
        return self.translator.run(texts, **options)

    def limits(self, progress: Callable[[str], None] | None = None) -> Limits:
        """The measured limits of the machine. `progress` hears when they must be measured first."""
        from lmclock.hardware.calibrate import limits

        if self._limits is None:
            path = getattr(self.machine, "path", None)
            self._limits = limits(self.machine.traits.threads, path, progress)
        return self._limits

    def clock(self, cycles: Iterable[Cycle]) -> Clock:
        """The clock's accounts of some cycles of this model, held against the machine's limits."""
        from lmclock.clock import Clock

        traits = self.machine.traits
        clock = Clock(self.program, traits.threads, traits.tick_rate, self.limits())
        for cycle in cycles:
            clock.add(cycle)
        return clock

    def close(self) -> None:
        """End what still runs, and give back the machine's threads and memory."""
        if not self.closed:
            self.closed = True
            self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_PROMPTS = "text, token ids, or chat messages such as {'role': 'user', 'content': 'Hi'}"


class TextStream:
    """The text of one sequence, piece by piece. Leaving the loop early cancels the sequence.

    What is wrong with the request is an error at once; the sequence enters the engine with the
    first step of the loop.
    """

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
        if model.closed:
            raise LmclockError("this model is closed; load it again")
        if model.config.family == "mlp":
            raise UnsupportedError(f"model {model.program.name!r} takes numbers; valid: classify")
        if not model.program.has("step"):
            raise UnsupportedError(
                f"model {model.program.name!r} does not generate; valid: {model.encoder.use}"
            )
        self.model = model
        self.tokens: list[int] = []
        self.finish, self.text = "", ""  # why it ended; what has come
        self.cycles = Cycles()
        self.patience = FRAME  # seconds between two looks at the pieces
        settings = sampling_of(sampling)
        ids = model.encode(prompt)
        if max_new_tokens is None and model.endless:
            max_new_tokens = DEFAULT_CONTEXT
        self.prompt_tokens = len(ids)
        self._pieces: list[str] = []
        translates = model.engine.facts.encodes
        self._decoder = model.tokenizer.stream(continued=not translates)
        self._stops = StopStrings(stop)
        self._number: int | None = None
        self._cancelled = False
        self._last: Event | None = None
        stops = frozenset() if ignore_eos else model.tokenizer.eos_ids
        self._request = Request(
            ids, max_new_tokens, settings, stops, ignore_eos, sink=self._take, ended=self._end
        )
        if translates:
            from lmclock.translate import source_request

            self._request = source_request(model.config, self._request)
        model.engine.check(self._request)

    def cancel(self) -> None:
        """End the sequence, once the cycles that run in the same call have (at most about
        `patience` seconds); a signal handler may call this.
        """
        self._cancelled = True

    def _take(self, token: int) -> bool:
        """The engine's sink: one new token; False when a stop string is complete."""
        self.tokens.append(token)
        piece, stopped = self._stops.feed(self._decoder.push(token))
        self._pieces.append(piece)
        return not stopped

    def _end(self, last: Event) -> None:
        """The engine's last word on the sequence, whoever stepped it."""
        self._last, self.finish = last, str(last.finish)
        if self._stops.stopped is None:
            tail, _ = self._stops.feed(self._decoder.flush())
            self._pieces += [tail, self._stops.flush()]

    def __iter__(self) -> Iterator[str]:
        if self._number is not None:
            return
        model = self.model
        self._number = model.engine.add(self._request)
        model.streams.append(self)
        try:
            while self._last is None and not self._cancelled:
                model.engine.step(BURST, self.patience)
                yield from self._drain()
        finally:
            if self._last is None:
                model.engine.cancel(self._number)
            self.text += "".join(self._pieces)
            self._pieces.clear()
            model.streams.remove(self)
        if self._last and self._last.finish == "error":
            raise LmclockError(self._last.message)

    def _drain(self) -> Iterator[str]:
        """The pieces that came, each part of `text` once it is handed out."""
        while self._pieces:
            piece = self._pieces.pop(0)
            if piece:
                self.text += piece
                yield piece

    @property
    def reply(self) -> Reply:
        """What has come so far, complete once the iteration has ended."""
        return Reply(
            self.text, tuple(self.tokens), self.finish, self.prompt_tokens, self.model,
            Cycles(self.cycles.parts),
        )  # fmt: skip
