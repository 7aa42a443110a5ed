"""The decode stage: from the spans of a cycle to a `Batch` of positions, pages, ids and settings.

Every array is new in each cycle or never changed, because the records of past cycles keep them.
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
        self.valid = [np.ones(n, bool) for n in range(limit + 1)]
        self.own = [i for i in facts.inputs if i.name not in TOKENS + POSITIONS]
        self.tokens = [i for i in facts.inputs if i.name in TOKENS]
        self.positions = [i for i in facts.inputs if i.name in POSITIONS]

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
        n = len(spans)
        if n < len(self.starts) and all(count == 1 for _, _, count in spans):
            positions = np.array([first for _, first, _ in spans], np.int32)
            return Rows(self.starts[n], positions, self.valid[n])
        return Rows.of([(first, count) for _, first, count in spans])

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
            return np.array(ids, np.int32)[:, None]
        parts = [_given(declared, *span) for span in spans]
        return np.concatenate(parts).astype(np.int32 if declared.ids else np.float32)

    def _picks(self, plan: Plan, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Picked rows, SAMPLING and ADJUST records. Only the last row of a sequence is sampled by
        its settings; picks before it are there to be read.
        """
        total = sum(plan.picks)
        if total == 0:
            return _NO_PICKS, _NO_SAMPLING, _NO_ADJUST
        if total == len(rows):
            pick = self.starts[total][:-1] if total < len(self.starts) else np.arange(total)
        else:
            ends = rows.starts[1:].tolist()
            pick = np.concatenate(
                [np.arange(end - n, end) for end, n in zip(ends, plan.picks, strict=True)]
            )
        sampling = np.empty(total, SAMPLING)
        adjust: list[np.ndarray] = []
        at = 0
        for (sequence, _, _), picks in zip(plan.spans, plan.picks, strict=True):
            if not picks:
                continue
            at += picks
            if picks > 1:
                sampling[at - picks : at - 1] = GREEDY
            sequence.record["draw"] = len(sequence.tokens) - sequence.prompt_length
            sampling[at - 1] = sequence.record[0]
            if sequence.tally:
                adjust.append(sequence.tally.of_row(at - 1))
        joined = np.concatenate(adjust) if adjust else _NO_ADJUST
        return pick.astype(np.int32, copy=False), sampling, joined


def _given(declared: Input, sequence: Running, first: int, count: int) -> np.ndarray:
    """The rows of a request's own input; new tokens, which it cannot cover, have zeros."""
    given = sequence.request.inputs.get(declared.name)
    part = np.zeros((count, declared.width))
    if given is not None:
        rows = given[first : first + count]
        part[: len(rows)] = rows
    return part
