"""`lmclock calibrate`: measure the limits of this machine and keep them for the other verbs."""

from __future__ import annotations

import click
import msgspec
from rich.table import Table

from lmclock.cli import options
from lmclock.hardware.calibrate import cache_file, calibrate, save
from lmclock.hardware.limits import Limits
from lmclock.reports.stat import clock_time, si


@click.command("calibrate", help="Measure bandwidth and peaks of this machine, and cache them.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads.")
@click.option("-r", "--repeat", type=click.IntRange(1, 1000), default=5, show_default=True)
@options.json_option
def command(threads: int | None, repeat: int, as_json: bool) -> None:
    errors = options.console(stderr=True)
    heard = None if as_json or not errors.is_terminal else errors.print
    found = save(calibrate(threads, None, repeat, heard), cache_file(threads))
    if as_json:
        options.print_json(msgspec.to_builtins(found))
    else:
        _print(found)


def _print(found: Limits) -> None:
    out = options.console()
    out.print(f"{found.processor}, {found.path}, {found.threads} threads, {found.when}")
    table = Table(box=None, pad_edge=False)
    for name in ("what", "best", "median", "spread"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for size, rate in found.bandwidth:
        table.add_row(f"read {si(size, 'B')} again and again", si(rate.best, "B/s"),
                      si(rate.median, "B/s"), f"{100 * rate.spread:.0f} %")  # fmt: skip
    for kind, rate in found.peaks.items():
        table.add_row(f"{kind} arithmetic", si(rate.best, "op/s"), si(rate.median, "op/s"),
                      f"{100 * rate.spread:.0f} %")  # fmt: skip
    step = found.step
    table.add_row("one empty instruction", clock_time(step.best), clock_time(step.median),
                  f"{100 * step.spread:.0f} %")  # fmt: skip
    out.print(table)
