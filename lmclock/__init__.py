"""lmclock: an LLM is a program. Assemble it, clock it, step it, and make it faster.

    import lmclock
    m = lmclock.load("smollm2")
    print(m.generate("The capital of France is", max_new_tokens=8).text)

The names below load what they need when they are first used, so that importing the package is fast.
"""

from __future__ import annotations

from lmclock.errors import LmclockError

# Importing `typing` would be most of what importing this package takes, and of the time in which
# Ctrl-C finds no handler of ours yet (see __main__.py).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lmclock.model import Model, Reply, load

    __version__: str

__all__ = ["LmclockError", "Model", "Reply", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "Reply", "load"):
        from lmclock import model

        return getattr(model, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("lmclock")
    raise AttributeError(f"module 'lmclock' has no attribute {name!r}")
