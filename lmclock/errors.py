"""The exceptions a user meets. Each message is one sentence that names the offending value and the
valid ones.

A command prints the message and exits with a non-zero code; a caller of the Python API catches
`LmclockError`, or one of its kinds. Anything else that escapes is a bug of lmclock.
"""

from __future__ import annotations

from collections.abc import Iterable


class LmclockError(Exception):
    """Base of every error lmclock raises on purpose."""


class FileError(LmclockError):
    """A file that is missing, damaged, or says something a strict reader cannot accept."""


class UnsupportedError(LmclockError):
    """A sound request for something this build, machine or format does not offer."""


class ProgramError(LmclockError):
    """A program or listing that breaks a rule; the message names the instruction."""


class OptionError(LmclockError):
    """An option or argument with a value outside its range."""


class ContextError(LmclockError):
    """A request that does not fit the context or the cache; raised before any work starts."""


def choices(values: Iterable[object]) -> str:
    """`a, b or c`: the valid values as an error message spells them."""
    names = [str(value) for value in values]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"
