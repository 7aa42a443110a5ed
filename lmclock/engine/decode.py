"""The decode stage: from the spans of a cycle to a `Batch` of positions, pages, ids and settings.

Every array is new in each cycle or never changed, because the records of past cycles keep them.
A cycle finds the caches of the processor full of weights, and then each array function costs tens
of microseconds, not one: a decode cycle of one sequence takes slices of arrays made before.
"""

from __future__ import annotations

import numpy as np

from lmclock.batch import ADJUST, SAMPLING, Batch, Rows
from lmclock.engine.facts import POSITIONS, TOKENS, Facts
from lmclock.engine.fetch import Plan, Span
from lmclock.engine.request import Running
from lmclock.engine.sampling import GREEDY
from lmclock.program import Input

_NO_ADJUST = np.empty(0, ADJUST)
_NO_PICKS = np.empty(0, np.int32)
_NO_SAMPLING = np.empty(0, SAMPLING)


class Decoder:
    """Builds batches for one program; `limit` is the most sequences of a cycle."""

    def __init__(self, facts: Facts, limit: int, page_size: int) -> None:
        self.facts, self.page_size = facts, page_size
        # Of decode cycles, by number of sequences: read-only, so that cycles can share them.
        self.starts = [np.arange(n + 1, dtype=np.int32) for n in range(limit + 1)]
        self.all = [starts[:-1] for starts in self.starts]
        self.valid = [np.ones(n, bool) for n in range(limit + 1)]
        self.counting = np.arange(1024, dtype=np.int32)

    def decode(self, plan: Plan) -> Batch:
        """The batch of a plan with at least one span."""
        spans = plan.spans
        held = [sequence.held for sequence, _, _ in spans if sequence.held]
        rows = {self.facts.space: self._rows(spans)}
        parts = {self.facts.space: spans}
        if plan.encoded:
            source = [
                (s, 0, len(s.request.source) if s in plan.encoded else 0) for s, _, _ in spans
            ]
            rows["src"], parts["src"] = self._rows(source), source
        pages = {name: [h.table for h in held] for name in self.facts.paged}
        lengths = {}
        for name in self.facts.frozen:
            pages[name] = [h.source_table for h in held]
            lengths[name] = np.array([h.source_length for h in held], np.int32)
        inputs = {
            i.name: self._input(i, parts[i.space], rows[i.space])
            for i in self.facts.inputs
            if i.space in parts
        }
        slots = np.array([h.slot for h in held], np.int32)
        pick, sampling, adjust = self._picks(plan, rows[self.facts.space])
        return Batch(
            rows, inputs, slots, pages, lengths,
            page_size=self.page_size, pick=pick, sampling=sampling, adjust=adjust,
        )  # fmt: skip

    def _rows(self, spans: list[Span]) -> Rows:
        n, first = len(spans), spans[0][1]
        if n == 1 and spans[0][2] == 1:
            while first >= len(self.counting):
                self.counting = np.arange(2 * len(self.counting), dtype=np.int32)
            positions = self.counting[first : first + 1]
        elif all(count == 1 for _, _, count in spans):
            positions = np.array([first for _, first, _ in spans], np.int32)
        else:
            return Rows.of([(first, count) for _, first, count in spans])
        return Rows(self.starts[n], positions, self.valid[n])

    def _input(self, declared: Input, spans: list[Span], rows: Rows) -> np.ndarray:
        """(rows, width): token ids, positions, or what the requests brought."""
        if declared.name in POSITIONS:
            return rows.positions[:, None]
        if declared.name in TOKENS:
            ids: list[int] = []
            if declared.space == self.facts.space:
                for sequence, first, count in spans:
                    ids += sequence.tokens[first : first + count]
            else:
                for sequence, first, count in spans:
                    ids += sequence.request.source[first : first + count]
            return np.array([ids], np.int32).T
        parts = [_given(declared, *span) for span in spans]
        return np.concatenate(parts).astype(np.int32 if declared.ids else np.float32)

    def _picks(self, plan: Plan, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Picked rows, SAMPLING and ADJUST records. Only the last row of a sequence is sampled by
        its settings; picks before it are there to be read.
        """
        total = sum(plan.picks)
        if total == 0:
            return _NO_PICKS, _NO_SAMPLING, _NO_ADJUST
        if total == len(rows) == len(plan.spans):
            pick = self.all[total]
        else:
            ends = rows.starts[1:].tolist()
            spans = [range(end - n, end) for end, n in zip(ends, plan.picks, strict=True)]
            pick = np.array([row for span in spans for row in span], np.int32)
        settings: list[np.ndarray] = []
        adjust: list[np.ndarray] = []
        at = 0
        for (sequence, _, _), picks in zip(plan.spans, plan.picks, strict=True):
            if not picks:
                continue
            at += picks
            settings += [GREEDY] * (picks - 1)
            settings.append(sequence.settings.of_draw(sequence.new_tokens))
            if sequence.tally:
                adjust.append(sequence.tally.of_row(at - 1))
        return pick, _joined(settings), np.concatenate(adjust) if adjust else _NO_ADJUST


def _joined(settings: list[np.ndarray]) -> np.ndarray:
    """The records one after the other; np.concatenate takes long over records."""
    if len(settings) == 1:
        return settings[0]
    return np.frombuffer(b"".join([record.tobytes() for record in settings]), SAMPLING)


def _given(declared: Input, sequence: Running, first: int, count: int) -> np.ndarray:
    """The rows of a request's own input; new tokens, which it cannot cover, have zeros."""
    given = sequence.request.inputs.get(declared.name)
    part = np.zeros((count, declared.width))
    if given is not None:
        rows = given[first : first + count]
        part[: len(rows)] = rows
    return part
