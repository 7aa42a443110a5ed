"""What tests of machines share: weights, sequences on a machine, small programs.

    program = verify(parse(text)), or tests.tiny.llama()
    runner = Runner(program, random_weights(program), machine="array", namespace="torch")
    logits = runner.cycle({"a": [1, 2, 3], "b": [4]})      # rows of two sequences in one batch
    runner.fork("a", "c"); runner.truncate("c", 2)
    logits = runner.cycle({"c": [7]}, padding=2)

`computed(body, declare, namespace, x=...)` runs a few instructions on the array machine.
`arithmetic_error(a, b)` is the normalised mean square error that tolerances are stated in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from lmclock.batch import ADJUST, SAMPLING, Batch, Rows
from lmclock.formats import SCALE_WORDS, Format, get_format, unpack
from lmclock.listing import parse
from lmclock.machines import Capacity, Machine, create
from lmclock.packing import pack
from lmclock.program import Program, Weight
from lmclock.verify import verify

PAGE_SIZE = 4  # small, so that short sequences cross pages


# --- weights


@dataclass(frozen=True)
class Stored:
    """A weight as a file gives it (machines.Tensor)."""

    name: str
    shape: tuple[int, int]
    format: Format
    data: np.ndarray

    def unpack(self) -> np.ndarray:
        return unpack(self.format, self.data, *self.shape)


def stored(name: str, values: np.ndarray, form: str = "f32") -> Stored:
    """`values` (rows, width) rounded to a format that can be written (no K-quants)."""
    fmt = get_format(form)
    return Stored(name, values.shape, fmt, pack(fmt, values).reshape(-1))


def random_blocks(fmt: Format, rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a K-quant with random levels and scales near 2^-9, so that values stay below 1."""
    raw = rng.integers(0, 256, rows * fmt.row_bytes(width), np.uint8)
    for word in SCALE_WORDS[fmt.name]:
        scales = raw.reshape(-1, fmt.bytes).view("<f2")[:, word]
        scales[...] = rng.uniform(-1, 1, len(scales)) * 2.0**-9
    return raw


def random_weight(w: Weight, rng: np.random.Generator) -> Stored:
    """Near one for single rows (norms and biases), else such that activations keep their size."""
    if w.format.endswith("_k"):
        fmt = get_format(w.format)
        return Stored(w.name, w.shape, fmt, random_blocks(fmt, *w.shape, rng))
    values = rng.standard_normal(w.shape) / np.sqrt(w.shape[1])
    return stored(w.name, values if w.shape[0] > 1 else 1 + values, w.format)


def random_weights(program: Program, seed: int = 0) -> dict[str, Stored]:
    """One tensor for every declared weight without values of its own."""
    rng = np.random.default_rng(seed)
    return {w.name: random_weight(w, rng) for w in program.weights if w.values is None}


def arithmetic_error(got: np.ndarray, want: np.ndarray) -> float:
    """NMSE: mean square of the difference over mean square of the reference."""
    want = np.asarray(want, np.float64)
    power = float(np.mean(want**2)) if want.size else 0.0
    return float(np.mean((got - want) ** 2)) / (power or 1.0) if want.size else 0.0


# --- sequences on a machine


@dataclass
class Held:
    """What one sequence has of the machine."""

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    source_length: int = 0


