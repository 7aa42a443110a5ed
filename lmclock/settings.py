"""Every environment variable lmclock reads, one line each, validated where it is read.

A command-line flag always wins over its variable. Nothing else in the package touches `os.environ`.
"""

from __future__ import annotations

import os
from pathlib import Path

from lmclock.errors import OptionError, choices

SIMD_PATHS = ("scalar", "avx2", "avx512", "amx", "neon", "neon_i8mm")

VARIABLES = {
    "LMCLOCK_CACHE": "folder for models and calibrations (default: the user's cache folder)",
    "LMCLOCK_ISA": f"force a SIMD path: {', '.join(SIMD_PATHS)} (default: the widest found)",
    "LMCLOCK_THREADS": "threads of the native machine (default: processors this process may use)",
}


def cache_folder() -> Path:
    """Where downloads and calibrations are kept; not created here."""
    chosen = os.environ.get("LMCLOCK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lmclock"


def simd_path() -> str | None:
    """The forced SIMD path, or None for the widest one found at run time."""
    chosen = os.environ.get("LMCLOCK_ISA")
    if not chosen:
        return None
    if chosen not in SIMD_PATHS:
        valid = choices(SIMD_PATHS)
        raise OptionError(f"LMCLOCK_ISA={chosen!r} is not a SIMD path; valid: {valid}")
    return chosen


def threads() -> int:
    """Threads of the native machine: LMCLOCK_THREADS, or the processors this process may use."""
    chosen = os.environ.get("LMCLOCK_THREADS")
    if not chosen:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not chosen.isdecimal() or not 1 <= int(chosen) <= 1024:
        raise OptionError(f"LMCLOCK_THREADS={chosen!r} is no thread count; valid: 1 to 1024")
    return int(chosen)
