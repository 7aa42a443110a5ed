"""`lmclock trace`: run a prompt and write what happened as Chrome trace-event JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lmclock.cli import options
from lmclock.errors import FileError
from lmclock.probe import probe
from lmclock.reports.trace import write_trace


@click.command(
    "trace",
    help="Run a prompt and write a trace that Perfetto opens: 16 tokens and a prompt of its own if "
    "not told otherwise.",
)
@options.model_options
@options.prompt_options
@click.option("-o", "--output", metavar="FILE", default="trace.json", show_default=True,
              help="File to write.")  # fmt: skip
@options.sampling_options
@options.json_option
def command(
    loading: options.Loading,
    prompt: str | None,
    output: str,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    if sampling["max_new_tokens"] is None:
        sampling["max_new_tokens"] = 16
    _check_output(Path(output))
    with loading.load() as model:
        cycles = probe(model, prompt, **sampling)
        try:
            with open(output, "w", encoding="utf-8") as file:
                written = write_trace(cycles, model.program, model.machine.traits, file)
        except OSError as error:
            raise FileError(f"cannot write {output}: {error.strerror}") from None
    size = Path(output).stat().st_size
    if as_json:
        options.print_json({"file": output, "cycles": written.cycles, "events": written.events})
        return
    click.echo(f"{output}: {written.cycles} cycles, {written.events} events, {size:,} bytes")
    if written.cycles < len(cycles):
        left = len(cycles) - written.cycles
        click.echo(f"{left} more cycles were left out, to keep the file small", err=True)


def _check_output(path: Path) -> None:
    """What is plainly wrong is said before the work starts."""
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder")
    if not path.absolute().parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {path.parent}")
