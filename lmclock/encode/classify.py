"""Classes of texts, entities in them, and answers to questions, from an encoder's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmclock.encode import Encoder, Part
from lmclock.errors import OptionError
from lmclock.text.segments import owned

LONGEST_ANSWER = 15  # tokens


@dataclass(frozen=True)
class Classes:
    """Every class of a text with its score, the highest first."""

    labels: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def label(self) -> str:
        return self.labels[0]

    @property
    def score(self) -> float:
        return self.scores[0]


@dataclass(frozen=True)
class Entity:
    """A stretch of a text, characters [first, end), and the mean score of its tokens."""

    label: str
    score: float
    text: str
    first: int
    end: int


def classify(
    encoder: Encoder, texts: Sequence[str], second: Sequence[str] | None = None
) -> list[Classes]:
    """The classes of each text, or of each pair of texts. Of a long text, the mean of its segments'
    scores, weighted by tokens.
    """
    encoder.need("sequence", "next")
    if second is not None and len(second) != len(texts):
        raise OptionError(f"{len(texts)} texts, but {len(second)} second ones")
    if second is None:
        parts = [encoder.parts(text) for text in texts]
    else:
        firsts = [encoder.tokenizer.spans(text)[0] for text in texts]
        parts = [encoder.parts(b, a) for a, b in zip(firsts, second, strict=True)]
    rows = encoder.run([part.marked for text in parts for part in text])
    found, at = [], 0
    for segments in parts:
        scores = scores_of(encoder.config.scores, np.concatenate(rows[at : at + len(segments)]))
        at += len(segments)
        weights = [max(end - first, 1) for first, end in owned([part.span for part in segments])]
        mean = np.average(scores, axis=0, weights=weights)
        order = np.argsort(-mean, kind="stable")
        labels = tuple(encoder.config.labels[k] for k in order)
        found.append(Classes(labels, tuple(float(mean[k]) for k in order)))
    return found


def scores_of(kind: str, logits: np.ndarray) -> np.ndarray:
    """(rows, classes) float64: softmax over the classes, a sigmoid for each, or the logits."""
    x = logits.astype(np.float64)
    if kind == "none":
        return x
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-x))
    weights = np.exp(x - x.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def tag(encoder: Encoder, texts: Sequence[str]) -> list[list[Entity]]:
    """The entities of each text: neighbouring tokens of one label, where labels are B-X and I-X (a
    B begins a new one); tokens of label O are in none.
    """
    encoder.need("token")
    parts = [encoder.parts(text) for text in texts]
    rows = iter(encoder.run([part.marked for text in parts for part in text]))
    found = []
    for text, segments in zip(texts, parts, strict=True):
        scores, characters = _token_scores(encoder, segments, [next(rows) for _ in segments])
        found.append(_entities(encoder.config.labels, text, scores, characters))
    return found


def _token_scores(
    encoder: Encoder, parts: Sequence[Part], rows: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(tokens, classes) of a whole text, each token's from the segment it stands deepest in."""
    scores, characters = [], []
    for part, logits, (first, end) in zip(
        parts, rows, owned([part.span for part in parts]), strict=True
    ):
        here = slice(first - part.span[0], end - part.span[0])
        own = logits[part.marked.first : part.marked.first + len(part.characters)]
        scores.append(scores_of("softmax", own[here]))
        characters += part.characters[here]
    return np.concatenate(scores), characters


def _entities(
    labels: Sequence[str], text: str, scores: np.ndarray, characters: Sequence[tuple[int, int]]
) -> list[Entity]:
    groups: list[tuple[str, list[int]]] = []
    last = ""
    for at, best in enumerate(scores.argmax(axis=1).tolist() if len(scores) else ()):
        if characters[at][0] == characters[at][1]:
            continue  # a space alone, of which byte-level vocabularies have tokens
        label = labels[best]
        kind = label[2:] if label[:2] in ("B-", "I-") else label
        if label != "O":
            if groups and last == kind and not label.startswith("B-"):
                groups[-1][1].append(at)
            else:
                groups.append((kind, [at]))
        last = "" if label == "O" else kind
    found = []
    for kind, tokens in groups:
        first, end = characters[tokens[0]][0], characters[tokens[-1]][1]
        score = float(np.mean([scores[at].max() for at in tokens]))
        found.append(Entity(kind, score, text[first:end], first, end))
    return found


def answer(encoder: Encoder, question: str, texts: Sequence[str]) -> list[Entity]:
    """The stretch of each text that answers the question best; `label` is "answer", its score the
    probability of its start times that of its end, over all tokens of the text's best segment.
    """
    encoder.need("answer")
    asked = encoder.tokenizer.spans(question)[0]
    if not asked:
        raise OptionError("the question is empty")
    parts = [encoder.parts(text, asked) for text in texts]
    rows = iter(encoder.run([part.marked for text in parts for part in text]))
    found = []
    for text, segments in zip(texts, parts, strict=True):
        best = Entity("answer", 0.0, "", 0, 0)
        for part in segments:
            here = _best_span(part, next(rows), text)
            if here.score > best.score:
                best = here
        found.append(best)
    return found


def _best_span(part: Part, logits: np.ndarray, text: str) -> Entity:
    """Over the text's own tokens and the first one, which stands for no answer."""
    count = len(part.characters)
    own = logits[part.marked.second : part.marked.second + count]
    rows = np.concatenate([logits[:1], own]).T
    start, end = scores_of("softmax", rows)
    pairs = np.triu(np.outer(start[1:], end[1:]))
    pairs -= np.triu(pairs, LONGEST_ANSWER)
    if not count:
        return Entity("answer", 0.0, "", 0, 0)
    a, b = np.unravel_index(int(pairs.argmax()), pairs.shape)
    first, last = part.characters[a][0], part.characters[b][1]
    return Entity("answer", float(pairs[a, b]), text[first:last], first, last)
