"""The native machine: one C++ call per run, on persistent threads, for this processor's SIMD path.

    machine = create(threads=2)                 # path="avx2" forces a narrower path
    machine.load(program, weights, capacity); machine.bind(batch); machine.run("step")

This file turns programs, batches and faults into what native/machine.h takes, and nothing else: it
never computes, and never calls another machine. Sections `train` and opcodes without a native
function are refused at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from mmap import mmap
from typing import Any

import numpy as np

from lmclock import _native, settings
from lmclock.batch import Batch
from lmclock.errors import LmclockError, OptionError, ProgramError, UnsupportedError, choices
from lmclock.formats import FORMATS, get_format
from lmclock.isa import OPCODES, SPACES, Instruction
from lmclock.machines import Capacity, Feed, Machine, Tensor, Ticks, Traits
from lmclock.program import CACHE_FORMATS, STATE_KINDS, Program, encode, value_names

SECTIONS = ("encode", "step")
VECTOR_OPS = ("norm",)  # whose weights are rows added or multiplied, not matrices


def create(threads: int | None = None, path: str | None = None) -> NativeMachine:
    """A machine on so many threads (default: settings.threads()) and on one SIMD path (default: the
    widest one found).
    """
    path = path or settings.simd_path()
    valid = _native.simd_paths()
    if path is not None and path not in (*valid, *_native.emulated_paths()):
        raise OptionError(f"path={path!r} is not available here; valid: {choices(valid)}")
    return NativeMachine(settings.threads() if threads is None else threads, path)


class NativeMachine(Machine):
    """See the module's header. Calls are not thread-safe: one caller at a time."""

    def __init__(self, threads: int, path: str | None) -> None:
        if not 1 <= threads <= 1024:
            raise OptionError(f"threads={threads} is no thread count; valid: 1 to 1024")
        self._core = _native.Machine(threads, path)
        source, rate = _native.tick_source()
        self.now = _native.ticks  # type: ignore[method-assign]
        self.path: str = self._core.path
        self._absent = "no program is loaded"  # why nothing can be run; empty when it can
        self.traits = Traits("native", threads, tuple(FORMATS), rate, source, many=True)

    # --- load

    def prepare(self, size: int) -> None:
        self._core.prepare(size)

    def load(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        capacity: Capacity,
        keep: Sequence[str] = (),
    ) -> None:
        self._absent = "no program is loaded, since the last load failed"
        _check_supported(program, self.path)
        self.program, self.capacity = program, capacity
        self._section_names = [section.name for section in program.sections]
        self._sections = {name: number for number, name in enumerate(self._section_names)}
        self._instructions = {s.name: s.instructions for s in program.sections}
        self._names = {name: value_names(program, name) for name in self._sections}
        self._numbers = {s: {v: n for n, v in enumerate(names)} for s, names in self._names.items()}
        self._last_section = self._section_names[0] if self._section_names else ""
        slots = _Slots(program, keep)
        sections = [
            (np.frombuffer(encode(program, name).tobytes(), np.uint8), slots.values(name))
            for name in self._section_names
        ]
        arrays = _weight_arrays(program, weights)
        states = [
            (STATE_KINDS.index(s.kind), s.count, s.heads, s.key, s.value, s.width,
             get_format(s.format).code, capacity.pages.get(s.name, 0))
            for s in program.states
        ]  # fmt: skip
        self._core.load(
            arrays, sections, states,
            (len(program.inputs), slots.count, capacity.rows, capacity.picks, capacity.slots,
             capacity.page_size),
        )  # fmt: skip
        self._paged = [s.name if s.kind != "fixed" else None for s in program.states]
        self._inputs = [(i.name, "i" if i.ids else "f") for i in program.inputs]
        self._absent = ""

    # --- cycles

    def bind(self, batch: Batch) -> None:
        if self._absent:
            raise ProgramError(self._absent)
        if batch.page_size != self.capacity.page_size:
            raise ProgramError(
                f"the batch has pages of {batch.page_size}, "
                f"not of {self.capacity.page_size} positions"
            )
        self._core.bind(batch, self._inputs, self._paged, np.ascontiguousarray)

    def run(self, section: str, first: int = 0, last: int | None = None) -> Ticks:
        if self._absent:
            raise ProgramError(self._absent)
        number = self._sections.get(section)
        if number is None:
            self.program.section(section)  # says what there is
        instructions = self._instructions[section]
        last = len(instructions) if last is None else last
        if not 0 <= first <= last <= len(instructions):
            raise ProgramError(
                f"span {first}..{last} is not within the {len(instructions)} instructions "
                f"of section {section}"
            )
        self._last_section = section
        table = np.empty((self.traits.threads, last - first, 2), np.int64)  # as threads fill it
        try:
            begin, end, fault = self._core.run(number, first, last, table)
        except LookupError as error:
            raise self._gone(self._names[section][error.args[0]]) from None
        if fault:
            self._raise(instructions[fault[1]], *fault)
        return Ticks(begin, end, table.swapaxes(0, 1), first)

    def run_many(self, section: str, most: int, feed: Feed) -> tuple[list[Ticks], np.ndarray]:
        if self._absent:
            raise ProgramError(self._absent)
        self._last_section = section
        instructions, numbers = self._instructions[section], self._numbers[section]
        inputs = [-1 if name is None else numbers[name] for name in (feed.ids, feed.positions)]
        starts = np.cumsum([0, *map(len, feed.stops)], dtype=np.int32)
        stops = np.array([token for ids in feed.stops for token in ids], np.int32)
        table = np.empty((most, self.traits.threads, len(instructions), 2), np.int64)
        bounds, tokens = np.empty((most, 2), np.int64), np.empty((most, len(feed.stops)), np.int32)
        done, fault = self._core.run_many(
            self._sections[section], len(instructions),
            (*inputs, numbers[feed.next], stops, starts), table, bounds, tokens,
        )  # fmt: skip
        if fault:
            self._raise(instructions[fault[1]], *fault)
        tables, edges = table.swapaxes(1, 2), bounds[:done].tolist()
        return [Ticks(a, b, tables[n]) for n, (a, b) in enumerate(edges)], tokens[:done]

    def commit(self) -> None:
        if self._absent:
            raise ProgramError(self._absent)
        self._core.commit()

    def read(self, value: str) -> np.ndarray:
        section, number = self._find(value)
        array: np.ndarray | None = self._core.read(self._sections[section], number)
        if array is None:
            raise self._gone(value)
        return array

    def write(self, value: str, array: np.ndarray) -> None:
        section, number = self._find(value)
        old = self.read(value)
        if np.shape(array) != old.shape:
            raise ProgramError(f"{value} is {old.shape}, not {np.shape(array)}")
        self._core.write(self._sections[section], number, _array(array, old.dtype))

    def copy(self, state: str, pairs: Sequence[tuple[int, int]]) -> None:
        if self._absent:
            raise ProgramError(self._absent)
        declared, _ = self.program.state(f"{state}[0]")
        self._core.copy(self.program.states.index(declared), _array(np.array(pairs).reshape(-1)))

    def now(self) -> int:
        ticks: int = _native.ticks()
        return ticks

    def close(self) -> None:
        self._core, self._absent = None, "the machine is closed"

    # --- inside

    def _find(self, value: str) -> tuple[str, int]:
        """The section, last run first, that defines `value`, and the value's number."""
        if self._absent:
            raise ProgramError(self._absent)
        for section in (self._last_section, *self._section_names):
            if value in self._numbers[section]:
                return section, self._numbers[section][value]
        raise ProgramError(f"program {self.program.name!r} has no value {value!r}")

    def _gone(self, value: str) -> ProgramError:
        return ProgramError(
            f"value {value} is not in its register: it is not defined yet, or another value has "
            "taken its place; load the program with keep= for it"
        )

    def _raise(self, i: Instruction, kind: int, _: int, value: int, limit: int) -> None:
        """The exception of a fault; the kinds are those of native/frame.h."""
        where = f"{i.op} {', '.join(i.outs)}"
        if kind == 1:
            what = f"row {value} of {i.weights[0]}" if i.weights else f"id {value}"
            raise ProgramError(f"{where}: {what} does not exist; valid: 0 to {limit - 1}")
        raise LmclockError(f"{where}: logits of row {value} are not finite")


