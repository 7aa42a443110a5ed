"""The limit, measured beside the engines: the products of a cycle and nothing else, plain reading,
plain arithmetic.

`products_only` keeps a program's matrix products over the same packed weights, each reading one
constant input, and drops all else: norms, attention, residuals, sampling. One run of it is the
least a cycle can take with these kernels; `stream` and `int8` are what the machine could do with
any.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bench.common import MODEL, Job
from lmclock.assemble import assemble
from lmclock.batch import Batch, Rows
from lmclock.cost import Bound, cost
from lmclock.files.pull import pull
from lmclock.isa import Instruction, make
from lmclock.machines import Capacity, Machine, create
from lmclock.passes import optimise
from lmclock.program import Input, Program, Section
from lmclock.verify import verify

PRODUCTS = ("linear", "qkv", "glu")
KEPT = ("act", "kind", "bias", "bias_k", "bias_v", "scale")
REPEAT = 20  # of a stream or a peak, some milliseconds each


def products_only(program: Program) -> Program:
    """The products of `step` on constant inputs `x<width>`; rows that are picked stay so."""
    types = program.types("step")
    inputs: dict[str, Input] = {}
    body: list[Instruction] = []
    for i in program.section("step").instructions:
        if i.op not in PRODUCTS:
            continue
        width = program.weight_table[i.weights[0]].shape[1]
        source = f"x{width}"
        inputs[source] = Input(source, "tok", width, ids=False)
        if types[i.ins[0]].space == "pick":
            body.append(make("pick", f"{source}.picked", source))
            source = f"{source}.picked"
        kept = {name: i[name] for name in KEPT if name in i.row.attrs}
        body.append(make(i.op, i.outs, source, i.weights, **kept))
    used = {name for i in body for name in i.all_weights()}
    weights = tuple(w for w in program.weights if w.name in used)
    section = Section("step", tuple(body))
    bare = replace(
        program, inputs=tuple(inputs.values()), weights=weights, states=(), sections=(section,),
        registers=(),
    )  # fmt: skip
    return replace(verify(bare), registers=_shared(bare))


def _shared(program: Program) -> tuple[tuple[str, int], ...]:
    """Registers: nothing reads a product, so one serves all of an opcode, an output and a space."""
    types = program.types("step")
    numbers: dict[tuple[str, int, str], int] = {}
    found = []
    for i in program.section("step").instructions:
        for n, name in enumerate(i.outs):
            key = (i.op, n, types[name].space)
            found.append((name, numbers.setdefault(key, len(numbers))))
    return tuple(found)


class Products:
    """A program's products on the native machine, bound to 1 or more rows."""

    def __init__(self, threads: int, rows: int, path: str = MODEL) -> None:
        assembled = assemble(pull(path))
        self.program = products_only(optimise(assembled.program, 2))
        self.machine: Machine = create("native", threads=threads)
        self.machine.load(self.program, assembled.weights, Capacity(rows=rows, picks=1, slots=1))
        self.bound = 0

    def bind(self, rows: int) -> Batch:
        """A batch of one sequence, its last row picked."""
        draw = np.random.default_rng(0)
        values = {
            i.name: draw.standard_normal((rows, i.width), np.float32) for i in self.program.inputs
        }
        last = np.array([rows - 1], np.int32)
        batch = Batch({"tok": Rows.of([(0, rows)])}, values, np.zeros(1, np.int32), pick=last)
        self.machine.bind(batch)
        return batch

    def seconds(self, rows: int, times: int) -> float:
        """Seconds of `times` runs on `rows` rows."""
        self.bind(rows)
        begin = time.perf_counter()
        for _ in range(times):
            self.machine.run("step")
        return time.perf_counter() - begin

    def operations(self, rows: int) -> float:
        """Operations of one run."""
        bound = Bound(self.program, "step", self.bind(rows))
        return sum(cost(i, bound).operations for i in self.program.section("step").instructions)


def jobs(threads: int, prompt: int, new: int) -> tuple[Mapping[str, Any], Mapping[str, Job]]:
    """prefill, decode: seconds of the products of as many tokens as an engine is given; stream:
    bytes per second over as many bytes as a cycle reads; int8: operations per second.
    """
    import lmclock._native as native

    products = Products(threads, prompt)
    size = products.program.bytes_per_cycle
    buffer = np.ones(size, np.uint8)

    def stream() -> float:
        return size / statistics.median(native.time_stream(buffer, threads, REPEAT))

    found: dict[str, Callable[[], float]] = {
        "prefill": lambda: products.seconds(prompt, 1),
        "decode": lambda: products.seconds(1, new),
        "stream": stream,
    }
    if native.peak("int8", 1):
        found["int8"] = lambda: statistics.median(
            native.time_peak("int8", threads=threads, repeat=REPEAT)
        )
    about = {"bytes": size, "operations": products.operations(prompt)}
    return about, found
