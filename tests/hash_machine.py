"""A machine for tests of the engine: the next token is a hash of exactly what a row can see.

It keeps pages, slots and frozen pages as the contract says, computes no instruction, and complains
of what a real machine would turn into silent corruption. `expected` is its oracle: the same
continuation from the token lists alone, without cache, batch or engine.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from lmclock import listing
from lmclock.batch import ADJUST, Batch
from lmclock.engine import Engine, Request, capacity_for
from lmclock.machines import Capacity, Machine, Tensor, Ticks, Traits
from lmclock.machines.array_sample import sample_row
from lmclock.program import Program
from lmclock.verify import verify

VOCABULARY = 13
_HEAD = f"""
program  hash "hash" context=64
input    ids tok ids
weight   table {VOCABULARY}x4 f32
weight   w 16x4 f32
"""
_LSTM = "lstm     h, memory[0], x, w, w"
_STORE = "store    kv[0], x, x\nattend   h, kv[0], x   heads=1"
_KV = "heads=1 key=4 value=4"
_ENCODER = f"""
input    src_ids src ids
state    kv[1] paged {_KV}
state    cross[2] frozen {_KV}
section  encode
embed    s, src_ids, table
store    cross[0], s, s
store    cross[1], s, s
"""
_STATES = {
    "paged": (f"state    kv[1] paged {_KV}", _STORE),
    "fixed": ("state    memory[2] fixed width=8", _LSTM),
    "both": (
        f"state    kv[1] paged {_KV}\nstate memory[1] fixed width=8",
        f"{_STORE}\n{_LSTM.replace('h,', 'm,')}",
    ),
    "whole": (f"state    kv[1] paged {_KV}", f"{_STORE} mask=full"),
    "encoder": (_ENCODER, f"{_STORE}\nattend   c, cross[1], h   heads=1 mask=full"),
}
KINDS = ("paged", "fixed", "both", "encoder")


def program(kind: str) -> Program:
    """A sound little program whose states are of one kind of KINDS; `whole` is a paged one whose
    prompt must not be cut.
    """
    states, body = _STATES[kind]
    tail = "pick     y, h\nlinear   logits, y, table\nsample   next, logits"
    return verify(
        listing.parse(f"{_HEAD}{states}\nsection  step\nembed    x, ids, table\n{body}\n{tail}\n")
    )


def logits_of(tokens: Sequence[int], source: Sequence[int]) -> np.ndarray:
    """(VOCABULARY,) logits after `tokens`, a pure function of all of them."""
    text = f"{list(map(int, tokens))} {list(map(int, source))}".encode()
    seed = int.from_bytes(blake2b(text, digest_size=8).digest())
    return np.random.default_rng(seed).normal(scale=2, size=VOCABULARY).astype(np.float32)


def expected(
    request: Request, eos: frozenset[int] = frozenset(), start: Sequence[int] | None = None
) -> tuple[list[int], str]:
    """New tokens and finish of a request; `start` is a prompt with what was generated already."""
    tokens = [int(t) for t in (request.prompt if start is None else start)]
    assert request.max_new_tokens is not None
    last = len(request.prompt) + request.max_new_tokens
    begin, stops = len(tokens), request.stop_ids | (frozenset() if request.ignore_eos else eos)
    while len(tokens) < last:
        settings = request.sampling.record()
        settings["draw"] = len(tokens) - len(request.prompt)
        logits = logits_of(tokens, request.source)
        token = sample_row(logits, settings[0], adjustments(request, tokens))
        if token in stops:
            return tokens[begin:], "stop"
        tokens.append(token)
    return tokens[begin:], "length"


def adjustments(request: Request, tokens: Sequence[int]) -> np.ndarray:
    """ADJUST records counted afresh."""
    sampling = request.sampling
    seen = tokens[-sampling.window :] if sampling.window else tokens
    counts = Counter(seen if sampling.penalises else ())
    ids = sorted({*counts, *sampling.logit_bias})
    rows = [(0, t, counts[t], sampling.logit_bias.get(t, 0)) for t in ids]
    return np.array(rows, ADJUST)


class HashMachine(Machine):
    """See the module's header. `kinds` of its program's states decide what a row sees."""

    traits = Traits("hash", 1, ("f32",), 1e9, "simulated")

    def __init__(self) -> None:
        self.clock = itertools.count()
        self.bound: Batch | None = None
        self.closed = False

    def load(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        capacity: Capacity,
        keep: Sequence[str] = (),
    ) -> None:
        self.program, self.capacity = program, capacity
        self.kinds = {s.name: s.kind for s in program.states}
        self.cells: dict[str, dict[tuple[int, int], int]] = {name: {} for name in self.kinds}
        self.slots: dict[str, dict[int, list[int]]] = {name: {} for name in self.kinds}
        self.copies = 0

    def bind(self, batch: Batch) -> None:
        assert self.bound is None, "bind without the commit of the last batch"
        assert len(set(batch.slots.tolist())) == batch.sequences
        for space, rows in batch.rows.items():
            assert len(rows) <= self.capacity.rows and rows.sequences == batch.sequences
            assert rows.valid.all() and rows.starts[-1] == len(rows), space
        # A cycle has token rows, or it encodes.
        assert len(batch.rows["tok"]) or len(batch.rows["src"])
        assert "src" not in batch.rows or not len(batch.rows["tok"])
        assert len(batch.pick) <= self.capacity.picks
        assert (np.diff(batch.pick) > 0).all() and len(batch.sampling) == len(batch.pick)
        assert (np.diff(batch.adjust["row"]) >= 0).all() and batch.page_size
        self.bound, self.values, self.pending = batch, {}, {}

    def run(self, section: str, first: int = 0, last: int | None = None) -> Ticks:
        assert self.bound is not None
        begin = self.now()
        if first == 0:
            (self._encode if section == "encode" else self._step)(self.bound)
        return Ticks(begin, self.now(), np.zeros((0, 1, 2), np.int64), first)

    def commit(self) -> None:
        assert self.bound is not None
        for (name, slot), history in self.pending.items():
            self.slots[name][slot] = history
        self.bound = None

    def read(self, value: str) -> np.ndarray:
        return self.values[value]

    def write(self, value: str, array: np.ndarray) -> None:
        self.values[value] = array

    def copy(self, state: str, pairs: Sequence[tuple[int, int]]) -> None:
        assert self.bound is None
        self.copies += len(pairs)
        for source, target in pairs:
            if self.kinds[state] == "fixed":
                self.slots[state][target] = list(self.slots[state].get(source, []))
                continue
            for offset in range(self.capacity.page_size):
                self.cells[state].pop((target, offset), None)
                if (source, offset) in self.cells[state]:
                    self.cells[state][target, offset] = self.cells[state][source, offset]

    def now(self) -> int:
        return next(self.clock)

    def close(self) -> None:
        self.closed = True

    def _encode(self, batch: Batch) -> None:
        rows, ids = batch.rows["src"], batch.inputs["src_ids"][:, 0]
        for row, owner in enumerate(rows.owners):
            self._store("cross", batch, int(owner), int(rows.positions[row]), int(ids[row]))

    def _step(self, batch: Batch) -> None:
        rows, ids = batch.rows["tok"], batch.inputs["ids"][:, 0]
        self._complain_of_shared_writes(batch)
        logits = {}
        self.values["x"] = np.repeat(ids[:, None], 4, axis=1).astype(np.float32)
        for row, owner in enumerate(rows.owners.tolist()):
            position, token = int(rows.positions[row]), int(ids[row])
            views = []
            for name, kind in self.kinds.items():
                if kind == "paged":
                    self._store(name, batch, owner, position, token)
                    views.append(self._load(name, batch, owner, position + 1))
                elif kind == "fixed":
                    slot = int(batch.slots[owner])
                    held = self.slots[name].get(slot, []) if position else []
                    self.pending[name, slot] = [*self.pending.get((name, slot), held), token]
                    views.append(self.pending[name, slot])
            assert all(view == views[0] for view in views) and len(views[0]) == position + 1
            source = []
            if "cross" in self.kinds:
                source = self._load("cross", batch, owner, int(batch.lengths["cross"][owner]))
            if row in batch.pick:
                logits[row] = logits_of(views[0], source)
        picked = [logits[row] for row in batch.pick.tolist()]
        self.values["logits"] = np.array(picked, np.float32).reshape(-1, VOCABULARY)
        tokens = [
            sample_row(x, batch.sampling[k], batch.adjust[batch.adjust["row"] == k])
            for k, x in enumerate(picked)
        ]
        self.values["next"] = np.array(tokens, np.int32)[:, None]

    def _complain_of_shared_writes(self, batch: Batch) -> None:
        rows = batch.rows["tok"]
        for name in (n for n, kind in self.kinds.items() if kind == "paged"):
            tables, written = batch.pages[name], Counter[int]()
            for n, table in enumerate(tables):
                mine = rows.positions[rows.starts[n] : rows.starts[n + 1]]
                written.update({int(table[p // batch.page_size]) for p in mine})
            held = Counter(int(page) for table in tables for page in table)
            assert all(held[page] == 1 for page in written), "a shared page is written"

    def _store(self, name: str, batch: Batch, owner: int, position: int, token: int) -> None:
        page = int(batch.pages[name][owner][position // batch.page_size])
        self.cells[name][page, position % batch.page_size] = token

    def _load(self, name: str, batch: Batch, owner: int, length: int) -> list[int]:
        table, size = batch.pages[name][owner], batch.page_size
        return [self.cells[name][int(table[p // size]), p % size] for p in range(length)]


def engine(
    kind: str = "paged", *, page_size: int = 4, tokens: int = 256, rows: int = 0, **options: Any
) -> Engine:
    """An engine for four sequences on a fresh machine."""
    made, machine = program(kind), HashMachine()
    capacity = capacity_for(
        made, sequences=4, tokens=tokens, chunk=16, page_size=page_size, source=12
    )
    if rows:
        capacity = Capacity(rows, 64, 4, page_size, capacity.pages)
    machine.load(made, {}, capacity)
    return Engine(machine, made, capacity=capacity, **options)


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(0, 13, length).tolist()
