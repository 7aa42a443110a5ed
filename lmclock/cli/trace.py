"""`lmclock trace`: run a prompt and write what happened as Chrome trace-event JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lmclock.cli import options
from lmclock.errors import FileError
from lmclock.reports.trace import write_trace


@click.command("trace", help="Run a prompt and write a trace that Perfetto opens.")
@options.model_options
@options.prompt_options
@click.option("-o", "--output", default="trace.json", show_default=True, help="File to write.")
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
    if not Path(output).resolve().parent.is_dir():
        raise FileError(f"cannot write {output}: its folder does not exist")
    with loading.load() as model:
        reply = model.generate(prompt or options.DEFAULT_PROMPT, **sampling)
        try:
            with open(output, "w", encoding="utf-8") as file:
                events = write_trace(reply.cycles, model.program, model.machine.traits, file)
        except OSError as error:
            raise FileError(f"cannot write {output}: {error}") from None
    size = Path(output).stat().st_size
    if as_json:
        options.print_json({"file": output, "cycles": len(reply.cycles), "events": events})
    else:
        click.echo(f"{output}: {len(reply.cycles)} cycles, {events} events, {size:,} bytes")
