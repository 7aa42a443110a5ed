"""`lmclock classify`: what a model with a head says of texts: classes, entities, an answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lmclock.cli import options
from lmclock.config.mlp import MlpConfig
from lmclock.encode.classify import answer, tag
from lmclock.errors import OptionError

if TYPE_CHECKING:
    from lmclock.model import Model


@click.command(
    "classify",
    help="The classes of texts with their scores; of a model for tokens, the entities in them; of "
    "one for question answering, where --question finds its answer. Texts are arguments, the lines "
    "of a file (-f), or those of stdin.",
)
@options.model_options
@options.texts_options
@click.option("--question", metavar="TEXT", help="What the texts are to answer.")
@click.option("--second", metavar="TEXT",
              help="The second text of each pair, for a model of pairs.")  # fmt: skip
@click.option("--top", type=click.IntRange(1), metavar="N", default=5, show_default=True,
              help="Classes to print.")  # fmt: skip
@options.json_option
def command(
    loading: options.Loading,
    texts: list[str],
    question: str | None,
    second: str | None,
    top: int,
    as_json: bool,
) -> None:
    with loading.load() as model:
        found = _found(model, texts, question, second, top)
    if as_json:
        options.print_json([{"text": text, **row} for text, row in zip(texts, found, strict=True)])
        return
    for text, row in zip(texts, found, strict=True):
        (kind,) = row
        if len(texts) > 1:
            click.echo(text)
        for entry in row[kind]:
            shown = entry.get("text", "")
            click.echo(f"{entry['score']:9.4f}  {entry['label']:<20} {shown}".rstrip())


def _found(
    model: Model, texts: list[str], question: str | None, second: str | None, top: int
) -> list[dict[str, Any]]:
    """Per text, {"classes": ...}, {"entities": ...} or {"answers": ...}."""
    takes_numbers = isinstance(model.config, MlpConfig)
    head = "sequence" if takes_numbers else model.encoder.config.head
    if (question is not None) != (head == "answer"):
        valid = "with --question" if head == "answer" else "without --question"
        raise OptionError(f"this model has a head for {head!r}; valid: {valid}")
    if head == "token":
        return [{"entities": [asdict(e) for e in row]} for row in tag(model.encoder, texts)]
    if question is not None:
        return [{"answers": [asdict(e)]} for e in answer(model.encoder, question, texts)]
    pairs = None if second is None else [second] * len(texts)
    return [
        {"classes": [{"label": label, "score": score} for label, score in
                     zip(c.labels[:top], c.scores[:top], strict=True)]}
        for c in model.classify(texts, pairs)
    ]  # fmt: skip
