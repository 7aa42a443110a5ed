"""`lmclock diff`: two machines in lockstep; exit code 1 when an instruction diverges."""

from __future__ import annotations

import dataclasses

import click
from rich.table import Table

from lmclock.cli import options
from lmclock.debug.diff import TOLERANCE, Difference, diff
from lmclock.machines import MACHINES, create
from lmclock.model import tokenizer_of


@click.command("diff", help="Run two machines in lockstep and compare every instruction.")
@options.program_options
@click.option("--a", "first", type=click.Choice(list(MACHINES)), default="array", show_default=True)
@click.option("--b", "second", type=click.Choice(list(MACHINES)), default="native",
              show_default=True)  # fmt: skip
@options.prompt_options
@click.option("-n", "steps", type=click.IntRange(0), default=1, help="Decode cycles.")
@click.option("--tolerance", type=float, default=TOLERANCE, show_default=True, help="NMSE.")
@click.option("--accumulate", is_flag=True, help="Let b go on with its own numbers.")
@click.option("--worst", type=click.IntRange(1), default=10, help="Instructions to list.")
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
    assembled, program = loading.program()
    ids = tokenizer_of(assembled).encode(prompt or options.DEFAULT_PROMPT)
    a, b = create(first), create(second)
    try:
        found = diff(program, assembled.weights, a, b, ids, steps, accumulate)
    finally:
        a.close()
        b.close()
    diverged = next((d for d in found if d.diverges(tolerance)), None)
    if as_json:
        options.print_json(
            {
                "a": first,
                "b": second,
                "tolerance": tolerance,
                "first_diverging": dataclasses.asdict(diverged) if diverged else None,
                "instructions": [dataclasses.asdict(d) for d in found],
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
    out = options.console()
    table = Table(box=None, pad_edge=False)
    for name in ("NMSE", "largest", "cycle", "number", "instruction"):
        table.add_column(name, justify="left" if name == "instruction" else "right")
    for d in sorted(found, key=lambda d: -d.nmse)[:worst]:
        table.add_row(f"{d.nmse:.1e}", f"{d.largest:.1e}", f"{d.cycle}", f"{d.number}", d.text)
    out.print(f"{first} against {second}, {len(found)} results, the worst {worst}:")
    out.print(table)
    if diverged is None:
        out.print(f"no instruction diverges (NMSE <= {tolerance:g})", highlight=False)
        return
    out.print(
        f"first to diverge: cycle {diverged.cycle}, instruction {diverged.number}, "
        f"NMSE {diverged.nmse:.1e} > {tolerance:g}: {diverged.text}",
        highlight=False,
    )
