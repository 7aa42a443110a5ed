"""What the clock costs, twice: ticks taken times the cost of a tick, and the same decode with the
native machine's ticks compiled in and out.

    python -m bench.overhead [--pairs 30]

Both builds are made here from the same sources, in folders of their own. A pair is a process of
each, whose short decodes are interleaved.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import timeit
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from bench.common import MODEL, ROOT, Job, Worker, interleave, machine, publish, serve, table
from bench.stages import Goal, Store
from lmclock import settings

if TYPE_CHECKING:
    from lmclock.cycle import Cycle

TOKENS = 16  # of one decode
ALTERNATIONS = 12  # decodes of each build in a pair
RESAMPLES = 10_000
MOST = 0.005  # overhead allowed
BUILDS = {"in": "ON", "out": "OFF"}
SIDES = {"in": "in", "again": "in", "out": "out"}  # processes of a pair, and the build of each


@click.command(help=__doc__)
@click.option("--pairs", type=click.IntRange(2), default=30, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=settings.threads)
@click.option("--dry", is_flag=True, help="Print only.")
@click.option("--worker", hidden=True)
def main(pairs: int, threads: int, dry: bool, worker: str | None) -> None:
    if worker:
        serve(lambda: build_jobs(worker, threads))
        return
    files = {name: str(build(name)) for name in BUILDS}
    seconds: list[dict[str, float]] = []
    for number in range(pairs):
        workers = {
            side: Worker("bench.overhead", files[name], threads=threads)
            for side, name in SIDES.items()
        }
        for one in workers.values():
            one.greet()
        samples = interleave(
            {side: partial(one.ask, "decode") for side, one in workers.items()},
            ALTERNATIONS, seed=number, quiet=True,
        )  # fmt: skip
        seconds.append({side: statistics.median(times) for side, times in samples.items()})
        if number + 1 == pairs:
            counted = {job: workers["in"].ask(job) for job in ("cycle", "ticks", "tick", "stamp")}
        for one in workers.values():
            one.close()
        print(f"pair {number + 1} of {pairs}", file=sys.stderr)
    text = report(counted, seconds, threads)
    if not dry:
        store = Store("overhead")
        store.goals = goals(counted, seconds)
        store.save()
    publish("overhead", text, dry)


def build(name: str) -> Path:
    """The extension with the ticks compiled in or out, built anew where a source changed."""
    folder = ROOT / "build" / f"clock-{name}"
    # SKBUILD: without it the build would be copied over the extension in the tree.
    tools = Path(sys.executable).parent
    configure = [
        *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DLMCLOCK_CLOCK={BUILDS[name]}", "-DSKBUILD=ON"),
        *(f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"),
    ]
    for arguments in (configure, ["--build", str(folder), "--parallel", str(os.cpu_count())]):
        subprocess.run([str(tools / "cmake"), *arguments], check=True, stdout=sys.stderr)
    (found,) = folder.glob("_native*" + importlib.machinery.EXTENSION_SUFFIXES[0])
    return found


def use(extension: Path) -> None:
    """Make a build of the extension the one that lmclock imports."""
    import lmclock

    spec = importlib.util.spec_from_file_location("lmclock._native", extension)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["lmclock._native"] = module
    spec.loader.exec_module(module)
    lmclock._native = module


def build_jobs(extension: str, threads: int) -> tuple[Mapping[str, Any], Mapping[str, Job]]:
    """decode: seconds of a decode; and what the counted overhead is made of, see `report`."""
    use(Path(extension))
    import lmclock._native as native

    from lmclock.model import load
    from lmclock.reports.bench import seconds

    model = load(MODEL, threads=threads, context=2 * TOKENS)

    def cycles(tokens: int) -> tuple[Cycle, ...]:
        return model.generate([0], max_new_tokens=tokens, temperature=0, ignore_eos=True).cycles

    def decode() -> float:
        return seconds(cycles(TOKENS), model.machine.traits)

    def ticks() -> float:
        return float(sum(run.ticks.table[:, 0].size for run in cycles(1)[0].runs))

    return {}, {
        "decode": decode,
        "cycle": lambda: decode() / TOKENS,
        "ticks": ticks,
        "tick": tick_seconds,
        "stamp": lambda: min(timeit.repeat(native.ticks, number=10_000)) / 10_000,
    }


def tick_seconds() -> float:
    """Seconds of a tick, a little too many: on one thread no more than a tick and the loop to the
    next instruction lie between the end stamp of one and the begin stamp of the next.
    """
    from lmclock.hardware.calibrate import idle_machine

    one = idle_machine(threads=1)
    gaps = []
    for _ in range(100):
        stamps = one.run("step").table[:, 0]
        gaps.append(np.median(stamps[1:, 0] - stamps[:-1, 1]))
    one.close()
    return float(np.median(gaps)) / one.traits.tick_rate


def upper_bound(differences: Sequence[float], seed: int = 0) -> float:
    """The 95 % upper bound of the mean by bootstrap."""
    values = np.array(differences)
    draw = np.random.default_rng(seed)
    means = values[draw.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.95))


def goals(counted: Mapping[str, float], seconds: Sequence[Mapping[str, float]]) -> list[Goal]:
    """Line 7."""
    differences = [pair["in"] / pair["out"] - 1 for pair in seconds]
    return [
        Goal("overhead, counted", _share(counted), MOST, "%", most=True),
        Goal("overhead, 95 % upper bound over pairs", upper_bound(differences), MOST, "%",
             most=True),
    ]  # fmt: skip


def _share(counted: Mapping[str, float]) -> float:
    """What the ticks and stamps of a cycle cost, as a share of it."""
    # The engine's stamps: one where each stage begins and one at the end.
    spent = counted["ticks"] * counted["tick"] + 5 * counted["stamp"]
    return spent / counted["cycle"]


def report(
    counted: Mapping[str, float], seconds: Sequence[Mapping[str, float]], threads: int
) -> str:
    """The section of the document."""
    share = _share(counted)
    differences = [pair["in"] / pair["out"] - 1 for pair in seconds]
    control = [pair["in"] / pair["again"] - 1 for pair in seconds]
    bound = upper_bound(differences)
    rows = [
        ("a cycle (decode, one sequence)", f"{1e3 * counted['cycle']:.3f} ms"),
        ("ticks a thread takes in it", f"{counted['ticks']:.0f}"),
        ("cost of such a tick, at most", f"{1e9 * counted['tick']:.1f} ns"),
        ("stamps the engine takes in it", "5"),
        ("cost of such a stamp", f"{1e9 * counted['stamp']:.0f} ns"),
        ("**overhead, counted**", f"{100 * share:.2f} %"),
        ("control: the same build twice, mean difference", _percent(control)),
        ("ticks in and out, mean difference", _percent(differences)),
        ("**its 95 % upper bound**", f"{100 * bound:+.2f} %"),
    ]
    verdict = "within" if share <= MOST and bound <= MOST else "not shown to be within"
    return "\n\n".join([
        f"## What the clock costs\n\n{machine(threads)}",
        METHOD.format(
            pairs=len(seconds), alternations=ALTERNATIONS, tokens=TOKENS, resamples=RESAMPLES
        ),
        table(["", "SmolLM2, packaged Q4_1"], rows),
        f"The clock's overhead is {verdict} {100 * MOST:.1f} %.",
    ])  # fmt: skip


def _percent(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):+.2f} % ± {100 * error:.2f} %"


METHOD = """Counted: ticks taken in a cycle times what one costs. Measured: {pairs} pairs of \
processes, new for each pair so that no luck with memory lasts, one with the ticks compiled into \
the native machine and one without, and one more with them as a control. Their decodes of \
{tokens} tokens are interleaved, {alternations} each, and medians compared; the bound is a \
bootstrap of the mean over the pairs ({resamples} resamples). The engine's stamps are in both \
builds, so only the count has them."""


if __name__ == "__main__":
    main()
