"""AVX2 only: lmclock's avx2 path beside a llama.cpp that was built without AVX-512.

    python -m bench.avx2 [--rounds 5] [--build]

`--build` compiles the second llama.cpp into build/avx2 (some minutes, once); without it and without
an earlier build the section says so. Both engines run on the same processor, so that this measures
the kernels and not the processor.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import click

from bench.common import ROOT, Skipped, Worker, serve, table
from bench.engines import Made, Sizes, llama_jobs, lmclock_jobs
from bench.peers import fastest
from bench.stages import Goal, Plan, Stage, Store, options, quotient

FOLDER = ROOT / "build" / "avx2"
LIBRARY = FOLDER / "packages"
FLAGS = {
    "GGML_NATIVE": "OFF", "GGML_AVX512": "OFF", "GGML_AVX": "ON", "GGML_AVX2": "ON",
    "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON", "LLAVA_BUILD": "OFF",
    "MTMD_BUILD": "OFF",
}  # fmt: skip
PATH = "avx2"
KINDS = ("Q4_1", "Q4_0")
ENGINES = ("lmclock", *(f"llama.cpp {kind}" for kind in KINDS))
PACKAGES = ("llama-cpp-python", "numpy")
PROMPT, NEW = 256, 64


@click.command(help=__doc__)
@options(rounds=5)
@click.option("--build", is_flag=True, help="Compile llama.cpp for AVX2 if it is not there.")
@click.option("--build-only", is_flag=True, help="The same, and measure nothing.")
@click.option("--worker", hidden=True)
def main(plan: Plan, build: bool, build_only: bool, worker: str | None) -> None:
    if worker:
        serve(lambda: jobs(worker, Sizes(plan.threads, PROMPT, NEW)))
        return
    if (build or build_only) and not LIBRARY.exists():
        compile_llama()
    if build_only:
        return
    store = Store("avx2")
    store.measure("avx2", plan, partial(begin, plan.threads), packages=PACKAGES)
    stage = store.stage("avx2")
    store.finish(plan, "AVX2 only", parts(stage) if stage.rounds else (), goals(stage))


def compile_llama() -> None:
    """The version that is installed, from its source, for AVX2."""
    from importlib.metadata import version

    definitions = " ".join(f"-D{name}={value}" for name, value in FLAGS.items())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--target",
         str(LIBRARY),
         "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version('llama-cpp-python')}"],
        check=True, stdout=sys.stderr,
        env=os.environ | {"CMAKE_ARGS": definitions, "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    )  # fmt: skip


def begin(threads: int) -> tuple[dict[str, Worker], list[str]]:
    """The engines, each told to be without AVX-512."""
    workers: dict[str, Worker] = {}
    skipped = []
    extra = {"LMCLOCK_ISA": PATH, "PYTHONPATH": str(LIBRARY)}
    for name in ENGINES:
        if name != "lmclock" and not LIBRARY.exists():
            skipped.append(f"{name} was skipped: {LIBRARY} is not built (--build does it).")
            continue
        workers[name] = Worker("bench.avx2", name, threads=threads, extra=extra)
    for name, one in list(workers.items()):
        try:
            one.greet()
        except Skipped as reason:
            skipped.append(f"{name} was skipped: {reason}.")
            del workers[name]
    return workers, skipped


def jobs(worker: str, sizes: Sizes) -> Made:
    if worker == "lmclock":
        return lmclock_jobs(sizes, simd=PATH)
    about, found = llama_jobs(sizes, worker.split()[1])
    if "AVX512 = 1" in about["notes"][0]:
        raise Skipped("this llama.cpp was built with AVX-512")
    return about, found


def goals(stage: Stage) -> list[Goal]:
    """Line 9."""
    samples = stage.samples()

    def over(names: tuple[str, ...], job: str) -> float | None:
        return quotient(samples, fastest(samples, names, job), ("lmclock", job))

    return [
        Goal("decode, llama.cpp on the same file", over(ENGINES[1:2], "decode"), 1.2),
        Goal("decode, llama.cpp's best format", over(ENGINES[1:], "decode"), 1.2),
        Goal("prefill, llama.cpp on the same file", over(ENGINES[1:2], "prefill"), 1.5),
        Goal("prefill, llama.cpp's best format", over(ENGINES[1:], "prefill"), 1.5),
    ]


def parts(stage: Stage) -> Iterator[str]:
    """The text of the section."""
    samples = stage.samples()
    yield METHOD
    rows = []
    for name in stage.about:
        cells = [name]
        for job, count in (("prefill", PROMPT), ("decode", NEW)):
            key = fastest(samples, (name,), job)
            cells.append(f"{count / statistics.median(samples[key]):,.0f}" if key else "")
            times = quotient(samples, key, ("lmclock", job))
            cells.append(f"{times:.2f}" if times else "")
        rows.append(cells)
    head = ["engine", f"prefill {PROMPT}, tok/s", "lmclock is x", f"decode {NEW}, tok/s",
            "lmclock is x"]  # fmt: skip
    yield table(head, rows)


METHOD = f"""LMCLOCK_ISA={PATH} on the packaged Q4_1 file, and llama.cpp built for AVX2, FMA and \
F16C without anything newer, on the same file and in its fastest format, flash attention off or \
on, whichever is faster."""


if __name__ == "__main__":
    main()
