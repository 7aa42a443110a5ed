"""The array machine: the reference that defines what every opcode means, on NumPy or PyTorch.

    machine = create("numpy")                   # or "torch", device="cuda", dtype="float64"
    machine.load(program, weights, capacity); machine.bind(batch); machine.run("step")
    machine.read("logits")

All values of a batch are kept until the next bind, whatever `keep` says, and `place` is ignored.
On PyTorch, section `train` records gradients: `machine.weights[name]` are the leaves,
`machine.value(name)` the tensors. This file keeps the contract of machines/__init__.py; the
opcodes' meanings are in array_ops.py, array_attend.py and array_sample.py.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lmclock import formats, isa, packing
from lmclock.batch import Batch
from lmclock.errors import ContextError, OptionError, ProgramError, UnsupportedError, choices
from lmclock.isa import Instruction, Type
from lmclock.machines import Capacity, Machine, Tensor, Ticks, Traits
from lmclock.machines.array_ops import OPERATIONS
from lmclock.machines.array_rows import SpaceRows, space_rows
from lmclock.program import Program, State

Array = Any  # of the machine's namespace
NAMESPACES = ("numpy", "torch")
DTYPES = ("float32", "float64")


def create(
    namespace: str = "numpy", device: str | None = None, dtype: str = "float32"
) -> ArrayMachine:
    """A machine on one array library; `device` is PyTorch's name of one."""
    if namespace not in NAMESPACES:
        raise OptionError(f"namespace={namespace!r} is unknown; valid: {choices(NAMESPACES)}")
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype!r} is unknown; valid: {choices(DTYPES)}")
    if namespace == "numpy" and device not in (None, "cpu"):
        raise OptionError(f"device={device!r} needs namespace=torch; NumPy has only cpu")
    return ArrayMachine(namespace, device or "cpu", dtype)


