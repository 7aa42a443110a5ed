"""Writes down what tests ask of the native machine, for tests/native/replay.cc to repeat without
Python, on a processor of another kind.

    pytest -p tests.recorder --record=build/machine.rec tests/test_native_machine.py

Only machines on path scalar are recorded, and of them what succeeded: programs, batches, runs, and
every value read or written. Numbers are 8-byte little-endian integers, arrays their size in bytes
(-1 for none) and their bytes.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from lmclock import _native

TEST, MAKE, LOAD, BIND, RUN, COMMIT, COPY, READ, WRITE = range(9)  # as in replay.cc


class Recording:
    """A file of messages; `None` while nothing is to be recorded."""

    file: BinaryIO | None = None
    numbers = itertools.count()

    def put(self, *fields: Any) -> None:
        """Integers as they are; anything else as an array."""
        assert self.file is not None
        for x in fields:
            if isinstance(x, int | np.integer):
                self.file.write(int(x).to_bytes(8, "little", signed=True))
            elif x is None:
                self.put(-1)
            else:
                data = np.ascontiguousarray(x).tobytes()
                self.put(len(data))
                self.file.write(data)


RECORDING = Recording()
Core = _native.Machine


class RecordedMachine:
    """Stands for `_native.Machine`."""

    has = staticmethod(Core.has)

    def __init__(self, threads: int, path: str | None) -> None:
        self.core = Core(threads, path)
        self.path, self.threads = self.core.path, self.core.threads
        self.number = next(RECORDING.numbers)
        self.note(MAKE, threads)

    def note(self, kind: int, *fields: Any) -> None:
        if self.path == "scalar":
            RECORDING.put(kind, self.number, *fields)

    def prepare(self, size: int) -> None:
        self.core.prepare(size)  # it changes no number

    def load(self, weights: Any, sections: Any, states: Any, sizes: Any) -> None:
        self.core.load(weights, sections, states, sizes)
        fields: list[Any] = [len(weights)]
        for _, code, rows, width, data, content, *_ in weights:
            fields += [code, rows, width, data, content]
        fields += [len(sections), *itertools.chain(*sections)]
        self.note(LOAD, *fields, len(states), *itertools.chain(*states), *sizes)

    def bind(self, batch: Any, inputs: Any, states: Any, convert: Any) -> None:
        self.core.bind(batch, inputs, states, convert)
        fields: list[Any] = []
        for space in ("tok", "src"):
            rows = batch.rows.get(space)
            fields += [convert(rows.starts, "i"), convert(rows.positions, "i"),
                       convert(rows.valid, "?")] if rows else [None] * 3  # fmt: skip
        given = [convert(batch.inputs[name], code) if name in batch.inputs else None
                 for name, code in inputs]  # fmt: skip
        fields += [len(given), *given, convert(batch.slots, "i"), len(states)]
        for name in states:
            tables = batch.pages.get(name, ()) if name else ()
            lengths = batch.lengths.get(name) if name else None
            fields += [len(tables), *(convert(table, "i") for table in tables),
                       None if lengths is None else convert(lengths, "i")]  # fmt: skip
        self.note(BIND, *fields, convert(batch.pick, "i"), batch.sampling, batch.adjust)

    def run(self, section: int, first: int, last: int, table: Any) -> Any:
        result = self.core.run(section, first, last, table)
        self.note(RUN, section, first, last, result[2][0] if result[2] else 0)
        return result

    def run_many(self, *arguments: Any) -> Any:
        pytest.skip("cycles in one call are not recorded")

    def commit(self) -> None:
        self.core.commit()
        self.note(COMMIT)

    def copy(self, state: int, pairs: Any) -> None:
        self.core.copy(state, pairs)
        self.note(COPY, state, pairs)

    def read(self, section: int, value: int) -> Any:
        array = self.core.read(section, value)
        if array is not None:
            self.note(READ, section, value, *array.shape, array)
        return array

    def write(self, section: int, value: int, array: Any) -> Any:
        done = self.core.write(section, value, array)
        if done:
            self.note(WRITE, section, value, array)
        return done


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what the native machine does to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        RECORDING.file = path.open("wb")
        _native.Machine = RecordedMachine


def pytest_runtest_setup(item: pytest.Item) -> None:
    if RECORDING.file:
        RECORDING.put(TEST, item.name.encode())


def pytest_unconfigure() -> None:
    if RECORDING.file:
        RECORDING.file.close()
        RECORDING.file, _native.Machine = None, Core
