"""From a model's name to what `lmclock.load` puts on a machine: program, weights, tokenizer.

What only some models need (pooling, rounding of weights, tokenisers in folders) is imported for
them only: a start is to be short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lmclock.text as text
from lmclock.assemble import Assembled, assemble
from lmclock.config import ModelConfig
from lmclock.files import GGUF
from lmclock.files.pull import pull
from lmclock.text import Tokeniser, from_gguf

Change = Callable[[ModelConfig], ModelConfig]


def read(
    model: str | Path,
    cache: str = "f16",
    weights: str | None = None,
    change: Change | None = None,
    checked: bool = True,
) -> Assembled:
    """What the files of a model say, its float weights rounded to `weights` where that is given.
    Not `checked`: see `assemble`.
    """
    found = assemble(pull(model), cache, change, checked)
    if weights is None:
        return found
    from lmclock.passes.quantize import quantize

    program, stored = quantize(found.program, found.weights, weights)
    return replace(found, program=program, weights=stored)


def pooled(pooling: str | None, normalize: bool | None) -> Change | None:
    """What puts pooling and normalisation into a configuration; None where none is asked for."""
    if pooling is normalize is None:
        return None
    from lmclock.config.encoder import with_sentence

    return lambda config: with_sentence(config, pooling, normalize)


def tokenizer_of(assembled: Assembled) -> Tokeniser:
    """The tokenizer in a GGUF file's metadata, or in the files beside safetensors."""
    reader = assembled.reader
    if isinstance(reader, GGUF):
        return from_gguf(reader.metadata)
    return text.from_folder(Path(reader.path).parent)