class ArrayMachine(Machine):
    """See the module's header. `seed` chooses the masks of dropout: set it before each step."""

    def __init__(self, namespace: str, device: str, dtype: str) -> None:
        try:
            self.xp = importlib.import_module(f"array_api_compat.{namespace}")
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"the array machine needs the package {error.name}") from None
        self.device = device
        self.torch = namespace == "torch"
        self.dtype = getattr(self.xp, dtype)
        self.traits = Traits(
            name="array",
            threads=1,
            formats=tuple(formats.FORMATS),
            tick_rate=1e9,
            tick_source="wall",
            gradients=self.torch,
        )
        self.seed = 0
        self.weights: dict[str, Array] = {}
        self.states: dict[str, Any] = {}  # kv[3] -> (keys, values), or (slots, width)

    # --- the contract

    def load(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        capacity: Capacity,
        keep: Sequence[str] = (),
    ) -> None:
        self.program, self.capacity = program, capacity
        self.types = {s.name: _all_types(program, s.name) for s in program.sections}
        self.weights = {w.name: self._weight(w, weights) for w in program.weights}
        self.states = {
            f"{state.name}[{index}]": self._allocate(state)
            for state in program.states
            for index in range(state.count)
        }

    def bind(self, batch: Batch) -> None:
        self._check(batch)
        self.batch = batch
        self.section = ""
        self._rows: dict[str, SpaceRows] = {}
        self._pending: dict[str, dict[int, Array]] = {}  # fixed state -> slot -> new content
        self.fresh: dict[str, tuple[Array, Array, str]] = {}  # states of section `train`
        kinds = {i.name: i.ids for i in self.program.inputs}
        self._values = {
            name: (self.ids if kinds[name] else self.floats)(np.asarray(x))
            for name, x in batch.inputs.items()
        }

    def run(self, section: str, first: int = 0, last: int | None = None) -> Ticks:
        instructions = self.program.section(section).instructions
        last = len(instructions) if last is None else last
        if not 0 <= first <= last <= len(instructions):
            raise ProgramError(
                f"span {first}..{last} is not within the {len(instructions)} instructions "
                f"of section {section}"
            )
        self.section = section
        table = np.zeros((last - first, 1, 2), np.int64)
        begin = self.now()
        with self._gradients(section == "train"):
            for stamps, i in zip(table, instructions[first:last], strict=True):
                stamps[0, 0] = self.now()
                self._execute(i)
                stamps[0, 1] = self.now()
        return Ticks(begin, self.now(), table, first)

    def commit(self) -> None:
        for name, slots in self._pending.items():
            for slot, content in slots.items():
                self.states[name][slot, :] = content
        self._pending = {}

    def read(self, value: str) -> np.ndarray:
        return self.numpy(self.value(value)).copy()

    def write(self, value: str, array: np.ndarray) -> None:
        old = self.value(value)
        if tuple(np.shape(array)) != tuple(old.shape):
            raise ProgramError(f"{value} is {tuple(old.shape)}, not {tuple(np.shape(array))}")
        floating = self.xp.isdtype(old.dtype, "real floating")
        self._values[value] = (self.floats if floating else self.ids)(np.asarray(array))

    def copy(self, state: str, pairs: Sequence[tuple[int, int]]) -> None:
        declared, _ = self.program.state(f"{state}[0]")
        for index in range(declared.count):
            held = self.states[f"{state}[{index}]"]
            for array in held if isinstance(held, tuple) else (held,):
                for source, target in pairs:
                    array[target, ...] = array[source, ...]

    def now(self) -> int:
        return time.perf_counter_ns()

    def value(self, name: str) -> Array:
        """The array behind `read`, with its gradient history; ProgramError if it is undefined."""
        if name not in self._values:
            have = choices(self._values)
            raise ProgramError(f"value {name} is not defined; defined are {have or 'none'}")
        return self._values[name]

    # --- what the opcodes ask of the machine

    def rows(self, value: str) -> SpaceRows:
        """The rows of a value's space in the bound batch."""
        space = self.types[self.section][value].space
        if space not in self._rows:
            self._rows[space] = space_rows(self.batch, space)
        return self._rows[space]

    def row(self, weight: str) -> Array:
        """A weight that is a single row, (width,)."""
        return self.xp.reshape(self.weights[weight], (-1,))

    def take(self, x: Array, indices: np.ndarray) -> Array:
        """Rows of x."""
        return self.xp.take(x, self.index(indices), axis=0)

    def index(self, array: np.ndarray) -> Array:
        """Indices or a mask computed on the host."""
        return self.xp.asarray(array, device=self.device)

    def floats(self, array: np.ndarray) -> Array:
        return self.xp.asarray(array, dtype=self.dtype, device=self.device)

    def ids(self, array: np.ndarray) -> Array:
        return self.xp.asarray(array, dtype=self.xp.int32, device=self.device)

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)

    def number(self, value: float) -> Array:
        return self.xp.asarray(value, dtype=self.dtype, device=self.device)

    def numpy(self, x: Array) -> np.ndarray:
        return x.detach().cpu().numpy() if self.torch else x

    def erf(self, x: Array) -> Array:
        """The array API has no erf."""
        if self.torch:
            return self.xp.erf(x)
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), x.dtype)

    def rounded(self, x: Array, how: str) -> Array:
        """x as it comes back from number format `how`, or from activation rounding q8_32.

        On PyTorch the gradient passes straight through.
        """
        if how == "f32" or not x.shape[0]:
            return x
        if how == "q8_32":
            y = formats.round_q8_32(x, self.xp)
        else:
            form, flat = formats.get_format(how), self.numpy(x).reshape(-1, x.shape[-1])
            y = formats.unpack(form, packing.pack(form, flat), *flat.shape)
            y = self.xp.reshape(self.floats(y), x.shape)
        # x - x is an exact zero that carries the gradient
        return y.detach() + (x - x.detach()) if self.torch and x.requires_grad else y

    def recurrent_state(
        self, state: str | None, sequence: int, position: int, hidden: int
    ) -> tuple[Array, Array]:
        """(h, c), (1, hidden) each. Position 0 starts from zeros: a slot needs no clearing."""
        if state is None or position == 0 or self.section == "train":
            return self.zeros((1, hidden)), self.zeros((1, hidden))
        slot = int(self.batch.slots[sequence])
        held = self.states[state][slot : slot + 1, :]
        return held[:, :hidden], held[:, hidden:]

    def set_recurrent_state(self, state: str | None, sequence: int, h: Array, c: Array) -> None:
        """Noted now, visible after commit, so that a span can be run twice."""
        if state is not None and self.section != "train":
            declared, _ = self.program.state(state)
            content = self.xp.concat([h, c], axis=1)
            slots = self._pending.setdefault(state, {})
            slots[int(self.batch.slots[sequence])] = self.rounded(content, declared.format)[0, :]

    # --- inside

    def _execute(self, i: Instruction) -> None:
        values = self._values
        inner: dict[str, Array] = {}  # what only the parts of a fused instruction see
        for core in isa.expand(i):
            ins = [inner[name] if name in inner else self.value(name) for name in core.ins]
            outs = OPERATIONS[core.op](self, core, *ins)
            named = dict(zip(core.outs, outs if isinstance(outs, tuple) else (outs,), strict=True))
            inner.update(named)
        values.update((name, inner[name]) for name in i.outs)

    def _gradients(self, wanted: bool) -> AbstractContextManager[Any]:
        if not self.torch:
            return nullcontext()
        import torch

        return torch.enable_grad() if wanted else torch.no_grad()

    def _weight(self, declared: Any, weights: Mapping[str, Tensor]) -> Array:
        if declared.values is not None:
            return self.floats(np.array(declared.values).reshape(declared.shape))
        if declared.name not in weights:
            raise ProgramError(f"weight {declared.name} is declared but not given")
        given = weights[declared.name]
        if math.prod(given.shape) != math.prod(declared.shape):
            raise ProgramError(
                f"weight {declared.name} is declared as {declared.shape}, but given as "
                f"{tuple(given.shape)}"
            )
        # A copy: training must not write into a file mapped read-only.
        x = self.floats(np.array(given.unpack(), np.float32).reshape(declared.shape))
        return x.requires_grad_(self.program.has("train")) if self.torch else x

    def _allocate(self, state: State) -> Any:
        if state.kind == "fixed":
            return self.zeros((self.capacity.slots, state.width))
        pages = self.capacity.pages.get(state.name, 0)
        if state.format == "q8_0" and (state.key % 32 or state.value % 32):
            raise UnsupportedError(
                f"state {state.name} has heads of {state.key} and {state.value} elements; "
                "format q8_0 needs multiples of 32"
            )
        shape = (pages, self.capacity.page_size, state.heads)
        return self.zeros((*shape, state.key)), self.zeros((*shape, state.value))

    def _check(self, batch: Batch) -> None:
        """What would otherwise corrupt a neighbour's state, or fail far from its cause."""
        capacity = self.capacity
        if batch.page_size != capacity.page_size:
            raise ProgramError(
                f"the batch has pages of {batch.page_size}, not of {capacity.page_size} positions"
            )
        limits = [(f"{space} rows", len(rows), capacity.rows) for space, rows in batch.rows.items()]
        limits += [("picked rows", len(batch.pick), capacity.picks)]
        for what, count, most in limits:
            if count > most:
                raise ContextError(f"a batch of {count} {what} exceeds the capacity, {most}")
        numbers = [("slot", np.asarray(batch.slots), capacity.slots)]
        for name, tables in batch.pages.items():
            numbers += [(f"{name} page", np.asarray(t), capacity.pages[name]) for t in tables]
        for what, used, most in numbers:
            wrong = used[(used < 0) | (used >= most)]
            if len(wrong):
                raise ProgramError(f"{what} {wrong[0]} does not exist; valid: 0 to {most - 1}")
        for declared in self.program.inputs:
            have = batch.inputs.get(declared.name)
            if have is None:
                continue
            want = (batch.count(declared.space), declared.width)
            if tuple(have.shape) != want:
                raise ProgramError(f"input {declared.name} must be {want}, not {have.shape}")


def _all_types(program: Program, section: str) -> dict[str, Type]:
    """Types of every value, the inner ones of fused instructions included."""
    known = program.types(section)
    for i in program.section(section).instructions:
        for core in isa.expand(i):
            known.update(zip(core.outs, program.out_types(core, known), strict=True))
    return known
