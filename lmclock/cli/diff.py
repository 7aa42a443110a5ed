"""`lmclock diff`: two machines in lockstep; exit code 1 when an instruction diverges."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import click

from lmclock.cli import options
from lmclock.debug.diff import TOLERANCE, Difference, diff
from lmclock.machines import MACHINES, create
from lmclock.probe import work_of


@click.command("diff", help="Run two machines in lockstep and compare every instruction.")
@options.program_options
@click.option("--a", "first", type=click.Choice(list(MACHINES)), default="array", show_default=True,
              help="The machine that is right.")  # fmt: skip
@click.option("--b", "second", type=click.Choice(list(MACHINES)), default="native",
              show_default=True, help="The machine in question.")  # fmt: skip
@options.prompt_options
@click.option(
    "-n",
    "steps",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Decode cycles after the prompt.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=TOLERANCE,
    show_default=True,
    help="Largest normalised mean square error (NMSE) that is no divergence.",
)
@click.option("--accumulate", is_flag=True, help="Let b go on with its own numbers.")
@click.option(
    "--worst",
    type=click.IntRange(1),
    metavar="N",
    default=10,
    show_default=True,
    help="Results to list.",
)
@options.json_option
def command(
    loading: options.Loading,
    first: str,
    second: str,
    prompt: str | None,
    steps: int,
    tolerance: float,
    accumulate: bool,
    worst: int,
    as_json: bool,
) -> None:
    # What a machine may round or not would hide what it should not.
    assembled, program = loading.program(invariant=True)
    work = work_of(assembled, prompt)
    with closing(create(first)) as a, closing(create(second)) as b:
        found = diff(program, assembled.weights, a, b, work.ids, steps, accumulate,
                     source=work.source, inputs=work.inputs)  # fmt: skip
    diverged = next((d for d in found if d.diverges(tolerance)), None)
    if as_json:
        entries = [dataclasses.asdict(d) | {"diverges": d.diverges(tolerance)} for d in found]
        options.print_json(
            {
                "a": first,
                "b": second,
                "tolerance": tolerance,
                "first_diverging": next((e for e in entries if e["diverges"]), None),
                "instructions": entries,
            }
        )
    else:
        _print(found, diverged, first, second, tolerance, worst)
    if diverged:
        raise click.exceptions.Exit(1)


def _print(
    found: list[Difference],
    diverged: Difference | None,
    first: str,
    second: str,
    tolerance: float,
    worst: int,
) -> None:
    def row(*cells: object) -> None:
        click.echo("{:>8}  {:>8}  {:>5}  {:>7}  {:>6}  {}".format(*cells))

    click.echo(f"{first} against {second}, {len(found)} results, the worst {worst}:")
    row("NMSE", "largest", "cycle", "section", "number", "instruction")
    for d in sorted(found, key=lambda d: -d.nmse)[:worst]:
        row(f"{d.nmse:.1e}", f"{d.largest:.1e}", d.cycle, d.section, d.number, d.text)
    if diverged is None:
        click.echo(f"no instruction diverges (NMSE <= {tolerance:g})")
        return
    click.echo(
        f"first to diverge: cycle {diverged.cycle}, {diverged.section} instruction "
        f"{diverged.number}, value {diverged.value}, NMSE {diverged.nmse:.1e} > {tolerance:g}: "
        f"{diverged.text}"
    )
