"""`lmclock stat`: run a prompt and account for every tick, in the manner of perf stat."""

from __future__ import annotations

from typing import Any

import click

from lmclock.cli import options
from lmclock.probe import probe
from lmclock.reports.stat import print_stat
from lmclock.reports.summary import summary


@click.command(
    "stat",
    help="Run a prompt and account for every tick of it: 64 tokens and a prompt of its own if not "
    "told otherwise.",
)
@options.model_options
@options.prompt_options
@options.sampling_options
@click.option("--hottest", type=click.IntRange(1), metavar="N", default=10, show_default=True,
              help="Instructions to list.")  # fmt: skip
@options.json_option
def command(
    loading: options.Loading,
    prompt: str | None,
    sampling: dict[str, Any],
    hottest: int,
    as_json: bool,
) -> None:
    if sampling["max_new_tokens"] is None:
        sampling["max_new_tokens"] = 64
    # Without reuse of prefixes the run computes its whole prompt, though the first one did too.
    with loading.load(prefix_reuse=False) as model:
        options.measure_limits(model)
        # One run that does not count: pages are touched and caches warm when the clock starts.
        probe(model, prompt, **{**sampling, "max_new_tokens": min(2, sampling["max_new_tokens"])})
        cycles = probe(model, prompt, **sampling)
        report = summary(model.clock(cycles), model.machine.traits)
    if as_json:
        options.print_json(report)
    else:
        print_stat(report, options.console(), hottest)
