"""The contract every machine keeps. One file per machine beside this one, found by name:
`create("native")`.

    load(program, weights, capacity)   place weights, allocate registers and states
    bind(batch)                        fix rows, positions, pages: lengths are numbers from here on
    run(section, first, last)          execute a span; may be repeated until commit with the same
    result
    commit()                           states advance: what the batch's rows wrote is there for the
    next cycle
    read(value), write(value, array)   look at or replace one live value
    copy(state, pairs)                 copy pages (or slots) of a state, for fork and copy-on-write

Forking, truncating and freeing sequences is bookkeeping of page numbers, done in cache.py; the
machine owns the bytes and only ever copies. A paged state needs no truncation (positions past the
end are overwritten); a fixed one is copied to a spare slot where a way back is wanted. Nothing is
ever cleared: a sequence whose first row stands at position 0 starts from zeros in its fixed states.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lmclock.batch import Batch
from lmclock.errors import OptionError, UnsupportedError, choices
from lmclock.formats import FORMATS, Format
from lmclock.program import Program

MACHINES = {
    "array": "reference, on NumPy or PyTorch",
    "native": "C++ SIMD machine of this processor",
}


class Tensor(Protocol):
    """A stored weight: shape (rows, width), C order, its number format and raw bytes."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> Format: ...
    @property
    def data(self) -> np.ndarray: ...  # uint8, contiguous
    def unpack(self) -> np.ndarray: ...  # float32 (rows, width)


@dataclass(frozen=True)
class Capacity:
    """What a machine sets aside at load: most rows of one cycle, most picked rows, slots, and
    pages per state.
    """

    rows: int = 512
    picks: int = 64
    slots: int = 8
    page_size: int = 64  # positions per page
    pages: Mapping[str, int] = field(default_factory=dict)  # state name -> pages


@dataclass(frozen=True)
class Ticks:
    """Time stamps of one run, in integer ticks (traits.tick_rate per second).

    `begin` and `end` bound the run on the calling thread; `table` is (instructions, threads, 2):
    when each thread began and
    ended its share. A machine with coarser grain (see Traits.grain) gives a table of one row per
    span.
    """

    begin: int
    end: int
    table: np.ndarray
    first: int = 0  # the instruction of table row 0


@dataclass(frozen=True)
class Feed:
    """How run_many makes a cycle from the one before: the inputs that take the tokens sampled and
    their positions (None: there is no such input), the value that holds the tokens, and the ids
    that end each sequence.
    """

    ids: str | None
    positions: str | None
    next: str
    stops: Sequence[Collection[int]]


@dataclass(frozen=True)
class Traits:
    """What a machine can do, so that callers ask instead of guessing by name."""

    name: str
    threads: int
    formats: tuple[str, ...]
    tick_rate: float  # ticks per second of now() and Ticks
    tick_source: str  # "pmu", "tsc", "wall", or "simulated"
    grain: str = "instruction"  # what a row of Ticks.table stands for: instruction or run
    gradients: bool = False
    buckets: tuple[int, ...] = ()  # row counts it pads to; () for any
    many: bool = False  # it has run_many


class Machine(ABC):
    """See the module's header. A machine never computes through another one."""

    traits: Traits

    def prepare(self, size: int) -> None:  # noqa: B027
        """Weights of about `size` bytes are to be loaded: a machine may get memory ready."""

    @abstractmethod
    def load(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        capacity: Capacity,
        keep: Sequence[str] = (),
    ) -> None:
        """Place weights and allocate. UnsupportedError names an opcode or format the machine
        lacks.
        """

    @abstractmethod
    def bind(self, batch: Batch) -> None: ...

    @abstractmethod
    def run(self, section: str, first: int = 0, last: int | None = None) -> Ticks:
        """Execute instructions first..last-1 of `section` on the bound batch."""

    def run_many(self, section: str, most: int, feed: Feed) -> tuple[list[Ticks], np.ndarray]:
        """Up to `most` whole cycles from the bound batch of one picked row a sequence, each fed
        with the tokens of the one before and committed; the last is one in which a sequence samples
        an id of its `feed.stops`. Their ticks, and the tokens (cycles, rows). Only where
        traits.many says so.
        """
        raise UnsupportedError(f"machine {self.traits.name!r} runs one cycle at a time")

    @abstractmethod
    def commit(self) -> None: ...

    @abstractmethod
    def read(self, value: str) -> np.ndarray:
        """(rows, width): legal from its definition to its last use, or always if it was named in
        `keep`.
        """

    @abstractmethod
    def write(self, value: str, array: np.ndarray) -> None:
        """Replace a live value; later instructions see it."""

    @abstractmethod
    def copy(self, state: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (from, to) pages of all states declared under the name `state`; slots for a fixed
        state.
        """

    @abstractmethod
    def now(self) -> int:
        """The time in ticks; the engine's only clock, so that a simulator can keep its own."""

    def close(self) -> None:
        """Give back threads and memory; the machine is of no use afterwards."""
        return None


def create(name: str, **options: object) -> Machine:
    """The machine called `name`; options go to its constructor (threads=, path=, namespace=)."""
    if name not in MACHINES:
        raise OptionError(f"machine {name!r} is unknown; valid: {choices(MACHINES)}")
    machine: Machine = importlib.import_module(f"lmclock.machines.{name}").create(**options)
    return machine


def repacked(program: Program) -> list[str]:
    """A sentence for each number format that the native machine keeps in another layout."""
    import lmclock._native as _native

    names = sorted({w.format for w in program.weights})
    layouts = {name: _native.layout_name(FORMATS[name].code) for name in names}
    return [
        f"native keeps {name} as {layout}, without loss of accuracy"
        for name, layout in layouts.items()
        if layout != name
    ]
