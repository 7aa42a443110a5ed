"""`diff`: two machines run one program in lockstep; which instruction is the first to differ?

After each instruction both results are read and compared. By default machine b is handed a's
result then, so that an error belongs to the instruction that made it; with accumulate=True each
machine goes on with its own numbers. Comparison is the normalised mean square error
sum((a - b)^2) / sum(a^2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmclock.batch import SAMPLING, Batch, Rows
from lmclock.errors import ContextError
from lmclock.isa import Instruction
from lmclock.listing import assembly
from lmclock.machines import Capacity, Machine, Tensor
from lmclock.program import Program

TOLERANCE = 1e-7
PAGE = 64


@dataclass(frozen=True)
class Difference:
    """One instruction in one cycle. `nmse` is inf when one machine has a NaN where the other has
    none.
    """

    cycle: int
    number: int
    text: str
    nmse: float
    largest: float  # largest absolute difference

    def diverges(self, tolerance: float = TOLERANCE) -> bool:
        return not self.nmse <= tolerance


def diff(
    program: Program,
    weights: Mapping[str, Tensor],
    a: Machine,
    b: Machine,
    ids: Sequence[int],
    steps: int = 2,
    accumulate: bool = False,
) -> list[Difference]:
    """A prefill of `ids`, then `steps` decode cycles on a's greedy tokens; one entry per result.

    ContextError when they do not fit the program's context.
    """
    total = len(ids) + steps
    if program.context and total > program.context:
        raise ContextError(f"{total} tokens do not fit the context of {program.context}")
    pages = {s.name: -(-total // PAGE) for s in program.states if s.kind == "paged"}
    capacity = Capacity(rows=len(ids), picks=1, slots=1, page_size=PAGE, pages=pages)
    keep = tuple(o for i in program.section("step").instructions for o in i.outs)
    for machine in (a, b):
        machine.load(program, weights, capacity, keep=keep)
    found: list[Difference] = []
    tokens, first = list(ids), 0
    for cycle in range(steps + 1):
        batch = _batch(program, tokens[first:], first, pages)
        for machine in (a, b):
            machine.bind(batch)
        for number, i in enumerate(program.section("step").instructions):
            found += _instruction(a, b, i, cycle, number, accumulate)
        for machine in (a, b):
            machine.commit()
        first = len(tokens)
        tokens.append(int(a.read(program.section("step").instructions[-1].outs[0])[0, 0]))
    return found


def _instruction(
    a: Machine, b: Machine, i: Instruction, cycle: int, number: int, accumulate: bool
) -> list[Difference]:
    a.run("step", number, number + 1)
    b.run("step", number, number + 1)
    found = []
    for name in i.outs:
        x, y = a.read(name), b.read(name)
        found.append(Difference(cycle, number, assembly(i), *compare(x, y)))
        if not accumulate:
            b.write(name, x)  # the next instructions start from the same numbers
    return found


def compare(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(normalised mean square error, largest absolute difference) of y against x."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if not (np.isfinite(x) == np.isfinite(y)).all():
        return float("inf"), float("inf")
    same = np.isfinite(x)
    gap = x[same] - y[same]
    if not gap.size or not gap.any():
        return 0.0, 0.0
    power = float((x[same] ** 2).sum())
    error = float((gap**2).sum())
    return (error / power if power else float("inf")), float(np.abs(gap).max())


def _batch(program: Program, ids: list[int], first: int, pages: dict[str, int]) -> Batch:
    rows = Rows.of([(first, len(ids))])
    inputs = {i.name: np.zeros((len(ids), i.width), np.int32) for i in program.inputs}
    inputs["ids"] = np.array(ids, np.int32).reshape(-1, 1)
    if "pos" in inputs:
        inputs["pos"] = rows.positions.reshape(-1, 1)
    greedy = np.zeros(1, SAMPLING)
    greedy["top_p"] = greedy["repetition"] = 1
    return Batch(
        {"tok": rows},
        inputs,
        np.zeros(1, np.int32),
        {name: [np.arange(count, dtype=np.int32)] for name, count in pages.items()},
        page_size=PAGE,
        pick=np.array([len(ids) - 1], np.int32),
        sampling=greedy,
    )
