"""`lmclock embed`: one vector for each text, as JSON lines or a NumPy file."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from lmclock.cli import options
from lmclock.config.sentence import POOLINGS
from lmclock.errors import FileError, OptionError

ENDINGS = (".jsonl", ".npy")


@click.command(
    "embed",
    help="One vector for each text: JSON lines, or with -o a file. Texts are arguments, the lines "
    "of a file (-f), or those of stdin. Long ones are cut in overlapping segments, whose vectors "
    "are averaged.",
)
@options.model_options
@options.texts_options
@click.option("-o", "--output", metavar="FILE", help="Write .npy or .jsonl instead.")
@click.option("--truncate", is_flag=True, help="Drop what the model cannot take at once.")
@click.option("--pooling", type=click.Choice(POOLINGS), default=None,
              help="Where the model's files do not say.")  # fmt: skip
@click.option("--normalize", is_flag=True, default=None,
              help="Vectors of length one, where the model's files do not say.")  # fmt: skip
def command(
    loading: options.Loading,
    texts: list[str],
    output: str | None,
    truncate: bool,
    pooling: str | None,
    normalize: bool | None,
) -> None:
    if output is not None and Path(output).suffix not in ENDINGS:
        raise OptionError(f"-o {output} ends in neither of the formats; valid: .jsonl or .npy")
    with loading.load(pooling=pooling, normalize=normalize) as model:
        found = model.embed(texts, truncate)
    if output is None:
        for line in _lines(texts, found):
            click.echo(line)
        return
    try:
        if output.endswith(".npy"):
            with open(output, "wb") as file:
                np.save(file, found)
        else:
            Path(output).write_text("".join(f"{line}\n" for line in _lines(texts, found)), "utf-8")
    except OSError as error:
        raise FileError(f"cannot write {output}: {error.strerror}") from None


def _lines(texts: list[str], found: np.ndarray) -> list[str]:
    """A JSON object for each text; nine digits say a float32 exactly."""
    return [
        json.dumps({"text": text, "embedding": [float(f"{x:.9g}") for x in row]},
                   ensure_ascii=False)
        for text, row in zip(texts, found.tolist(), strict=True)
    ]  # fmt: skip
