"""What a caller asks for (`Request`), what it hears (`Event`), and a sequence on its way
(`Running`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np

from lmclock.cache import Cache, Held
from lmclock.engine.facts import POSITIONS, TOKENS, Facts
from lmclock.engine.sampling import Sampling, Settings, Tally
from lmclock.engine.search import Beams, Hypothesis, Search
from lmclock.errors import ContextError, OptionError, UnsupportedError, choices
from lmclock.machines import Capacity
from lmclock.program import Program

FINISHES = ("stop", "length", "cancelled", "error")
Sink = Callable[[int], bool]
Receiver = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Event:
    """News of one sequence: its new tokens, and why it ended, if it did (one of FINISHES).

    stop: an end token or the sink; length: max_new_tokens, or all was computed; error: the machine
    could not run it, and `message` says why. A search has one event, at its end: `tokens` are those
    of its best result, `results` all of them, the best first.
    """

    sequence: int
    tokens: tuple[int, ...] = ()
    finish: str | None = None
    message: str = ""
    results: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True)
class Request:
    """One sequence to run.

    prompt          token ids; for a program with only `encode`, its rows
    max_new_tokens  None: until the context or the cache is full
    stop_ids        token ids that end it, like the engine's `eos` (which `ignore_eos` turns off);
                    the token itself is not handed out
    source          token ids of the encoder rows, for programs that have them
    inputs          (rows, width) for declared inputs the engine does not fill, such as token types;
                    ids not given are 0
    sink            called with each new token; False stops the sequence after it
    ended           called once, with the last event, when the sequence holds nothing any more
                    Neither may raise, nor call the engine
    want            value name -> receiver(position of the first row, (rows, width)), called in the
                    cycle that computes the rows; `seq` values once, after the prompt
    pick_all        pick every row of the prompt (perplexity), not only the last
    salt            prompts share cached pages only under the same salt
    beams           search for the best continuations, with as many sequences side by side, instead
                    of sampling; `sink` hears nothing of it
    """

    prompt: Sequence[int]
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    source: Sequence[int] = ()
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    sink: Sink | None = None
    ended: Callable[[Event], None] | None = None
    want: Mapping[str, Receiver] = field(default_factory=dict)
    pick_all: bool = False
    salt: bytes = b""
    beams: Beams | None = None


class Running:
    """A sequence between `add` and its end. Rows `held.length`.. of `tokens` are due.

    `source_due` source rows must be encoded with the next span. `delivered` rows have been handed
    to receivers: a sequence computed anew does not repeat them. `group` is the search whose beam it
    is.
    """

    __slots__ = ("delivered", "group", "held", "id", "last", "prompt_length", "request",
                 "salt", "settings", "source_due", "stops", "tally", "tokens")  # fmt: skip

    def __init__(self, number: int, request: Request, last: int, eos: frozenset[int]) -> None:
        self.id = number
        self.request = request
        self.tokens = [int(token) for token in request.prompt]
        self.prompt_length = len(self.tokens)
        self.last = last  # length at which it is finished
        self.stops = request.stop_ids if request.ignore_eos else request.stop_ids | eos
        self.settings = Settings(request.sampling)
        adjusts = request.sampling.penalises or request.sampling.logit_bias
        self.tally = Tally(request.sampling, self.tokens) if adjusts else None
        # What the cached keys depend on besides the tokens belongs to the salt.
        source = np.array(request.source, np.int32).tobytes()
        self.salt = sha256(sha256(request.salt).digest() + source).digest()
        self.held: Held | None = None
        self.source_due = len(request.source)
        self.delivered = 0
        self.group = Group(self) if request.beams else None

    @property
    def width(self) -> int:
        """Sequences it may become."""
        return self.request.beams.width if self.request.beams else 1

    @property
    def claims(self) -> int:
        """Sequences it may still become beside those that run: the beams of a search in its prompt
        are not there yet.
        """
        return 1 if self.group is None or len(self.group.beams) > 1 else self.width

    @property
    def new_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def may_share(self) -> bool:
        """Whether cached pages may stand for its rows: receivers must see all of them."""
        return not (self.request.inputs or self.request.want or self.request.pick_all)


class Group:
    """The beams of one search: sequences that run side by side, the first of which is the one that
    the caller knows. Until its prompt is computed it is alone.
    """

    __slots__ = ("beams", "search")

    def __init__(self, first: Running) -> None:
        self.beams = [first]
        self.restart()

    def restart(self) -> None:
        """As before the prompt; beams but the first are forgotten."""
        first = self.beams[0]
        del self.beams[1:], first.tokens[first.prompt_length :]
        assert first.request.beams is not None
        self.search = Search(first.request.beams, first.tokens, first.last, first.stops)

    def expand(self) -> list[Running]:
        """The other beams, not yet in any line; their numbers follow the first one's."""
        first = self.beams[0]
        for number in range(first.id + 1, first.id + first.width):
            beam = Running(number, replace(first.request, beams=None), first.last, first.stops)
            beam.source_due, beam.group = 0, self
            self.beams.append(beam)
        return self.beams[1:]


