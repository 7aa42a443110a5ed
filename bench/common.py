"""What the scripts share: workers in processes of their own, interleaving, tables, the document.

A peer runs in a worker process, so that no engine's threads, allocator or settings touch another's.
Rounds visit every worker before any is visited again; a slow moment of the machine then spoils one
round of all and not one engine, and ratios are taken within a round.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lmclock import settings
from lmclock.files.pull import pull
from lmclock.hardware.calibrate import processor

MODEL = "smollm2"
ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "measurements.md"
SECTIONS = (
    "summary", "limit", "peers", "embed", "prefill", "scale", "batch", "depth", "start", "quality",
    "avx2", "overhead",
)  # fmt: skip
HEADER = """# Measurements

Written by the scripts in `bench/` (`make bench`), each its own section; nothing here is typed by
hand. Figures hold for the machine and the day named above them. Ratios are paired: both sides were
measured in the same round, and the median over rounds is given.
"""
PAUSE = 0.05  # seconds before a job, in which the last worker's threads stop spinning

Job = Callable[[], float]
Samples = dict[Any, list[float]]  # by job, one value per round


class Skipped(Exception):
    """A peer that cannot be measured here, and why."""


class Worker:
    """A process that does named jobs on demand and says how long each took."""

    def __init__(
        self, module: str, *arguments: str, threads: int, extra: Mapping[str, str] | None = None
    ) -> None:
        """`extra` is added to its environment."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= extra or {}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", *arguments, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip
        self.about: dict[str, Any] = {}
        self.jobs: list[str] = []

    def greet(self) -> None:
        """Wait until it is ready; Skipped when it cannot be measured here."""
        hello = self._answer()
        if "skip" in hello:
            self.close()
            raise Skipped(hello["skip"])
        self.about, self.jobs = hello, hello["jobs"]

    def ask(self, job: str) -> float:
        """What the job returns, seconds for most."""
        assert self.process.stdin
        time.sleep(PAUSE)
        print(job, file=self.process.stdin, flush=True)
        return float(self._answer()["value"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.errors.seek(0)
        said, code = self.errors.read()[-4000:], self.process.wait()
        raise RuntimeError(f"worker {self.process.args!r} ended with {code}:\n{said}")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def serve(make: Callable[[], tuple[Mapping[str, Any], Mapping[str, Job]]]) -> None:
    """The worker's side: `make` gives what to say of the peer and its jobs."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    try:
        about, jobs = make()
    except ModuleNotFoundError as error:
        answer(skip=f"{error.name} is not installed")
        return
    except Skipped as reason:
        answer(skip=str(reason))
        return
    answer(jobs=list(jobs), **about)
    for line in sys.stdin:
        answer(value=jobs[line.strip()]())


def start(
    module: str, names: Iterable[str], *arguments: str, threads: int
) -> tuple[dict[str, Worker], list[str]]:
    """(workers by name, a sentence for each that could not start). They start side by side."""
    begun = {name: Worker(module, name, *arguments, threads=threads) for name in names}
    skipped: list[str] = []
    for name, worker in list(begun.items()):
        try:
            worker.greet()
        except Skipped as reason:
            skipped.append(f"{name} was skipped: {reason}.")
            del begun[name]
    return begun, skipped


def interleave(
    jobs: Mapping[Any, Job], rounds: int, seed: int = 0, quiet: bool = False, warm: bool = True,
    label: str = "",
) -> Samples:  # fmt: skip
    """Each job once per round, in an order drawn anew; `warm`: a round before the first is not
    kept.
    """
    order, draw = list(jobs), random.Random(seed)
    samples: Samples = {name: [] for name in jobs}
    for number in range(0 if warm else 1, rounds + 1):
        draw.shuffle(order)
        for name in order:
            value = jobs[name]()
            if number:
                samples[name].append(value)
        if not quiet:
            print(f"{label} round {number} of {rounds}".strip(), file=sys.stderr)
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def transformers_model(threads: int, kind: str, path: Path | None = None) -> Any:
    """The file's weights, dequantised by transformers itself; `kind` is a dtype of torch."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    path = path or pull(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=getattr(torch, kind)
    )
    return model.eval()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column flush left and the others flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(threads: int, packages: Sequence[str] = ()) -> str:
    """Two lines on what was measured: processor, system, threads, date, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    path = f", {settings.simd_path()} forced" if settings.simd_path() else ""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("lmclock", *packages))
    return (
        f"{processor()}, {os.cpu_count()} processors, {memory:.0f} GiB, {platform.system()} "
        f"{platform.release()}; {threads} threads{path}; "
        f"{datetime.now(UTC).strftime('%Y-%m-%d %H:%M')} UTC; load "
        f"{os.getloadavg()[0]:.1f} at the end.\n{versions}, commit {_commit()}; Python "
        f"{platform.python_version()}."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def publish(section: str, text: str, dry: bool, document: Path = DOCUMENT) -> None:
    """Print a section, and put it in its place in the document unless `dry`."""
    print(text)
    if dry:
        return
    whole = document.read_text(encoding="utf-8") if document.exists() else HEADER
    parts = {name: _body(whole, name) for name in SECTIONS} | {section: text.strip()}
    pieces = [f"<!-- {n} -->\n{body}\n<!-- /{n} -->\n" for n, body in parts.items() if body]
    document.write_text("\n".join([HEADER, *pieces]), encoding="utf-8")


def _body(whole: str, name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", whole, re.DOTALL)
    return found[1] if found else ""
