"""`lmclock pull`: fetch a model into the cache, once; everything else works without a network."""

from __future__ import annotations

import click

from lmclock.cli import options
from lmclock.files.pull import pull


@click.command("pull", help="Fetch a model: a catalogue name, or hf:org/repo[:file].")
@click.argument("name", metavar="[MODEL]", default=options.DEFAULT_MODEL)
@options.json_option
def command(name: str, as_json: bool) -> None:
    errors = options.console(stderr=True)
    if as_json or not errors.is_terminal:
        path = pull(name)
    else:
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=errors) as bar:
            task = bar.add_task(name, total=None)

            def heard(what: str, done: int, total: int | None) -> None:
                bar.update(task, description=what, completed=done, total=total)

            path = pull(name, heard)
    if as_json:
        options.print_json({"model": name, "path": str(path)})
    else:
        click.echo(path)