def last_length(
    request: Request, program: Program, facts: Facts, cache: Cache, capacity: Capacity
) -> int:
    """The length at which the sequence is finished, once everything about the request is checked.

    ContextError when it can never fit; OptionError or UnsupportedError for what makes no sense.
    """
    _check_ids("prompt", request.prompt, facts.vocabulary)
    if not len(request.prompt):
        raise OptionError("the prompt is empty; it needs at least 1 token")
    _check_source(request, facts, cache, capacity)
    _check_inputs(request, facts)
    for name in request.want:
        if name not in facts.values:
            raise OptionError(f"want={name!r} is not a value of program {program.name!r}")
    new = request.max_new_tokens
    if new is not None and (isinstance(new, bool) or not isinstance(new, int) or new < 0):
        raise OptionError(f"max_new_tokens={new!r} is out of range; valid: 0 or more, or None")
    if facts.next is None and new:
        raise UnsupportedError(
            f"program {program.name!r} does not sample, so max_new_tokens={new} cannot be; valid: 0"
        )
    if not facts.carries and (new or 0) > 1:
        raise UnsupportedError(
            f"program {program.name!r} keeps no state to go on from, so max_new_tokens={new} "
            "cannot be; valid: 0 or 1"
        )
    if request.beams:
        _check_beams(request, program, facts, cache, capacity)
    for token in request.sampling.logit_bias:
        if token >= facts.logits_width:
            raise OptionError(
                f"logit_bias for token {token}: valid ids: 0 to {facts.logits_width - 1}"
            )
    return _fit(request, facts, cache, capacity)


def _check_beams(
    request: Request, program: Program, facts: Facts, cache: Cache, capacity: Capacity
) -> None:
    assert request.beams is not None
    if facts.next is None or not facts.carries or facts.fixed:
        why = "a state that cannot be shared" if facts.fixed else "no tokens to go on from"
        raise UnsupportedError(f"program {program.name!r} has {why}, so beams cannot be searched")
    most = min(capacity.slots, capacity.rows, capacity.picks)
    if request.beams.width > most:
        raise ContextError(f"{request.beams.width} beams do not fit; valid: at most {most} here")
    demanded = (request.beams.first, *request.beams.final)
    for token in (
        *(t for t in demanded if t is not None),
        *(t for r in request.beams.banned for t in r),
    ):
        if not 0 <= token < facts.logits_width:
            raise OptionError(
                f"the search names token {token}; valid ids: 0 to {facts.logits_width - 1}"
            )


def _fit(request: Request, facts: Facts, cache: Cache, capacity: Capacity) -> int:
    prompt, new = len(request.prompt), request.max_new_tokens
    if not facts.causal and prompt > capacity.rows:
        raise ContextError(
            f"a prompt of {prompt} tokens must run in one cycle, which takes {capacity.rows} rows"
        )
    if not facts.causal and request.pick_all and prompt > capacity.picks:
        raise ContextError(
            f"a prompt of {prompt} tokens must be picked in one cycle, which takes {capacity.picks}"
        )
    limits = [(facts.context, "the context of the model")] if facts.context else []
    if cache.positions is not None:
        width = request.beams.width if request.beams else 1
        room = cache.positions // cache.page_size // width * cache.page_size
        limits.append((room, "the room of the cache"))
    if facts.next is None:
        new = 0
    elif not facts.carries and new is None:
        new = 1
    if not limits:
        if new is None:
            raise OptionError("max_new_tokens=None needs a model with a limited context")
        return prompt + new
    most, what = min(limits)
    least = prompt + (1 if new is None else new)
    if least > most:
        asked = f" and {new} new ones" if new else ""
        raise ContextError(
            f"a prompt of {prompt} tokens{asked} does not fit: {what} is {most} tokens"
        )
    return most if new is None else prompt + new


def _check_ids(what: str, ids: Sequence[int], size: int | None) -> None:
    if not len(ids):
        return
    array = np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise OptionError(f"the {what} must be a list of whole token ids, not {array.dtype}")
    most = 2**31 if size is None else size
    wrong = array[(array < 0) | (array >= most)]
    if len(wrong):
        raise OptionError(f"token id {wrong[0]} in the {what}; valid: 0 to {most - 1}")


def _check_source(request: Request, facts: Facts, cache: Cache, capacity: Capacity) -> None:
    rows = len(request.source)
    if bool(rows) != facts.encodes:
        raise OptionError(
            "this program needs source tokens, but there are none"
            if facts.encodes
            else f"this program has no encoder, so {rows} source tokens cannot be used; valid: none"
        )
    _check_ids("source", request.source, facts.source_vocabulary)
    if rows > capacity.rows:
        raise ContextError(
            f"a source of {rows} tokens must run in one cycle, which takes {capacity.rows} rows"
        )
    limits = [(facts.source_context, "the context of the encoder")] if facts.source_context else []
    if cache.frozen:
        limits.append((cache.sources.size * cache.page_size, "the room of the cache"))
    if limits and rows > min(limits)[0]:
        most, what = min(limits)
        raise ContextError(f"a source of {rows} tokens does not fit: {what} is {most} tokens")


def _check_inputs(request: Request, facts: Facts) -> None:
    own = {i.name: i for i in facts.inputs if i.name not in TOKENS + POSITIONS}
    for name in [*request.inputs, *own]:
        if name not in own:
            raise OptionError(f"input {name!r} is not one to give; valid: {choices(own) or 'none'}")
        if name not in request.inputs:
            if own[name].ids:
                continue
            raise OptionError(f"input {name!r} of the program is not given")
        of_prompt = own[name].space == facts.space
        shape = (len(request.prompt if of_prompt else request.source), own[name].width)
        if np.shape(request.inputs[name]) != shape:
            have = np.shape(request.inputs[name])
            raise OptionError(f"input {name!r} has shape {have}; valid: {shape}")