class Runner:
    """Sequences by name on one machine, with pages given out in scrambled order.

    A small engine that tests can see through: pages are shared by `fork` only, copied on write,
    and freed as soon as nobody holds them.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Any],
        machine: str | Machine = "array",
        pages: int = 64,
        slots: int = 16,
        **options: object,
    ) -> None:
        self.program = program
        self.machine = create(machine, **options) if isinstance(machine, str) else machine
        self.paged = [s.name for s in program.states if s.kind == "paged"]
        self.frozen = [s.name for s in program.states if s.kind == "frozen"]
        self.fixed = [s.name for s in program.states if s.kind == "fixed"]
        counts = dict.fromkeys(self.paged + self.frozen, pages)
        self.machine.load(program, weights, Capacity(512, 512, slots, PAGE_SIZE, counts))
        # Strides that visit every page once: neighbours in a sequence are no neighbours in memory.
        self.free = [(7 * k + 3) % pages for k in range(pages)]
        self.free_source = [(5 * k + 1) % pages for k in range(pages)]
        self.free_slots = list(range(slots))
        self.held: dict[str, Held] = {}

    def batch(
        self,
        work: Mapping[str, Sequence[int]],
        source: Mapping[str, Sequence[int]] | None = None,
        pick: str = "last",
        padding: int = 0,
        sampling: np.ndarray | None = None,
        adjust: np.ndarray | None = None,
        **inputs: np.ndarray,
    ) -> Batch:
        """The batch that feeds each sequence its token ids, pages reserved; new names are opened.

        `padding` rows with valid = 0 follow the rows of every sequence. `pick` is "last", "all" or
        "none"; `inputs` are those besides `ids`, `pos` and `src_ids`.
        """
        held = [self._open(name, (source or {}).get(name)) for name in work]
        starts = [h.length for h in held]
        for h, ids in zip(held, work.values(), strict=True):
            if ids:
                self._reserve(h, h.length + len(ids))
        tok, ids = _rows(list(work.values()), starts, padding)
        src, source_ids = _rows([(source or {}).get(name, []) for name in work], [0] * len(work), 0)
        known = {"ids": ids, "pos": tok.positions[:, None] * tok.valid[:, None], **inputs}
        known |= {"src_ids": source_ids, "src_pos": src.positions[:, None]}
        declared = {i.name for i in self.program.inputs}
        valid = np.flatnonzero(tok.valid)
        last = [rows[-1] for n in range(len(held)) if len(rows := valid[tok.owners[valid] == n])]
        chosen = {"last": last, "all": valid, "none": []}[pick]
        return Batch(
            rows={"tok": tok, "src": src},
            inputs={name: x for name, x in known.items() if name in declared},
            slots=np.array([h.slot for h in held], np.int32),
            pages={n: [np.array(h.pages, np.int32) for h in held] for n in self.paged}
            | {n: [np.array(h.source, np.int32) for h in held] for n in self.frozen},
            lengths={n: np.array([h.source_length for h in held], np.int32) for n in self.frozen},
            page_size=PAGE_SIZE,
            pick=np.array(chosen, np.int32),
            sampling=greedy(len(chosen)) if sampling is None else sampling,
            adjust=np.empty(0, ADJUST) if adjust is None else adjust,
        )

    def cycle(
        self,
        work: Mapping[str, Sequence[int]],
        source: Mapping[str, Sequence[int]] | None = None,
        value: str = "logits",
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Bind, run and commit; the picked rows of `value` for each sequence."""
        batch = self.batch(work, source, **options)
        self.machine.bind(batch)
        if source:
            self.machine.run("encode")
        self.machine.run("step")
        rows = self.machine.read(value)
        self.advance(work)
        owners = batch.rows["tok"].owners[batch.pick]
        return {name: rows[owners == number] for number, name in enumerate(work)}

    def advance(self, work: Mapping[str, Sequence[int]]) -> None:
        """Commit what a bound batch has run."""
        self.machine.commit()
        for name, ids in work.items():
            self.held[name].length += len(ids)

    def fork(self, name: str, child: str) -> None:
        """`child` goes on from where `name` is: pages are shared until one of the two writes."""
        parent = self.held[name]
        slot = self.free_slots.pop()
        for state in self.fixed:
            self.machine.copy(state, [(parent.slot, slot)])
        self.held[child] = replace(parent, slot=slot, pages=list(parent.pages))

    def truncate(self, name: str, length: int) -> None:
        """Forget positions from `length` on: of paged states only, nothing is copied or cleared."""
        assert not self.fixed, "a fixed state goes back only to a copy"
        held = self.held[name]
        held.length = length
        gone = held.pages[-(-length // PAGE_SIZE) :]
        del held.pages[-(-length // PAGE_SIZE) :]
        self._give_back(gone)

    def close(self, name: str) -> None:
        """Give back the slot, and the pages nobody else holds."""
        gone = self.held.pop(name)
        self.free_slots.append(gone.slot)
        self._give_back(gone.pages)

    def _shared(self, page: int) -> int:
        """How many sequences hold the page."""
        return sum(page in h.pages for h in self.held.values())

    def _give_back(self, pages: list[int]) -> None:
        self.free += [page for page in pages if not self._shared(page)]

    def _reserve(self, held: Held, length: int) -> None:
        """Pages for positions up to `length`; the one written first becomes the sequence's own."""
        number, partly = divmod(held.length, PAGE_SIZE)
        if partly and self._shared(held.pages[number]) > 1:
            old, held.pages[number] = held.pages[number], self.free.pop()
            for state in self.paged:
                self.machine.copy(state, [(old, held.pages[number])])
        while len(held.pages) * PAGE_SIZE < length:
            held.pages.append(self.free.pop())

    def _open(self, name: str, source: Sequence[int] | None) -> Held:
        if name not in self.held:
            self.held[name] = Held(self.free_slots.pop())
        held = self.held[name]
        if source and self.frozen:
            held.source_length = len(source)
            held.source = [self.free_source.pop() for _ in range(-(-len(source) // PAGE_SIZE))]
        return held


def _rows(parts: list[Sequence[int]], starts: list[int], padding: int) -> tuple[Rows, np.ndarray]:
    """Rows and (rows, 1) ids of sequences that stand at `starts`, each followed by padding."""
    rows = Rows.of([(at, len(part) + padding) for at, part in zip(starts, parts, strict=True)])
    ids = np.zeros((len(rows), 1), np.int32)
    for number, part in enumerate(parts):
        first = rows.starts[number]
        ids[first : first + len(part), 0] = part
        rows.valid[first + len(part) : rows.starts[number + 1]] = False
    return rows, ids


def greedy(rows: int) -> np.ndarray:
    """SAMPLING records of greedy decoding."""
    return sampling(rows)


def sampling(rows: int, **settings: float) -> np.ndarray:
    """SAMPLING records, all alike; what is not named is off."""
    records = np.zeros(rows, SAMPLING)
    records["top_p"] = records["repetition"] = 1
    for name, value in settings.items():
        records[name] = value
    return records


# --- programs


def op_program(body: str, declare: str = "", section: str = "step") -> Program:
    """A verified program of one section: `declare` holds its input, weight and state lines."""
    return verify(parse(f'program test "test"\n{declare}\nsection {section}\n{body}\n'))


# --- a few instructions over given inputs

on_both = pytest.mark.parametrize("namespace", ["numpy", "torch"])
SPANS = [(3, 4), (0, 1), (7, 0), (0, 5)]  # (first position, rows) of four sequences
TOTAL = sum(count for _, count in SPANS)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 of a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def loaded(
    program: Program, weights: Mapping[str, Any], namespace: str, dtype: str = "float32"
) -> Any:
    """An array machine with the program loaded and 16 pages of every state."""
    machine = create("array", namespace=namespace, dtype=dtype)
    pages = {s.name: 16 for s in program.states}
    machine.load(program, weights, Capacity(page_size=PAGE_SIZE, pages=pages))
    return machine


def batch_of(program: Program, spans: list[tuple[int, int]], **inputs: np.ndarray) -> Batch:
    """Sequences at `spans` of space `tok`; sequence n has slot n and pages 4n.. of every state."""
    n = len(spans)
    pages = {s.name: [np.arange(4) + 4 * k for k in range(n)] for s in program.states}
    rows = {"tok": Rows.of(spans), "src": Rows.of([(0, 0)] * n)}
    return Batch(rows, inputs, np.arange(n), pages, page_size=PAGE_SIZE)


def computed(
    body: str,
    declare: str,
    namespace: str,
    spans: list[tuple[int, int]] = SPANS,
    section: str = "step",
    weights: Mapping[str, Any] | None = None,
    **inputs: np.ndarray,
) -> Any:
    """The array machine after running `body` over inputs given as arrays of `tok` rows."""
    kinds = {name: "ids" if x.dtype.kind == "i" else f"f32 width={x.shape[1]}"
             for name, x in inputs.items()}  # fmt: skip
    lines = [f"input {name} tok {kind}" for name, kind in kinds.items()]
    program = op_program(body, "\n".join([*lines, declare]), section)
    machine = loaded(program, weights or random_weights(program), namespace)
    machine.bind(batch_of(program, spans, **inputs))
    machine.run(section)
    return machine
