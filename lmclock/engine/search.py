"""Beam search for one sequence: which continuations of which beams live on, and which are results.

    search = Search(Beams(width=4), prompt, last=64, ends={0})
    while not search.over:
        search.advance(logits)       # of each beam; `parents` and `tokens` say what became of them
    search.results                   # the best first

Scores are sums of log-probabilities, divided by length^length_penalty once a beam has ended. Rules
and arithmetic (float32) are those of transformers' generate(num_beams=...), so that both find the
same sequences. With one beam it is greedy search. This file knows nothing of caches and machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmclock.config.generation import Searching
from lmclock.errors import OptionError

NEVER = np.float32(-1e9)  # what transformers gives a beam that must not be chosen
BLOCK = 64  # elements whose largest one is looked at first
_RANGES: dict[str, tuple[float, float]] = {
    "width": (1, 256), "results": (1, 256), "length_penalty": (-100, 100), "min_length": (0, 2**31),
    "min_new_tokens": (0, 2**31), "no_repeat_ngram": (0, 2**31), "repetition": (0.01, 100),
}  # fmt: skip


@dataclass(frozen=True)
class Beams(Searching):
    """Settings of a search, and how many sequences are wanted of it, at most `width`; OptionError
    names a value out of range.
    """

    results: int = 1

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            whole = isinstance(getattr(type(self), name), int)  # the default
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if (
                isinstance(value, bool)
                or not isinstance(value, kinds)
                or not least <= value <= most
            ):
                kind = "a whole number from " if whole else ""
                raise OptionError(
                    f"{name}={value!r} is out of range; valid: {kind}{least} to {most}"
                )
        if self.results > self.width:
            raise OptionError(
                f"results={self.results} of width={self.width} beams; valid: at most it"
            )
        if self.early_stopping not in (True, False, "never"):
            raise OptionError(
                f"early_stopping={self.early_stopping!r} is unknown; valid: True, False or 'never'"
            )
        if any(not run for run in self.banned):
            raise OptionError("banned holds an empty run of tokens; valid: one token or more")


@dataclass(frozen=True)
class Hypothesis:
    """A result: its new tokens without the end token, its score (the sum of log-probabilities under
    the length penalty; greedy search has the plain sum), and stop or length.
    """

    tokens: tuple[int, ...]
    score: float
    finish: str


class Search:
    """See the module's header. `last` is the length, prompt included, at which every beam ends;
    `ends` are the tokens that end one. `sequences` are the beams that live, prompt included.
    """

    def __init__(
        self, beams: Beams, prompt: Sequence[int], last: int, ends: frozenset[int]
    ) -> None:
        self.beams, self.last, self.ends = beams, last, ends
        self.start = len(prompt)
        self.sequences = [list(prompt) for _ in range(beams.width)]
        self.scores = np.full(beams.width, NEVER, np.float32)
        self.scores[0] = 0  # until they differ, only the first one counts
        self.finished: list[tuple[np.float32, list[int]]] = []  # best first, at most `width`
        self.over = last <= self.start
        self.parents: list[int] = []
        self.tokens: list[int] = []

    @property
    def results(self) -> list[Hypothesis]:
        """The best sequences so far, the best first."""
        found = []
        for score, tokens in self.finished[: self.beams.results]:
            ended = len(tokens) > self.start and tokens[-1] in self.ends
            new = tokens[self.start : len(tokens) - ended]
            found.append(Hypothesis(tuple(new), float(score), "stop" if ended else "length"))
        return found

    def advance(self, logits: np.ndarray) -> None:
        """One token more, from (beams, vocabulary) logits, or (1, vocabulary) after the prompt."""
        logits = np.asarray(logits, np.float32)
        scores = log_softmax(logits) if self.beams.width > 1 else logits.copy()
        if len(scores) < self.beams.width:
            scores = np.repeat(scores, self.beams.width, axis=0)
        for row, sequence in zip(scores, self.sequences, strict=True):
            self._adjust(row, sequence)
        if self.beams.width == 1:
            self._greedy(scores[0], logits[0])
        else:
            self._choose(scores)

    def _adjust(self, row: np.ndarray, sequence: list[int]) -> None:
        """What the settings forbid or demand of the next token of one beam, in place."""
        b = self.beams
        if b.repetition != 1:
            seen = np.unique(sequence)
            old = row[seen]
            row[seen] = np.where(old < 0, old * np.float32(b.repetition), old / b.repetition)
        row[_repeats(sequence, b.no_repeat_ngram)] = -np.inf
        for run in b.banned:
            *before, token = run
            fits = not before or (len(run) <= len(sequence) and sequence[-len(before) :] == before)
            if fits and run not in [(end,) for end in self.ends] and token < len(row):
                row[token] = -np.inf
        short = len(sequence) < b.min_length or len(sequence) - self.start < b.min_new_tokens
        if short and self.ends:
            row[[end for end in self.ends if end < len(row)]] = -np.inf
        forced: tuple[int, ...] = (b.first,) if b.first is not None and len(sequence) == 1 else ()
        if b.final and len(sequence) == self.last - 1:
            forced = b.final
        if forced:
            row[:] = -np.inf
            row[list(forced)] = 0

    def _greedy(self, row: np.ndarray, logits: np.ndarray) -> None:
        token = int(row.argmax())
        sequence = self.sequences[0]
        self.scores[0] += log_softmax(logits[None])[0, token]
        sequence.append(token)
        self.parents, self.tokens = [0], [token]
        self.over = token in self.ends or len(sequence) >= self.last
        self.finished = [(self.scores[0], sequence)] if self.over else []

    def _choose(self, scores: np.ndarray) -> None:
        """The best continuations of all beams together."""
        b, vocabulary = self.beams, scores.shape[1]
        total = (scores + self.scores[:, None]).reshape(-1)
        best = largest(total, max(2, 1 + len(self.ends)) * b.width)
        found = total[best]
        parents, tokens = best // vocabulary, best % vocabulary
        length = len(self.sequences[0]) + 1
        full = length >= self.last
        ended = np.array([full or int(token) in self.ends for token in tokens])
        running = found + np.where(ended, NEVER, np.float32(0))
        alive = np.argsort(-running, kind="stable")[: b.width]
        self._finish(found, parents, tokens, ended)
        self.sequences = [[*self.sequences[parents[n]], int(tokens[n])] for n in alive]
        self.scores = running[alive]
        self.parents, self.tokens = parents[alive].tolist(), tokens[alive].tolist()
        self.over = full or not self._may_improve(length - self.start) or self._enough()

    def _enough(self) -> bool:
        return self.beams.early_stopping is True and len(self.finished) == self.beams.width

    def _finish(
        self, found: np.ndarray, parents: np.ndarray, tokens: np.ndarray, ended: np.ndarray
    ) -> None:
        """Of the continuations that ended, those among the first `width` may become results."""
        b = self.beams
        count = len(self.sequences[0]) + 1 - self.start
        by = np.float32(count**b.length_penalty)
        for n in np.flatnonzero(ended[: b.width]):
            tokens_of = [*self.sequences[parents[n]], int(tokens[n])]
            self.finished.append((np.float32(found[n] / by), tokens_of))
        # A stable sort: of equals the older one stays.
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[b.width :]

    def _may_improve(self, length: int) -> bool:
        """Whether a beam that runs, `length` tokens long, may yet beat the worst result."""
        b = self.beams
        if b.early_stopping == "never" and b.length_penalty > 0:
            length = self.last - self.start
        worst = self.finished[-1][0] if len(self.finished) == b.width else NEVER
        return bool(self.scores[0] / np.float32(length**b.length_penalty) > worst)


def _repeats(sequence: list[int], size: int) -> list[int]:
    """Tokens that would complete a run of `size` tokens for the second time."""
    if not size or len(sequence) + 1 < size:
        return []
    before = sequence[len(sequence) - size + 1 :]
    starts = range(len(sequence) - size + 1)
    return [sequence[at + size - 1] for at in starts if sequence[at : at + size - 1] == before]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Along the rows, in float32."""
    x = x - x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)), np.float32)


def largest(x: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest elements of (n,), in descending order; lower ones first among
    equals. The largest of a block of elements says whether the block must be looked at.
    """
    count = min(count, len(x))
    whole = len(x) // BLOCK * BLOCK
    tops = x[:whole].reshape(-1, BLOCK).max(axis=1)
    if len(tops) > 2 * count:
        blocks = np.sort(np.argpartition(-tops, count)[:count])
        inside = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)
        candidates = np.concatenate([inside, np.arange(whole, len(x))])
    else:
        candidates = np.arange(len(x))
    return candidates[np.argsort(-x[candidates], kind="stable")[:count]]
