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
from lmclock.errors import ContextError, OptionError, UnsupportedError
from lmclock.isa import Instruction
from lmclock.listing import assembly
from lmclock.machines import Capacity, Machine, Tensor
from lmclock.program import Program

TOLERANCE = 1e-7
PAGE = 64
GIVEN = ("ids", "pos", "src_ids", "src_pos", "types")  # inputs there is something to give for


@dataclass(frozen=True)
class Difference:
    """One result of one instruction in one cycle. `nmse` is inf where only one machine has a NaN
    or an infinity, or both have different ones.
    """

    cycle: int
    number: int
    text: str
    value: str
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
    """A prefill of `ids`, then `steps` decode cycles on a's greedy tokens, or one pass of an
    encoder; one entry per result.

    ContextError when they do not fit the program's context, UnsupportedError for a program that
    takes more than token ids or does not sample.
    """
    main = "step" if program.has("step") else "encode"
    body = program.section(main).instructions
    strangers = [i.name for i in program.inputs if i.name not in GIVEN]
    if strangers or (main == "step" and body[-1].op != "sample"):
        what = f"reads {strangers[0]}" if strangers else "does not sample"
        raise UnsupportedError(f"diff runs programs from ids to a sampled token; this one {what}")
    if not len(ids):
        raise OptionError("the prompt is empty; it needs at least 1 token")
    steps = steps if main == "step" else 0
    total = len(ids) + steps
    if program.context and total > program.context:
        raise ContextError(f"{total} tokens do not fit the context of {program.context}")
    pages = {s.name: -(-total // PAGE) for s in program.states if s.kind == "paged"}
    capacity = Capacity(rows=len(ids), picks=1, slots=1, page_size=PAGE, pages=pages)
    keep = tuple(o for i in body for o in i.outs)
    for machine in (a, b):
        machine.load(program, weights, capacity, keep=keep)
    found: list[Difference] = []
    tokens, first = list(ids), 0
    for cycle in range(steps + 1):
        batch = _batch(program, tokens[first:], first, pages)
        for machine in (a, b):
            machine.bind(batch)
        for number, i in enumerate(body):
            found += _instruction(a, b, main, i, cycle, number, accumulate)
        for machine in (a, b):
            machine.commit()
        first = len(tokens)
        if steps:
            tokens.append(int(a.read(body[-1].outs[0])[0, 0]))
    return found


def _instruction(
    a: Machine, b: Machine, section: str, i: Instruction, cycle: int, number: int, accumulate: bool
) -> list[Difference]:
    a.run(section, number, number + 1)
    b.run(section, number, number + 1)
    found = []
    for name in i.outs:
        x, y = a.read(name), b.read(name)
        found.append(Difference(cycle, number, assembly(i), name, *compare(x, y)))
        if not accumulate:
            b.write(name, x)  # the next instructions start from the same numbers
    return found


def compare(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(normalised mean square error, largest absolute difference) of y against x."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    if x.shape != y.shape or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf"), float("inf")
    gap = x[finite] - y[finite]
    if not gap.any():
        return 0.0, 0.0
    power = float((x[finite] ** 2).sum())
    error = float((gap**2).sum())
    return (error / power if power else float("inf")), float(np.abs(gap).max())


def _batch(program: Program, ids: list[int], first: int, pages: dict[str, int]) -> Batch:
    rows = Rows.of([(first, len(ids))])
    space = "tok" if program.has("step") else "src"
    tokens, positions = np.array(ids, np.int32)[:, None], rows.positions[:, None]
    inputs = dict(zip(GIVEN, (tokens, positions, tokens, positions, tokens * 0), strict=True))
    picks = [len(ids) - 1] if space == "tok" else []
    greedy = np.zeros(1, SAMPLING)
    greedy["top_p"] = greedy["repetition"] = 1
    return Batch(
        {space: rows},
        {i.name: inputs[i.name] for i in program.inputs},
        np.zeros(1, np.int32),
        {name: [np.arange(count, dtype=np.int32)] for name, count in pages.items()},
        page_size=PAGE,
        pick=np.array(picks, np.int32),
        sampling=greedy[: len(picks)],
    )
