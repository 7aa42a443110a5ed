"""What the clock costs, twice: ticks taken times the cost of a tick, and the same decode by the
native machine's interpreter compiled with ticks and without.

    python -m bench.overhead [--pairs 30]

The build that has both interpreters is made here, in a folder of its own. A pair is a process whose
one machine decodes by turns with ticks and without: where a process finds its memory moves a decode
by several percent, ten times what is to be shown, and is the same for both sides of such a pair.
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

from bench.common import (
    MODEL,
    ROOT,
    Job,
    Worker,
    interleave,
    machine,
    publish,
    ratio,
    serve,
    table,
)
from bench.stages import Goal, Store
from lmclock import settings

if TYPE_CHECKING:
    from lmclock.cycle import Cycle

TOKENS = 16  # of one decode, which is then one call of the machine, some 30 ms
ALTERNATIONS = 60  # decodes of each side in a pair
RESAMPLES = 10_000
PAIRED = ("difference", "control")  # jobs
COUNTED = ("cycle", "ticks", "tick", "stamp")  # jobs: what the counted overhead is made of
MOST = 0.005  # overhead allowed
# Whether ticks are taken. Each side is there twice: two of a kind are the control.
SIDES = {"in": True, "in again": True, "out": False, "out again": False}


@click.command(help=__doc__)
@click.option("--pairs", type=click.IntRange(2), default=30, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=settings.threads)
@click.option("--dry", is_flag=True, help="Print only.")
@click.option("--worker", hidden=True)
def main(pairs: int, threads: int, dry: bool, worker: str | None) -> None:
    if worker:
        serve(lambda: build_jobs(worker, threads))
        return
    extension = str(build())
    found: list[dict[str, float]] = []
    for number in range(1, pairs + 1):
        one = Worker("bench.overhead", extension, threads=threads)
        one.greet()
        found.append({job: one.ask(job) for job in PAIRED})
        if number == pairs:
            counted = {job: one.ask(job) for job in COUNTED}
        one.close()
        print(f"pair {number} of {pairs}", file=sys.stderr)
    text = report(counted, found, threads)
    if not dry:
        store = Store("overhead")
        store.goals = goals(counted, found)
        store.save()
    publish("overhead", text, dry)


def build() -> Path:
    """The extension with both interpreters, built anew where a source changed."""
    folder = ROOT / "build" / "unclocked"
    # SKBUILD: without it the build would be copied over the extension in the tree.
    tools = Path(sys.executable).parent
    configure = [
        *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DLMCLOCK_UNCLOCKED=ON", "-DSKBUILD=ON"),
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
    """PAIRED and COUNTED, see `report`."""
    use(Path(extension))
    import lmclock._native as native

    from lmclock.model import load
    from lmclock.reports.bench import seconds

    model = load(MODEL, threads=threads, context=2 * TOKENS)
    core: Any = model.machine._core  # type: ignore[attr-defined]

    def cycles(tokens: int) -> Sequence[Cycle]:
        return model.generate([0], max_new_tokens=tokens, temperature=0, ignore_eos=True).cycles

    def decode(clocked: bool = True) -> float:
        core.clocked = clocked
        return seconds(cycles(TOKENS), model.machine.traits)

    def ticks() -> float:
        core.clocked = True
        return float(sum(run.ticks.table[:, 0].size for run in cycles(1)[0].runs))

    sides = {side: partial(decode, clocked) for side, clocked in SIDES.items()}
    samples = interleave(sides, ALTERNATIONS, seed=os.getpid(), quiet=True)
    ticking = np.add(samples["in"], samples["in again"]).tolist()
    silent = np.add(samples["out"], samples["out again"]).tolist()
    return {}, {
        "difference": lambda: ratio(ticking, silent) - 1,
        "control": lambda: ratio(samples["in again"], samples["in"]) - 1,
        "cycle": lambda: statistics.median(samples["in"]) / TOKENS,
        "ticks": ticks,
        "tick": lambda: statistics.median(native.time_tick() for _ in range(9)),
        "stamp": lambda: min(timeit.repeat(native.ticks, number=10_000)) / 10_000,
    }


def upper_bound(differences: Sequence[float], seed: int = 0) -> float:
    """The 95 % upper bound of the mean by bootstrap."""
    values = np.array(differences)
    draw = np.random.default_rng(seed)
    means = values[draw.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    return float(np.quantile(means, 0.95))


def goals(counted: Mapping[str, float], pairs: Sequence[Mapping[str, float]]) -> list[Goal]:
    """Line 7."""
    bound = upper_bound([pair["difference"] for pair in pairs])
    return [
        Goal("overhead, counted", _share(counted), MOST, "%", most=True),
        Goal("overhead, 95 % upper bound over pairs", bound, MOST, "%", most=True),
    ]


def _share(counted: Mapping[str, float]) -> float:
    """What the ticks and stamps of a cycle cost, as a share of it."""
    # The engine's stamps: one where each stage begins and one at the end.
    spent = counted["ticks"] * counted["tick"] + 5 * counted["stamp"]
    return spent / counted["cycle"]


def report(counted: Mapping[str, float], pairs: Sequence[Mapping[str, float]], threads: int) -> str:
    """The section of the document."""
    share = _share(counted)
    differences = [pair["difference"] for pair in pairs]
    bound = upper_bound(differences)
    rows = [
        ("a cycle (decode, one sequence)", f"{1e3 * counted['cycle']:.3f} ms"),
        ("ticks a thread takes in it, at most", f"{counted['ticks']:.0f}"),
        ("cost of such a tick", f"{1e9 * counted['tick']:.1f} ns"),
        ("stamps the engine takes in it", "5"),
        ("cost of such a stamp", f"{1e9 * counted['stamp']:.0f} ns"),
        ("**overhead, counted**", f"{100 * share:.2f} %"),
        ("control: ticks in both, mean difference", _percent([p["control"] for p in pairs])),
        ("ticks in and out, mean difference", _percent(differences)),
        ("**its 95 % upper bound**", f"{100 * bound:+.2f} %"),
    ]
    verdict = "within" if share <= MOST and bound <= MOST else "not shown to be within"
    return "\n\n".join([
        f"## What the clock costs\n\n{machine(threads)}",
        METHOD.format(
            pairs=len(pairs), alternations=ALTERNATIONS, tokens=TOKENS, resamples=RESAMPLES
        ),
        table(["", "SmolLM2, packaged Q4_1"], rows),
        f"The clock's overhead is {verdict} {100 * MOST:.1f} %.",
    ])  # fmt: skip


def _percent(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):+.2f} % ± {100 * error:.2f} %"


METHOD = """Counted: ticks taken in a cycle times what one costs. Measured: {pairs} pairs. A pair \
is a process of its own with one machine, whose interpreter is there twice, compiled with ticks \
and without (nor are their tables filled), over the same weights and caches. Four sides, two \
with ticks and two without, decode {tokens} tokens in turns of random order, {alternations} each; \
the pair's difference is the median over turns, its control that of the two with ticks. The bound \
is a bootstrap of the mean over the pairs ({resamples} resamples). The engine's stamps are on both \
sides, so only the count has them."""


if __name__ == "__main__":
    main()
