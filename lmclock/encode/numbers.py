"""Nets that take rows of numbers instead of tokens: the rows a text holds, and their classes.

x = rows_of("1 0\\n0.5, 2", width=2)
classify_rows(engine, config, x)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmclock.config import ModelConfig
from lmclock.config.mlp import MlpConfig
from lmclock.encode.classify import Classes, scores_of
from lmclock.engine import Engine, Event, Request
from lmclock.engine.facts import POSITIONS, TOKENS, Facts
from lmclock.errors import LmclockError, OptionError, UnsupportedError
from lmclock.program import Input


def number_input(facts: Facts) -> Input | None:
    """The one input of numbers that a program reads, None where it reads tokens only."""
    found = [i for i in facts.inputs if not i.ids and i.name not in TOKENS + POSITIONS]
    if len(found) > 1 or (found and facts.encodes):
        names = ", ".join(i.name for i in found)
        raise UnsupportedError(f"a text cannot give the inputs {names} of this program")
    return found[0] if found else None


def rows_of(lines: Sequence[str], width: int) -> np.ndarray:
    """(rows, width) float32: a row a line, with spaces or commas between its numbers."""
    rows = []
    for line in lines:
        try:
            rows.append([float(part) for part in line.replace(",", " ").split()])
        except ValueError:
            message = f"{line[:60]!r} does not hold numbers; valid: {width} of them"
            raise OptionError(message) from None
        if len(rows[-1]) != width or not np.isfinite(rows[-1]).all():
            raise OptionError(f"{line[:60]!r} is no row; valid: {width} finite numbers")
    return np.array(rows, np.float32).reshape(-1, width)


def classify_numbers(engine: Engine, config: ModelConfig, lines: Sequence[str]) -> list[Classes]:
    """The labels of every row with their scores, the highest first; the numbers themselves where
    the net has no labels.
    """
    assert isinstance(config, MlpConfig)
    x = rows_of(lines, config.sizes[0])
    found: list[np.ndarray] = []
    failed: list[Event] = []
    name = next(i.name for i in engine.facts.inputs if not i.ids)
    for first in range(0, len(x), engine.capacity.rows):
        part = x[first : first + engine.capacity.rows]
        engine.add(
            Request(
                [0] * len(part), 0, inputs={name: part},
                want={"logits": lambda _, rows: found.append(rows.copy())},
                ended=lambda event: failed.append(event) if event.finish == "error" else None,
            )
        )  # fmt: skip
        for _ in engine.run():
            pass
    if failed:
        raise LmclockError(failed[0].message)
    scores = scores_of(config.scores, np.concatenate(found) if found else np.empty((0, 1)))
    orders = np.argsort(-scores, axis=1, kind="stable")
    return [
        Classes(tuple(config.labels[k] for k in order), tuple(float(row[k]) for k in order))
        for row, order in zip(scores, orders, strict=True)
    ]
