"""Start: from process start to the first token, load and repack, memory, beside llama.cpp.

    python -m bench.start [--rounds 9]

Each job is a process of its own: `lmclock run smollm2 -p hi -n 1` as a user calls it, a process
that times its own load and first token, and the same of llama.cpp. The file cache is warm: a round
before the first is not kept.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import click

from bench.common import MODEL, ROOT, Job, serve, start, table
from bench.stages import Goal, Plan, Stage, Store, options
from lmclock.files.pull import pull

RUN = ("-m", "lmclock", "run", MODEL, "-p", "hi", "-n", "1")
PACKAGES = ("llama-cpp-python", "numpy")
# What each process reports of itself, and how the table calls it.
FIGURES = {
    "run": "`lmclock run smollm2 -p hi -n 1`, process start to end",
    "import": "importing lmclock's Python API",
    "load": "load: file, program, weights repacked",
    "first": "first token after load (tokenizer included)",
    "llama load": "llama.cpp: load",
    "llama first": "llama.cpp: first token after load",
}
ALLOWANCE = 120e6  # bytes of memory beside the file


@click.command(help=__doc__)
@options(rounds=9)
@click.option("--worker", hidden=True)
@click.option("--child", hidden=True)
def main(plan: Plan, worker: str | None, child: str | None) -> None:
    if child:
        print(json.dumps(CHILDREN[child](plan.threads)))
        return
    if worker:
        serve(lambda: ({}, jobs(plan.threads)))
        return
    store = Store("start")
    begin = partial(start, "bench.start", ("processes",), threads=plan.threads)
    store.measure("start", plan, begin, packages=PACKAGES)
    stage = store.stage("start")
    store.finish(plan, "Start", parts(stage) if stage.rounds else (), goals(stage))


def jobs(threads: int) -> dict[str, Job]:
    """Jobs that start processes; figures a process reports beside its time are jobs that follow
    it and only hand them out.
    """
    last: dict[str, float] = {}
    # Compiling every module anew, as some containers ask for, takes as long as all the rest.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run() -> float:
        begin = time.perf_counter()
        done = subprocess.Popen([sys.executable, *RUN], stdout=subprocess.DEVNULL, cwd=ROOT,
                                env=environment)  # fmt: skip
        _, status, usage = os.wait4(done.pid, 0)
        spent = time.perf_counter() - begin
        assert status == 0, f"lmclock run ended with {status}"
        last["run memory"] = 1024.0 * usage.ru_maxrss
        return spent

    def ask(child: str) -> float:
        command = [sys.executable, "-m", "bench.start", "--child", child, f"--threads={threads}"]
        begin = time.perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
        )
        last.update(json.loads(done.stdout.splitlines()[-1]))
        return time.perf_counter() - begin

    found: dict[str, Job] = {"run": run}
    for child in CHILDREN:
        if child != "llama" or _there("llama_cpp"):
            found[f"process {child}"] = partial(ask, child)
    given = ["run memory", "import", "load", "first", "memory", "weights"]
    given += ["llama load", "llama first", "llama memory"] if "process llama" in found else []
    # In a round they may come before their process: the value is then that of the round before.
    return found | {name: partial(_value, last, name, found) for name in given}


def _value(last: Mapping[str, float], name: str, found: Mapping[str, Job]) -> float:
    if name not in last:
        for job in found.values():
            job()
    return last[name]


def _there(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _lmclock_child(threads: int) -> dict[str, float]:
    """Times of one process: import, load, first token; peak memory."""
    begin = time.perf_counter()
    from lmclock.model import load

    imported = time.perf_counter()
    model = load(MODEL, threads=threads)
    loaded = time.perf_counter()
    model.generate("hi", max_new_tokens=1, temperature=0)
    end = time.perf_counter()
    return {
        "import": imported - begin, "load": loaded - imported, "first": end - loaded,
        "memory": _peak(), "weights": float(model.program.bytes_per_cycle),
    }  # fmt: skip


def _llama_child(threads: int) -> dict[str, float]:
    """The same of llama.cpp, with as many cached positions as `lmclock run` has."""
    import ctypes

    from bench.llama import Llama

    path = str(pull(MODEL))
    begin = time.perf_counter()
    llama = Llama(path, threads, True, 8192, 512, probe=False)
    loaded = time.perf_counter()
    llama.decode((ctypes.c_int32 * 1)(1), 1)
    end = time.perf_counter()
    return {"llama load": loaded - begin, "llama first": end - loaded, "llama memory": _peak()}


CHILDREN: dict[str, Callable[[int], dict[str, float]]] = {
    "lmclock": _lmclock_child,
    "llama": _llama_child,
}


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def goals(stage: Stage) -> list[Goal]:
    """Line 6."""
    values = {job: stage.median("processes", job) for job in ("run", "load", "run memory")}
    size = pull(MODEL).stat().st_size
    memory = values["run memory"]
    return [
        Goal("process start to first token", values["run"], 0.35, "s", most=True),
        Goal("load and repack", values["load"], 0.060, "s", most=True),
        Goal("peak resident memory beside the file", memory - size if memory else None,
             ALLOWANCE, "B", most=True),
    ]  # fmt: skip


def parts(stage: Stage) -> Iterator[str]:
    """The text of the section."""
    size = pull(MODEL).stat().st_size
    yield METHOD.format(rounds=len(stage.rounds))
    samples: dict[str, Any] = {job: values for (_, job), values in stage.samples().items()}
    rows = [
        [text, *(f"{1e3 * f(samples[name]):.0f} ms" for f in (statistics.median, min, max))]
        for name, text in FIGURES.items() if name in samples
    ]  # fmt: skip
    yield table(["", "median", "lowest", "highest"], rows)
    names = {"run memory": "`lmclock run`", "memory": "lmclock's Python API",
             "llama memory": "llama.cpp"}  # fmt: skip
    rows = [
        [text, f"{statistics.median(samples[name]) / 1e6:,.0f} MB",
         f"{(statistics.median(samples[name]) - size) / 1e6:+,.0f} MB"]
        for name, text in names.items() if name in samples
    ]  # fmt: skip
    yield table(["peak resident memory", "median", f"beside the file of {size / 1e6:.0f} MB"], rows)


METHOD = """Medians of {rounds} interleaved rounds of processes with a warm file cache and \
compiled bytecode. Start-up of Python is in the first line; the others are times inside a process. \
llama.cpp has no Python, tokenizer or text in its times."""


if __name__ == "__main__":
    main()