class _Slots:
    """Which buffer each value gets: its register's, or one of its own; sections share inputs."""

    def __init__(self, program: Program, keep: Sequence[str]) -> None:
        self.program = program
        self.keep = set(keep)
        self.registers = dict(program.registers)
        self.number: dict[Any, int] = {}
        for i in program.inputs:
            self._slot(("input", i.name))

    @property
    def count(self) -> int:
        return len(self.number)

    def _slot(self, key: Any) -> int:
        return self.number.setdefault(key, len(self.number))

    def values(self, section: str) -> np.ndarray:
        """(values, 4) int32 of space, width, whether ids, slot, numbered as in the encoding."""
        types = self.program.types(section)
        inputs = {i.name for i in self.program.inputs}
        table = []
        for name in value_names(self.program, section):
            register = None if name in self.keep else self.registers.get(name)
            if name in inputs:
                slot = self._slot(("input", name))
            else:
                slot = self._slot((section, name) if register is None else register)
            kind = types[name]
            table.append((SPACES.index(kind.space), kind.width, int(kind.ids), slot))
        return np.array(table, np.int32).reshape(-1, 4)


def _check_supported(program: Program, path: str) -> None:
    for section in program.sections:
        if section.name not in SECTIONS:
            raise UnsupportedError(
                f"the native machine has no section {section.name}; valid: {choices(SECTIONS)}"
            )
        for op in {i.op for i in section.instructions}:
            if not _native.Machine.has(path, OPCODES[op].code):
                have = [o.name for o in OPCODES.values() if _native.Machine.has(path, o.code)]
                raise UnsupportedError(
                    f"the native machine has no opcode {op}; valid: {choices(have)}"
                )
        _check_registers(program, section.instructions)
    for state in program.states:
        if state.format not in CACHE_FORMATS:
            raise UnsupportedError(
                f"state {state.name} has format {state.format}; valid: {choices(CACHE_FORMATS)}"
            )
        widths = (state.width,) if state.kind == "fixed" else (state.key, state.value)
        if state.format == "q8_0" and any(width % 32 for width in widths):
            raise UnsupportedError(
                f"state {state.name} has rows of {choices(widths)} elements; format q8_0 needs "
                "multiples of 32"
            )


