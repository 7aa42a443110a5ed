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
from lmclock.engine.facts import POSITIONS, TOKENS, Facts, read_facts
from lmclock.errors import ContextError, OptionError
from lmclock.isa import Instruction
from lmclock.listing import assembly
from lmclock.machines import Capacity, Machine, Tensor
from lmclock.program import Program

TOLERANCE = 1e-7
PAGE = 64


@dataclass(frozen=True)
class Difference:
    """One result of one instruction in one cycle; `number` counts within its section. `nmse` is inf
    where only one machine has a NaN or an infinity, or both have different ones.
    """

    cycle: int
    number: int
    text: str
    value: str
    nmse: float
    largest: float  # largest absolute difference
    section: str = "step"

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
    *,
    source: Sequence[int] = (),
    inputs: Mapping[str, np.ndarray] | None = None,
) -> list[Difference]:
    """A cycle over the rows of `ids`, after `source` where the program has an encoder beside its
    steps, then `steps` decode cycles on a's greedy tokens where it samples; one entry per result.
    `inputs` are (rows, width) of what else the program reads; ids that are not given are 0.

    ContextError when they do not fit the program's context, OptionError for what is missing.
    """
    facts = read_facts(program)
    steps = steps if facts.next and facts.carries else 0
    given = _given(program, facts, ids, source, inputs or {})
    total = len(ids) + steps
    if facts.context and total > facts.context:
        raise ContextError(f"{total} tokens do not fit the context of {facts.context}")
    size = {"paged": total, "frozen": len(source)}
    pages = {s.name: -(-size[s.kind] // PAGE) for s in program.states if s.kind in size}
    rows = max(len(ids), len(source))
    capacity = Capacity(rows=rows, picks=1, slots=1, page_size=PAGE, pages=pages)
    sections = [*(["encode"] if facts.encodes else []), facts.main]
    keep = tuple(o for s in sections for i in program.section(s).instructions for o in i.outs)
    for machine in (a, b):
        machine.load(program, weights, capacity, keep=keep)
    found: list[Difference] = []
    tokens, first = list(ids), 0
    for cycle in range(steps + 1):
        batch = _batch(facts, tokens[first:], first, pages, source, given if cycle == 0 else {})
        for machine in (a, b):
            machine.bind(batch)
        for section in sections if cycle == 0 else sections[-1:]:
            for number, i in enumerate(program.section(section).instructions):
                found += _instruction(a, b, i, (cycle, number, section), accumulate)
        for machine in (a, b):
            machine.commit()
        first = len(tokens)
        if steps and facts.next:
            tokens.append(int(a.read(facts.next)[0, 0]))
    return found


def _given(
    program: Program,
    facts: Facts,
    ids: Sequence[int],
    source: Sequence[int],
    inputs: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The inputs of the first cycle that are neither tokens nor positions."""
    if not len(ids):
        raise OptionError("the prompt is empty; it needs at least 1 token")
    if bool(len(source)) != facts.encodes:
        raise OptionError(
            "this program needs source tokens, but there are none"
            if facts.encodes
            else f"program {program.name!r} takes no source tokens"
        )
    found: dict[str, np.ndarray] = {}
    for i in facts.inputs:
        if i.name in TOKENS + POSITIONS:
            continue
        rows = len(ids) if i.space == facts.space else len(source)
        if i.name not in inputs and not i.ids:
            raise OptionError(f"input {i.name!r} of the program is not given")
        x = np.asarray(inputs.get(i.name, np.zeros((rows, i.width))))
        if x.shape != (rows, i.width):
            raise OptionError(f"input {i.name!r} has shape {x.shape}; valid: {(rows, i.width)}")
        found[i.name] = x.astype(np.int32 if i.ids else np.float32)
    return found


def _instruction(
    a: Machine, b: Machine, i: Instruction, at: tuple[int, int, str], accumulate: bool
) -> list[Difference]:
    cycle, number, section = at
    a.run(section, number, number + 1)
    b.run(section, number, number + 1)
    found = []
    for name in i.outs:
        x, y = a.read(name), b.read(name)
        entry = Difference(cycle, number, assembly(i), name, *compare(x, y), section=section)
        found.append(entry)
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


def _batch(
    facts: Facts,
    ids: list[int],
    first: int,
    pages: dict[str, int],
    source: Sequence[int],
    given: Mapping[str, np.ndarray],
) -> Batch:
    """One sequence; its encoder rows run in the first cycle only."""
    spans = {facts.space: (first, ids)}
    if facts.encodes and first == 0:
        spans["src"] = (0, [*source])
    rows = {space: Rows.of([(at, len(part))]) for space, (at, part) in spans.items()}
    inputs = dict(given)
    for i in facts.inputs:
        if i.space not in spans:
            continue
        if i.name in TOKENS:
            inputs[i.name] = np.array(spans[i.space][1], np.int32)[:, None]
        elif i.name in POSITIONS:
            inputs[i.name] = rows[i.space].positions[:, None]
        elif i.name not in given:
            count = len(rows[i.space])
            inputs[i.name] = np.zeros((count, i.width), np.int32 if i.ids else np.float32)
    greedy = np.zeros(1, SAMPLING)
    greedy["top_p"] = greedy["repetition"] = 1
    return Batch(
        rows,
        inputs,
        np.zeros(1, np.int32),
        {name: [np.arange(count, dtype=np.int32)] for name, count in pages.items()},
        {name: np.array([len(source)], np.int32) for name in facts.frozen},
        page_size=PAGE,
        pick=np.array([len(ids) - 1] if facts.picks else [], np.int32),
        sampling=greedy if facts.picks else greedy[:0],
    )
