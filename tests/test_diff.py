"""`diff` names the instruction that is wrong, and no other: errors are planted one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from helpers import random_weights
from tiny import llama

from lmclock.batch import Batch
from lmclock.debug.diff import TOLERANCE, Difference, compare, diff
from lmclock.errors import ContextError, OptionError
from lmclock.listing import parse
from lmclock.machines import Capacity, Machine, Tensor, Ticks, create
from lmclock.passes import optimise
from lmclock.program import Program

PROGRAM = optimise(llama(), 1)
BODY = PROGRAM.section("step").instructions
WEIGHTS = random_weights(PROGRAM)
IDS = [5, 17, 3, 99, 0, 42]
Harm = Callable[[np.ndarray], np.ndarray]


class Faulty(Machine):
    """The array machine with one instruction that goes wrong in one cycle.

    The result is harmed; of an instruction without one (`store`), its first operand, for as long as
    the instruction runs.
    """

    def __init__(self, number: int, cycle: int, harm: Harm) -> None:
        self.inner = create("array")
        self.traits = self.inner.traits
        self.number, self.cycle, self.harm = number, cycle, harm
        self.cycles = 0

    def load(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        capacity: Capacity,
        keep: Sequence[str] = (),
    ) -> None:
        self.body = program.section("step").instructions
        self.inner.load(program, weights, capacity, keep)

    def run(self, section: str, first: int = 0, last: int | None = None) -> Ticks:
        if first != self.number or self.cycles != self.cycle:
            return self.inner.run(section, first, last)
        i = self.body[first]
        value = (i.outs or i.ins)[0]
        if i.outs:
            ticks = self.inner.run(section, first, last)
            self.write(value, self.harm(self.read(value)))
        else:
            sound = self.read(value)
            self.write(value, self.harm(sound))
            ticks = self.inner.run(section, first, last)
            self.write(value, sound)
        return ticks

    def commit(self) -> None:
        self.cycles += 1
        self.inner.commit()

    def bind(self, batch: Batch) -> None:
        self.inner.bind(batch)

    def read(self, value: str) -> np.ndarray:
        return np.array(self.inner.read(value))

    def write(self, value: str, array: np.ndarray) -> None:
        self.inner.write(value, array)

    def copy(self, state: str, pairs: Sequence[tuple[int, int]]) -> None:
        self.inner.copy(state, pairs)

    def now(self) -> int:
        return self.inner.now()


def found(number: int = -1, cycle: int = 0, harm: Harm | None = None, **options: object):  # type: ignore[no-untyped-def]
    faulty = Faulty(number, cycle, harm or (lambda x: x))
    return diff(PROGRAM, WEIGHTS, create("array"), faulty, IDS, steps=2, **options)


def diverging(differences: list[Difference]) -> list[tuple[int, int]]:
    return [(d.cycle, d.number) for d in differences if d.diverges()]


def test_equal_machines_do_not_differ() -> None:
    results = found()
    assert len(results) == 3 * sum(len(i.outs) for i in BODY)
    assert {(d.nmse, d.largest) for d in results} == {(0.0, 0.0)}


@pytest.mark.parametrize("cycle", [0, 2])
@pytest.mark.parametrize("number", [k for k, i in enumerate(BODY) if i.outs])
def test_a_planted_error_is_found_where_it_is(number: int, cycle: int) -> None:
    wrong = found(number, cycle, lambda x: x + 1 if x.dtype.kind == "i" else x * 1.001)
    assert diverging(wrong) == [(cycle, number)], BODY[number]
    (d,) = (d for d in wrong if d.diverges())
    assert d.text.startswith(BODY[number].op) and d.value == BODY[number].outs[0]


def test_a_wrong_store_shows_where_the_cache_is_read() -> None:
    store = next(k for k, i in enumerate(BODY) if i.op == "store")
    attend = next(k for k, i in enumerate(BODY) if i.op == "attend" and k > store)
    assert diverging(found(store, 0, lambda x: x * 2)) == [(c, attend) for c in range(3)]


def test_errors_add_up_when_they_may() -> None:
    where = diverging(found(9, 1, lambda x: x * 1.01, accumulate=True))
    assert where[0] == (1, 9) and len(where) > len(BODY) // 2


def test_what_is_below_the_tolerance_is_no_divergence() -> None:
    small = found(9, 0, lambda x: x * (1 + 1e-5))
    worst = max(d.nmse for d in small)
    assert 0 < worst < TOLERANCE and not diverging(small)
    assert [d for d in small if d.diverges(worst / 2)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_planted_nan_is_found(bad: float) -> None:
    def harm(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[0, 0] = bad
        return x

    glu = next(k for k, i in enumerate(BODY) if i.op == "glu")
    results = found(glu, 0, harm)
    assert diverging(results) == [(0, glu)]
    assert next(d for d in results if d.diverges()).nmse == np.inf


def values(*x: float) -> np.ndarray:
    return np.array([x], np.float32)


def test_compare() -> None:
    nan, inf = np.nan, np.inf
    assert compare(values(1, nan, inf), values(1, nan, inf)) == (0, 0), "the same everywhere"
    assert compare(values(inf), values(-inf)) == (inf, inf)
    assert compare(values(nan), values(inf)) == (inf, inf)
    assert compare(values(1, 2), values(1, nan)) == (inf, inf)
    assert compare(values(0, 0), values(0, 1)) == (inf, 1), "all of nothing is wrong"
    assert compare(values(3, 4), values(3, 4.5)) == (0.25 / 25, 0.5)
    assert compare(values(1, 2), values(1)) == (inf, inf), "another shape"
    assert compare(values(), values()) == (0, 0)


def test_what_diff_cannot_run_is_said() -> None:
    a, b = create("array"), create("array")
    with pytest.raises(ContextError, match="130 tokens do not fit the context of 128"):
        diff(PROGRAM, WEIGHTS, a, b, [1] * 128)
    with pytest.raises(OptionError, match="the prompt is empty"):
        diff(PROGRAM, WEIGHTS, a, b, [])
    text = 'program t "t"\ninput x tok f32 width=4\nsection step\nact y, x kind=relu\n'
    with pytest.raises(OptionError, match="input 'x' of the program is not given"):
        diff(parse(text), {}, a, b, [1])


def test_the_native_machine_agrees_with_the_reference() -> None:
    results = diff(PROGRAM, WEIGHTS, create("array"), create("native"), IDS, steps=2)
    assert not diverging(results), max(results, key=lambda d: d.nmse)