def _check_registers(program: Program, instructions: tuple[Instruction, ...]) -> None:
    """An instruction streams its operands: what it writes must not lie where it reads."""
    registers = dict(program.registers)
    for i in instructions:
        read = {registers[name] for name in i.reads() if name in registers}
        for name in i.outs:
            if registers.get(name) in read:
                raise ProgramError(
                    f"{i.op} {name}: register {registers[name]} is both read and written"
                )


def _weight_arrays(program: Program, weights: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """(name, format code, rows, width, stored bytes, f32 content or None, whether the bytes are
    those of a mapped file) of every declared weight.

    The content is unpacked only where some instruction reads the weight as a vector.
    """
    vectors: set[str] = set()
    for section in program.sections:
        for i in section.instructions:
            operands = i.all_weights()
            vectors.update(operands if i.op in VECTOR_OPS else operands[len(i.weights) :])
    arrays: list[tuple[Any, ...]] = []
    content: np.ndarray | None
    for w in program.weights:
        if w.values is not None:
            content = np.array(w.values, np.float32).reshape(w.shape)
            data, code = content.reshape(-1).view(np.uint8), get_format("f32").code
        else:
            if w.name not in weights:
                raise ProgramError(f"weight {w.name} is declared but not given")
            tensor = weights[w.name]
            if int(np.prod(tensor.shape)) != w.shape[0] * w.shape[1]:
                raise ProgramError(
                    f"weight {w.name} is declared as {w.shape}, but given as {tuple(tensor.shape)}"
                )
            if tensor.format.name not in FORMATS:
                raise UnsupportedError(f"weight {w.name} has format {tensor.format.name}")
            data, code = tensor.data, tensor.format.code
            content = tensor.unpack() if w.name in vectors else None
        if content is not None:
            content = np.ascontiguousarray(content, np.float32)
        arrays.append((w.name, code, *w.shape, data, content, _is_mapped(data)))
    return arrays


def _is_mapped(data: np.ndarray) -> bool:
    """Whether the bytes lie in a read-only map of a file, whose pages can be dropped once read."""
    owner: Any = data
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    return isinstance(owner, mmap) and memoryview(owner).readonly


def _array(x: Any, kind: Any = np.int32) -> Any:
    return None if x is None else np.ascontiguousarray(x, kind)
