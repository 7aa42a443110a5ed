"""Passes: Program -> Program, pure and named. `optimise` runs the column for a level and verifies
what comes out; where that is not sound, after each pass, so that the one at fault is named.

    -O0  as assembled: one core instruction for each step of the arithmetic
    -O1  fused: fewer instructions, the same numbers
    -O2  fused and rounded: activations to int8 per 32 where weights are quantised, to bf16 where
         they are bf16; in such programs attention of many rows to 16 bits, unless the program is to
         be invariant
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmclock.errors import OptionError, ProgramError, choices
from lmclock.passes.fuse import fuse
from lmclock.passes.place import place
from lmclock.passes.round import round_activations, round_attention
from lmclock.program import Program
from lmclock.verify import verify

Pass = Callable[[Program], Program]
LEVELS: dict[int, tuple[Pass, ...]] = {
    0: (place,),
    1: (fuse, place),
    2: (round_activations, round_attention, fuse, place),
}
VARIANT = (round_attention,)  # after which the chunks of a prompt matter to its bits


def optimise(
    program: Program,
    level: int = 2,
    keep: tuple[str, ...] = (),
    invariant: bool = False,
) -> Program:
    """The program at -O`level`, verified; values named in `keep` keep a register of their own.
    `invariant` leaves out what makes the bits of a row depend on the chunks of its prompt.

    OptionError when the level is unknown, ProgramError when the program or a pass breaks a rule.
    """
    if level not in LEVELS:
        raise OptionError(f"optimisation level {level!r} is unknown; valid: {choices(LEVELS)}")
    steps = [step for step in LEVELS[level] if not (invariant and step in VARIANT)]
    try:
        return verify(_run(program, steps, keep))
    except Exception:
        verify(program)
        for number, step in enumerate(steps):  # a sound program took one verification, not four
            try:
                program = verify(_run(program, steps[number : number + 1], keep))
            except ProgramError as error:
                raise ProgramError(f"after pass {step.__name__}: {error}") from error
        raise


def _run(program: Program, steps: Sequence[Pass], keep: tuple[str, ...]) -> Program:
    for step in steps:
        program = place(program, keep) if step is place else step(program)
    return program


__all__ = ["LEVELS", "fuse", "optimise", "place", "round_activations", "round_attention"]
