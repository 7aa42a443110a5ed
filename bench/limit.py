"""How much the limit varies: `calibrate` again and again, and the variation of every figure.

    python -m bench.limit [--times 5]

A figure of one calibration is the best of its repetitions, which is what the clock uses.
"""

from __future__ import annotations

import statistics
import sys

import click

from bench.common import machine, publish, table
from lmclock import settings
from lmclock.hardware.calibrate import calibrate
from lmclock.hardware.limits import Limits
from lmclock.reports.stat import clock_time, si

STEADY = 0.05


@click.command(help=__doc__)
@click.option("--times", type=click.IntRange(2), default=5, show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=5, help="Repetitions of each.")
@click.option("--threads", type=click.IntRange(1), default=settings.threads)
@click.option("--dry", is_flag=True, help="Print only.")
def main(times: int, repeat: int, threads: int, dry: bool) -> None:
    found = []
    for number in range(times):
        found.append(calibrate(threads, None, repeat))
        print(f"calibration {number + 1} of {times}", file=sys.stderr)
    publish("limit", report(found), dry)


def figures(limits: Limits) -> dict[str, tuple[float, str]]:
    """(value, unit) of every figure of one calibration, by what it is."""
    named = {f"read {si(n, 'B')}": (m.best, "B/s") for n, m in limits.bandwidth}
    named |= {f"{kind} arithmetic": (m.best, "op/s") for kind, m in limits.peaks.items()}
    return named | {"one empty instruction": (limits.step.best, "s")}


def report(found: list[Limits]) -> str:
    """The section of the document."""
    rows, unsteady = [], []
    for name, (_, unit) in figures(found[0]).items():
        values = [figures(one)[name][0] for one in found]
        middle = statistics.median(values)
        spread = (max(values) - min(values)) / middle
        deviation = statistics.stdev(values) / statistics.mean(values)
        if spread > STEADY:
            unsteady.append(name)
        shown = [clock_time(v) if unit == "s" else si(v, unit) for v in
                 (middle, min(values), max(values))]  # fmt: skip
        rows.append([name, *shown, f"{100 * spread:.1f} %", f"{100 * deviation:.1f} %"])
    claim = "Every figure stays within 5 %: shares of the limit may be compared between runs."
    if unsteady:
        claim = (
            f"{len(unsteady)} of {len(rows)} figures vary by more than 5 % from one calibration to "
            "the next, so on this machine shares of the limit are claimed only as paired ratios: "
            "limit and engine measured in the same rounds."
        )
    head = ("figure", "median", "lowest", "highest", "(highest - lowest) / median", "deviation")
    return (
        f"## The limit, measured {len(found)} times\n\n{machine(found[0].threads)}\n"
        f"Kernels: {found[0].path}.\n\n{table(head, rows)}\n\n{claim}\n"
    )


if __name__ == "__main__":
    main()
