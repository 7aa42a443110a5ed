"""`lmclock translate`: texts through a model with an encoder, by beam search."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from lmclock.cli import options


@click.command(
    "translate",
    help="Translate texts (or summarise them: whatever the model was trained for). Texts are "
    "arguments, the lines of a file (-f), or those of stdin. Long ones are cut where sentences "
    "end, and joined again. Settings not given are those of the model's files.",
)
@options.model_options
@options.texts_options
@click.option("--beams", "width", type=click.IntRange(1, 256), metavar="N", default=None,
              help="Beams of the search; 1: greedy.")  # fmt: skip
@click.option("--results", type=click.IntRange(1, 256), metavar="N", default=1, show_default=True,
              help="Results of each text, the best first.")  # fmt: skip
@click.option("--prefix", metavar="TEXT", default="",
              help='Goes before each: ">>fr<<", or "translate English to German: ".')  # fmt: skip
@click.option("-n", "--n-predict", "most", type=click.IntRange(1), metavar="N", default=None,
              help="Most new tokens of a text, or of a part of it.")  # fmt: skip
@click.option("--length-penalty", type=float, metavar="X", default=None,
              help="Scores are divided by length to this power.")  # fmt: skip
@click.option("--early-stopping", is_flag=True, default=None,
              help="End as soon as N beams have ended.")  # fmt: skip
@click.option("--no-repeat-ngram", type=click.IntRange(0), metavar="N", default=None,
              help="No N tokens come twice; 0: off.")  # fmt: skip
@options.json_option
def command(
    loading: options.Loading,
    texts: list[str],
    prefix: str,
    most: int | None,
    as_json: bool,
    results: int,
    **settings: Any,
) -> None:
    width = settings["width"]
    with loading.load(sequences=4 * width if width else None) as model:
        found = model.translate(
            texts, prefix=prefix, max_new_tokens=most, results=results, **settings
        )
    if as_json:
        options.print_json([
            {"source": text, **dataclasses.asdict(one)}
            for text, one in zip(texts, found, strict=True)
        ])  # fmt: skip
        return
    for one in found:
        for text, _ in one.alternatives:
            click.echo(text)
