"""Measurements in stages that can stop and go on: samples in JSON, shared options, goals.

A stage is one set of workers and jobs in interleaved rounds. Every round is written to
build/bench/SECTION.json as soon as it is complete, so `--seconds 60` may end a run between two
rounds and `--resume` goes on from there; reports are made of what the file holds. `--only NAME`
runs some stages. A stage without `--resume` begins anew.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from bench.common import ROOT, Job, Samples, Worker, interleave, machine, publish, table
from lmclock import settings

FOLDER = ROOT / "build" / "bench"
_COMMIT = re.compile(r"commit ([\w-]+)")
Start = Callable[[], tuple[dict[str, Worker], list[str]]]


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line; see `options`."""

    rounds: int = 5
    threads: int = 2
    dry: bool = False
    quick: bool = False
    resume: bool = False
    only: tuple[str, ...] = ()
    deadline: float = float("inf")  # of time.monotonic

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wants(self, stage: str) -> bool:
        return not self.only or stage in self.only


def options(rounds: int = 5) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of every script; its function gets a Plan first."""
    rows = (
        click.option("--rounds", type=click.IntRange(1), default=rounds, show_default=True),
        click.option("--threads", type=click.IntRange(1), default=settings.threads),
        click.option("--dry", is_flag=True, help="Print only."),
        click.option("--quick", is_flag=True, help="One round of the small sizes."),
        click.option("--resume", is_flag=True, help="Go on with the rounds kept in build/bench."),
        click.option("--only", multiple=True, metavar="STAGE", help="Stages to run."),
        click.option("--seconds", type=float, help="Begin no round after so many seconds."),
    )

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(
            rounds: int, threads: int, dry: bool, quick: bool, resume: bool,
            only: tuple[str, ...], seconds: float | None, **others: Any,
        ) -> None:  # fmt: skip
            end = time.monotonic() + seconds if seconds else float("inf")
            plan = Plan(1 if quick else rounds, threads, dry, quick, resume, only, end)
            function(plan, **others)

        for row in reversed(rows):
            command = row(command)
        return command

    return decorate


@dataclass
class Stage:
    """Rounds of one stage, {"worker|job": value} each; what its workers said of themselves."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    where: str = ""  # machine, date, versions

    def samples(self) -> dict[tuple[str, str], list[float]]:
        """Values of (worker, job), one per round."""
        if not self.rounds:
            return {}
        return {_key(name): [r[name] for r in self.rounds] for name in self.rounds[0]}

    def median(self, worker: str, job: str) -> float | None:
        """The median of a job; None where it was not measured."""
        values = self.samples().get((worker, job))
        return statistics.median(values) if values else None


def _key(name: str) -> tuple[str, str]:
    worker, _, job = name.partition("|")
    return worker, job


@dataclass(frozen=True)
class Goal:
    """A line of what is to be reached: `value` should be at least (or at most) `wanted`."""

    what: str
    value: float | None
    wanted: float
    unit: str = "x"
    most: bool = False  # `wanted` is an upper bound

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.wanted if self.most else self.value >= self.wanted

    def cells(self) -> list[str]:
        shown = "not measured" if self.value is None else _show(self.value, self.unit)
        said = {True: "yes", False: "no", None: ""}[self.reached]
        return [self.what, shown, f"{'<=' if self.most else '>='} {_show(self.wanted, self.unit)}",
                said]  # fmt: skip


def _show(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "B":
        return f"{value / 1e6:,.0f} MB"
    digits = 0 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}{' ' if unit != 'x' else ''}{unit}"


def goal_table(goals: Iterable[Goal]) -> str:
    return table(["to reach", "measured", "wanted", "reached"], [g.cells() for g in goals])


class Store:
    """The stages of one script, on disk after every round."""

    def __init__(self, section: str, folder: Path | None = None) -> None:
        self.path = (folder or FOLDER) / f"{section}.json"
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.stages = {name: Stage(**fields) for name, fields in found.get("stages", {}).items()}
        self.goals = [Goal(**fields) for fields in found.get("goals", [])]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "goals": [asdict(goal) for goal in self.goals],
        }
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(whole))
        part.replace(self.path)

    def measure(
        self,
        name: str,
        plan: Plan,
        start: Start,
        rounds: int | None = None,
        packages: Sequence[str] = (),
        warm: bool = True,
        jobs: Callable[[str, str], bool] = lambda worker, job: True,
    ) -> None:
        """Run a stage until it has its rounds or time is up; nothing if it is not asked for.

        `jobs` says which jobs of which worker take part; `warm`: a round before them is not kept.
        """
        rounds = plan.rounds if rounds is None else rounds
        stage = self.stages.get(name, Stage()) if plan.resume else Stage()
        if not plan.wants(name) or plan.late or len(stage.rounds) >= rounds:
            return
        workers, stage.skipped = start()
        stage.about = {key: one.about for key, one in workers.items()}
        work: dict[Any, Job] = {
            f"{worker}|{job}": partial(one.ask, job)
            for worker, one in workers.items() for job in one.jobs if jobs(worker, job)
        }  # fmt: skip
        try:
            while work and len(stage.rounds) < rounds and not plan.late:
                samples = interleave(work, 1, seed=len(stage.rounds), warm=warm, label=name)
                stage.rounds.append({key: values[0] for key, values in samples.items()})
                stage.where = machine(plan.threads, packages)
                self.stages[name] = stage
                self.save()
                warm = False
        finally:
            for one in workers.values():
                one.close()

    def stage(self, name: str) -> Stage:
        """A stage, empty where it was not measured."""
        return self.stages.get(name, Stage())

    def finish(self, plan: Plan, title: str, parts: Iterable[str], goals: Sequence[Goal]) -> None:
        """Write the section of the document: title, machine, text, goals, what was skipped."""
        self.goals = list(goals)
        if not plan.dry:
            self.save()
        where = next((s.where for s in reversed(self.stages.values()) if s.where), "")
        notes = dict.fromkeys(
            note for stage in self.stages.values() for note in (
                *stage.skipped, *(n for a in stage.about.values() for n in a.get("notes", ()))
            )
        )  # fmt: skip
        text = [f"## {title}", where, *parts]
        commits = {found[1] for s in self.stages.values() if (found := _COMMIT.search(s.where))}
        if len(commits) > 1:
            text.append(f"Stages are of different commits: {', '.join(sorted(commits))}.")
        if goals:
            text.append(goal_table(goals))
        if notes:
            text.append("\n".join(f"- {note}" for note in notes))
        publish(self.path.stem, "\n\n".join(part for part in text if part), plan.dry)


def median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def best(samples: Mapping[tuple[str, str], Sequence[float]],
         keys: Iterable[tuple[str, str]]) -> tuple[str, str] | None:  # fmt: skip
    """Which of some (worker, job) took the least time by its median; None if none was measured."""
    there = [key for key in keys if samples.get(key)]
    return min(there, key=lambda key: statistics.median(samples[key]), default=None)


def quotient(samples: Samples, above: tuple[str, str] | None,
             below: tuple[str, str] | None) -> float | None:  # fmt: skip
    """The median over rounds of above / below; None where one was not measured."""
    if not above or not below or not samples.get(above) or not samples.get(below):
        return None
    pairs = zip(samples[above], samples[below], strict=True)
    return statistics.median(a / b for a, b in pairs)
