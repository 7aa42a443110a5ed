"""The write-back stage: what the rows of a cycle leave behind in their sequences.

Caches advance by the rows kept; sampled tokens are appended and handed to sinks; a sequence whose
end has come says why. Receivers get the values they want before anything else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lmclock.cache import Cache
from lmclock.engine.facts import Facts
from lmclock.engine.fetch import Plan
from lmclock.engine.request import Event, Running
from lmclock.engine.search import Hypothesis

Expand = Callable[[Running], list[Running]]


@dataclass(slots=True)
class Outcome:
    """Of one cycle: its events and the counts of `Cycle`."""

    events: list[Event] = field(default_factory=list)
    prompt_rows: int = 0
    decode_rows: int = 0
    retired: int = 0
    decoding: list[bool] = field(default_factory=list)


def write_back(
    plan: Plan,
    sampled: list[int],
    values: Mapping[str, np.ndarray],
    facts: Facts,
    cache: Cache,
    expand: Expand | None = None,
) -> Outcome:
    """Advance the plan's sequences: `sampled` has a token per picked row, `values` what was read
    for receivers and searches, `expand` makes a sequence the beams of its search. Sequences that
    ended still hold their cache.
    """
    outcome = Outcome()
    if values:
        deliver(plan, values, facts)
    at = 0
    for sequence in plan.encoded:
        sequence.source_due = 0
        outcome.prompt_rows += len(sequence.request.source)
    rows: dict[Running, list[int]] = {}  # first beam of a search -> its rows of logits
    for (sequence, first, count), picks in zip(plan.spans, plan.picks, strict=True):
        assert sequence.held is not None
        at += picks
        end = first + count
        if not count:
            outcome.decoding.append(False)
            continue
        outcome.decoding.append(first >= sequence.prompt_length)
        if first < sequence.prompt_length:
            outcome.prompt_rows += count
        else:
            outcome.decode_rows += count
        sequence.delivered = max(sequence.delivered, end)
        cache.commit(sequence.held, sequence.tokens, end)
        if end < len(sequence.tokens):
            continue
        if sequence.group:
            rows.setdefault(sequence.group.beams[0], []).extend([at - 1] * bool(picks))
            continue
        _retire(outcome, sequence, sampled[at - 1] if picks and end < sequence.last else None)
    for first_beam, chosen in rows.items():
        logits = values[facts.logits][chosen] if chosen and facts.logits else None
        _search(outcome, first_beam, logits, expand, cache)
    return outcome


def _search(
    outcome: Outcome,
    first: Running,
    logits: np.ndarray | None,
    expand: Expand | None,
    cache: Cache,
) -> None:
    """The beams of a search go on as what its best continuations are, or it ends."""
    assert first.group is not None
    search = first.group.search
    if logits is not None and not search.over:
        search.advance(logits)
    if logits is None or search.over:
        results = tuple(search.results)
        best = results[0] if results else Hypothesis((), 0.0, "length")
        outcome.retired += len(best.tokens)
        outcome.events.append(Event(first.id, best.tokens, best.finish, results=results))
        return
    assert expand is not None
    beams = expand(first)
    cache.reorder([beam.held for beam in beams if beam.held], search.parents)
    for beam, tokens in zip(beams, search.sequences, strict=True):
        beam.tokens = list(tokens)


def _retire(outcome: Outcome, sequence: Running, token: int | None) -> None:
    """Append one new token, or none, and see whether the sequence ends."""
    if token is None or token in sequence.stops:
        outcome.events.append(Event(sequence.id, (), "length" if token is None else "stop"))
        return
    sequence.tokens.append(token)
    if sequence.tally:
        sequence.tally.add(sequence.tokens)
    outcome.retired += 1
    sink = sequence.request.sink
    stopped = sink is not None and not sink(token)
    over = len(sequence.tokens) >= sequence.last
    finish = "stop" if stopped else "length" if over else None
    outcome.events.append(Event(sequence.id, (token,), finish))


def deliver(plan: Plan, values: Mapping[str, np.ndarray], facts: Facts) -> None:
    """Hand each receiver the rows of its sequence that it has not seen."""
    row = picked = source = 0
    for number, ((sequence, first, count), picks) in enumerate(
        zip(plan.spans, plan.picks, strict=True)
    ):
        end = first + count
        skipped = min(count, max(0, sequence.delivered - first))
        encoded = len(sequence.request.source) if sequence in plan.encoded else 0
        rows = {
            facts.space: (first + skipped, row + skipped, row + count),
            "pick": (end - picks, picked, picked + picks),
            "seq": (0, number, number + (skipped < count and end == sequence.prompt_length)),
        }
        if facts.encodes:
            rows["src"] = (0, source, source + encoded if not sequence.delivered else source)
        for name, receiver in sequence.request.want.items():
            position, begin, stop = rows[facts.values[name].space]
            if begin < stop:
                receiver(position, values[name][begin:stop])
        row, picked, source = row + count, picked + picks, source + encoded
