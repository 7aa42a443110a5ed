"""What a reply is: its text and tokens, and what the clock says of the cycles it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from lmclock.cycle import Cycle
from lmclock.machines import Machine

if TYPE_CHECKING:
    from lmclock.clock import Clock


class Clocked(Protocol):
    """What a reply asks of its model."""

    machine: Machine

    def clock(self, cycles: Iterable[Cycle]) -> Clock: ...


@dataclass(frozen=True, eq=False)
class Reply:
    """A finished continuation. `finish` is stop, length or cancelled.

    `cycles` are those that ran while it was generated, other sequences' rows included; each takes
    ten to twenty kilobytes for as long as the reply is kept.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    model: Clocked = field(repr=False)
    cycles: Sequence[Cycle] = field(repr=False)

    @cached_property
    def clock(self) -> ReplyClock:
        """What the clock says of this reply; calibrates the machine the first time it is asked."""
        return ReplyClock(self.model.clock(self.cycles), self.model.machine)


class ReplyClock:
    """Accounts of a reply's cycles; prints as one line, `summary` holds every number."""

    def __init__(self, clock: Clock, machine: Machine) -> None:
        self.clock, self.machine = clock, machine

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Numbers by kind of cycle, as `lmclock stat --json` prints them."""
        from lmclock.reports.summary import summary

        return summary(self.clock, self.machine.traits)

    def __str__(self) -> str:
        from lmclock.reports.summary import one_line

        return one_line(self.clock)

    __repr__ = __str__
