"""`lmclock calibrate`: measure the limits of this machine and keep them for the other verbs."""

from __future__ import annotations

import click
import msgspec

from lmclock.cli import options
from lmclock.errors import FileError
from lmclock.hardware.calibrate import cache_file, calibrate, save
from lmclock.hardware.limits import Limits, Measured
from lmclock.reports.stat import clock_time, percent, si


@click.command("calibrate", help="Measure bandwidth and peaks of this machine, and cache them.")
@click.option("-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads.")
@click.option("-r", "--repeat", type=click.IntRange(1, 1000), metavar="N", default=5,
              show_default=True, help="Rounds, to see how much they vary.")  # fmt: skip
@options.json_option
def command(threads: int | None, repeat: int, as_json: bool) -> None:
    file = cache_file(threads)

    def heard(what: str) -> None:
        click.echo(what, err=True)

    found = calibrate(threads, None, repeat, None if as_json else heard)
    if as_json:
        options.print_json(msgspec.to_builtins(found))
    else:
        _print(found)
    try:
        save(found, file)
    except OSError as error:
        raise FileError(
            f"cannot write {file}: {error.strerror}; LMCLOCK_CACHE names another folder"
        ) from None


def _print(found: Limits) -> None:
    def row(what: str, best: str, median: str, spread: str) -> None:
        click.echo(f"  {what:<28} {best:>11} {median:>11} {spread:>7}")

    def figure(what: str, m: Measured, unit: str) -> None:
        best, median = (clock_time(x) if unit == "s" else si(x, unit) for x in (m.best, m.median))
        row(what, best, median, percent(m.spread))

    threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
    click.echo(f"{found.processor}, {found.path}, {threads}, {found.when}")
    row("", "best", "median", "spread")
    for size, rate in found.bandwidth:
        figure(f"read {si(size, 'B')} over and over", rate, "B/s")
    for kind, peak in found.peaks.items():
        figure(f"{kind} arithmetic", peak, "op/s")
    figure("an empty instruction", found.step, "s")
