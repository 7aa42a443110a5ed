"""`lmclock disasm`: a model, or a listing written by hand, as a program."""

from __future__ import annotations

from pathlib import Path

import click

from lmclock.cli import options
from lmclock.flowchart import mermaid
from lmclock.listing import assembly, read, render
from lmclock.machines import repacked
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.verify import verify

LISTING = ".lmc"  # ending of a listing file


@click.command("disasm", help="Print a model, or a listing (.lmc), as a program.")
@options.program_options
@click.option("--mermaid", "as_chart", is_flag=True, help="A Mermaid flowchart instead.")
@click.option("--no-comments", is_flag=True, help="Only what parses back.")
@options.json_option
def command(loading: options.Loading, as_chart: bool, no_comments: bool, as_json: bool) -> None:
    if Path(loading.name).suffix == LISTING:
        program = optimise(verify(read(loading.name)), loading.level)
    else:
        program = loading.program()[1]
    if as_json:
        options.print_json(_as_dict(program))
    elif as_chart:
        click.echo(mermaid(program), nl=False)
    else:
        click.echo(render(program, comments=not no_comments), nl=False)
        for line in () if no_comments else repacked(program):
            click.echo(f"; {line}")


def _as_dict(program: Program) -> dict[str, object]:
    return {
        "family": program.family,
        "name": program.name,
        "context": program.context,
        "bytes_per_cycle": program.bytes_per_cycle,
        "registers": len({register for _, register in program.registers}),
        "weights": {w.name: {"shape": w.shape, "format": w.format} for w in program.weights},
        "sections": {
            s.name: [
                {"op": i.op, "outs": i.outs, "ins": i.ins, "weights": i.weights,
                 "state": i.state, "attrs": dict(i.attrs), "assembly": assembly(i)}
                for i in s.instructions
            ]
            for s in program.sections
        },
    }  # fmt: skip
