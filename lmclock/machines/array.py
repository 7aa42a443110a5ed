"""The array machine: the reference that defines what every opcode means, on NumPy or PyTorch.

    machine = create("numpy")                   # or "torch", device="cuda", dtype="float64"
    machine.load(program, weights, capacity); machine.bind(batch); machine.run("step")
    machine.read("logits")

All values of a batch are kept until the next bind, whatever `keep` says, and `place` is ignored.
On PyTorch, section `train` records gradients: `machine.weights[name]` are the leaves,
`machine.value(name)` the tensors. This file keeps the contract of machines/__init__.py; the
opcodes' meanings are in array_ops.py, array_attend.py and array_sample.py, and what they see of the
machine in array_scope.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lmclock import formats, isa
from lmclock.batch import Batch
from lmclock.errors import ContextError, OptionError, ProgramError, choices
from lmclock.isa import Instruction
from lmclock.machines import Capacity, Machine, Tensor, Ticks, Traits
from lmclock.machines.array_ops import OPERATIONS
from lmclock.machines.array_scope import Array, Scope
from lmclock.program import Program, State, Weight
from lmclock.shapes import Type

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
    """See the module's header."""

    def __init__(self, namespace: str, device: str, dtype: str) -> None:
        self.scope = Scope(namespace, device, dtype)
        self.traits = Traits(
            name="array",
            threads=1,
            formats=tuple(formats.FORMATS),
            tick_rate=1e9,
            tick_source="wall",
            gradients=self.scope.torch,
        )

    @property
    def weights(self) -> dict[str, Array]:
        """By name; the leaves of autograd on PyTorch when the program has a section `train`."""
        return self.scope.weights

    @property
    def seed(self) -> int:
        """Chooses the masks of dropout: set it anew before each training step."""
        return self.scope.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.scope.seed = seed

    def load(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        capacity: Capacity,
        keep: Sequence[str] = (),
    ) -> None:
        scope = self.scope
        scope.program, scope.capacity = program, capacity
        scope.types = {s.name: _all_types(program, s.name) for s in program.sections}
        scope.weights = {w.name: self._weight(w, weights) for w in program.weights}
        scope.states = {
            f"{state.name}[{index}]": self._allocate(state)
            for state in program.states
            for index in range(state.count)
        }

    def bind(self, batch: Batch) -> None:
        scope = self.scope
        _check(scope.program, scope.capacity, batch)
        scope.bind(batch)
        self._values = {
            i.name: (scope.ids if i.ids else scope.floats)(np.asarray(batch.inputs[i.name]))
            for i in scope.program.inputs
            if i.name in batch.inputs
        }

    def run(self, section: str, first: int = 0, last: int | None = None) -> Ticks:
        instructions = self.scope.program.section(section).instructions
        last = len(instructions) if last is None else last
        if not 0 <= first <= last <= len(instructions):
            raise ProgramError(
                f"span {first}..{last} is not within the {len(instructions)} instructions "
                f"of section {section}"
            )
        self.scope.section = section
        table = np.zeros((last - first, 1, 2), np.int64)
        begin = self.now()
        with self._gradients(section == "train"):
            for stamps, i in zip(table, instructions[first:last], strict=True):
                stamps[0, 0] = self.now()
                self._execute(i)
                stamps[0, 1] = self.now()
        return Ticks(begin, self.now(), table, first)

    def commit(self) -> None:
        for (name, slot), content in self.scope.pending.items():
            self.scope.states[name][slot, :] = content
        self.scope.pending.clear()

    def read(self, value: str) -> np.ndarray:
        return self.scope.numpy(self.value(value)).copy()

    def write(self, value: str, array: np.ndarray) -> None:
        old = self.value(value)
        if tuple(np.shape(array)) != tuple(old.shape):
            raise ProgramError(f"{value} is {tuple(old.shape)}, not {tuple(np.shape(array))}")
        floating = self.scope.xp.isdtype(old.dtype, "real floating")
        # A copy: the caller may go on to change its array.
        convert = self.scope.floats if floating else self.scope.ids
        self._values[value] = convert(np.array(array))

    def copy(self, state: str, pairs: Sequence[tuple[int, int]]) -> None:
        declared, _ = self.scope.program.state(f"{state}[0]")
        for index in range(declared.count):
            held = self.scope.states[f"{state}[{index}]"]
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

    def _execute(self, i: Instruction) -> None:
        inner: dict[str, Array] = {}  # what only the parts of a fused instruction see
        for core in isa.expand(i):
            ins = [inner[name] if name in inner else self.value(name) for name in core.ins]
            outs = OPERATIONS[core.op](self.scope, core, *ins)
            inner |= zip(core.outs, outs if isinstance(outs, tuple) else (outs,), strict=True)
        self._values |= {name: inner[name] for name in i.outs}

    def _gradients(self, wanted: bool) -> AbstractContextManager[Any]:
        if not self.scope.torch:
            return nullcontext()
        import torch

        return torch.enable_grad() if wanted else torch.no_grad()

    def _weight(self, declared: Weight, weights: Mapping[str, Tensor]) -> Array:
        scope = self.scope
        if declared.values is not None:
            return scope.floats(np.array(declared.values).reshape(declared.shape))
        if declared.name not in weights:
            raise ProgramError(f"weight {declared.name} is declared but not given")
        given = weights[declared.name]
        if math.prod(given.shape) != math.prod(declared.shape):
            raise ProgramError(
                f"weight {declared.name} is declared as {declared.shape}, but given as "
                f"{tuple(given.shape)}"
            )
        # A copy: training must not write into what the caller keeps.
        x = scope.floats(np.array(given.unpack(), np.float32).reshape(declared.shape))
        return x.requires_grad_(scope.program.has("train")) if scope.torch else x

    def _allocate(self, state: State) -> Any:
        zeros, capacity = self.scope.zeros, self.scope.capacity
        if state.kind == "fixed":
            return zeros((capacity.slots, state.width))
        shape = (capacity.pages.get(state.name, 0), capacity.page_size, state.heads)
        return zeros((*shape, state.key)), zeros((*shape, state.value))


def _all_types(program: Program, section: str) -> dict[str, Type]:
    """Types of every value, the inner ones of fused instructions included."""
    known = program.types(section)
    for i in program.section(section).instructions:
        for core in isa.expand(i):
            known.update(zip(core.outs, program.out_types(core, known), strict=True))
    return known


def _check(program: Program, capacity: Capacity, batch: Batch) -> None:
    """What would otherwise corrupt a neighbour's state, or fail far from its cause."""
    if batch.page_size != capacity.page_size:
        raise ProgramError(
            f"the batch has pages of {batch.page_size}, not of {capacity.page_size} positions"
        )
    limits = [(f"{space} rows", len(rows), capacity.rows) for space, rows in batch.rows.items()]
    limits += [("picked rows", len(batch.pick), capacity.picks)]
    for what, count, most in limits:
        if count > most:
            raise ContextError(f"a batch of {count} {what} exceeds the capacity, {most}")
    numbers = [("slot", batch.slots, capacity.slots)]
    for name, tables in batch.pages.items():
        numbers += [(f"{name} page", table, capacity.pages.get(name, 0)) for table in tables]
    for what, used, most in numbers:
        for number in used:
            if not 0 <= number < most:
                raise ProgramError(f"{what} {number} does not exist; {most} were set aside")
    for declared in program.inputs:
        if declared.name in batch.inputs:
            want = (batch.count(declared.space), declared.width)
            have = np.shape(batch.inputs[declared.name])
            if have != want:
                raise ProgramError(f"input {declared.name} must be {want}, not {have}")
