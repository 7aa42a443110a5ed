"""`lmclock bench`: prefill and decode speed with llama-bench's options, columns and JSON fields."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain, product
from typing import Any

import click
import numpy as np

from lmclock.cli import options
from lmclock.encode import USES
from lmclock.errors import UnsupportedError
from lmclock.hardware.calibrate import processor
from lmclock.model import Model
from lmclock.reports.bench import Test, measure, model_facts, rates, times

MOST_VALUES = 1000
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?")
_VALID = "numbers (512), lists (16,32) and ranges (8-32+8, 8-64*2)"


class Numbers(click.ParamType):
    """`512`, `16,32`, `8-32+8`, `8-64*2` and lists of these, as a tuple of whole numbers."""

    name = "N,..."

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in str(value).split(","):
            found += self._part(part) or self.fail(f"{value!r} is none of {_VALID}", param, ctx)
            if len(found) > MOST_VALUES:
                self.fail(f"{value!r} has more than {MOST_VALUES} values", param, ctx)
        if min(found) < self.least:
            self.fail(f"{min(found)} is out of range; valid: {self.least} or more", param, ctx)
        return tuple(found)

    @staticmethod
    def _part(text: str) -> list[int]:
        """The values of one number or range, one more than allowed at most; none if it is bad."""
        match = _RANGE.fullmatch(text)
        if not match:
            return []
        first = int(match[1])
        last = int(match[2] or first)
        step = int(match[4] or 1)
        grows = step > 1 and first > 0 if match[3] == "*" else step > 0
        values: list[int] = []
        while grows and first <= last and len(values) <= MOST_VALUES:
            values.append(first)
            first = first * step if match[3] == "*" else first + step
        return values


class Pair(click.ParamType):
    """`512,128`: tokens to prefill, then tokens to decode."""

    name = "P,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,9}),(\d{1,9})", str(value))
        if not match or not int(match[1]) + int(match[2]):
            self.fail(f"{value!r} is no pair of token counts such as 512,128", param, ctx)
        return int(match[1]), int(match[2])


def _list(*names: str, least: int, default: str | None, about: str) -> Callable[..., Any]:
    return click.option(
        *names, type=Numbers(least), multiple=True, default=[default] if default else [],
        show_default=default or False, help=about,
    )  # fmt: skip


@click.command(
    "bench",
    help="Prefill and decode speed, in llama-bench's columns. Numbers may be lists (16,32) and "
    "ranges (8-32+8, 8-64*2).",
)
@options.program_options
@options.machine_option
@_list("-p", "--n-prompt", least=0, default="512", about="Tokens to prefill; 0: no such test.")
@_list("-n", "--n-gen", least=0, default="128", about="Tokens to decode; 0: no such test.")
@click.option("-pg", type=Pair(), multiple=True, help="Prefill P tokens, then decode N.")
@_list("-d", "--n-depth", least=0, default="0", about="Tokens in the cache before a test.")
@_list("-b", "--batch-size", least=1, default="512", about="Most prompt tokens in one cycle.")
@_list("-t", "--threads", least=1, default=None, about="Threads.")
@click.option("-r", "--repetitions", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--no-warmup", is_flag=True, help="Do not run each test once before it is timed.")
@click.option(
    "-o", "--output", type=click.Choice(["md", "csv", "json", "jsonl"]), help="Format (md)."
)
@options.json_option
def command(
    loading: options.Loading, machine: str, n_prompt: Any, n_gen: Any, pg: Any, n_depth: Any,
    batch_size: Any, threads: Any, repetitions: int, no_warmup: bool, output: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    if as_json and output not in (None, "json"):
        raise click.UsageError(f"--json and -o {output} are two formats; give one")
    tests = list(_tests(_flat(n_prompt), _flat(n_gen), _flat(n_depth), pg))
    if not tests:
        raise click.UsageError("nothing to measure; valid: -p or -n above 0, or -pg")
    setups = [
        replace(loading, machine=machine, threads=t, chunk=b, context=max(x.context for x in tests))
        for t, b in product(_flat(threads) or (None,), _flat(batch_size))
    ]
    records = (r for s in setups for r in _records(s, tests, repetitions, not no_warmup))
    format = "json" if as_json else output or "md"
    if format == "md":
        unusual = {"n_batch": any(s.chunk != 512 for s in setups), "type_k": loading.cache != "f16"}
        _write_md(records, {name for name in EXTRA if unusual[name]})
    else:
        WRITERS[format](records)


def _flat(given: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The values of an option that was given several times."""
    return tuple(chain(*given))


def _tests(
    prompts: tuple[int, ...],
    news: tuple[int, ...],
    depths: tuple[int, ...],
    pairs: tuple[tuple[int, int], ...],
) -> Iterator[Test]:
    """In llama-bench's order: at each depth the prompts, the decodes, the pairs."""
    for depth in depths:
        yield from (Test(n, 0, depth) for n in prompts if n)
        yield from (Test(0, n, depth) for n in news if n)
        yield from (Test(p, n, depth) for p, n in pairs)


def _records(
    loading: options.Loading, tests: list[Test], repetitions: int, warm: bool
) -> Iterator[dict[str, Any]]:
    """One record per test of one set-up, each as soon as it is measured."""
    with loading.load() as model:
        need_replies(model, loading.name)
        facts = _facts(model, loading)
        rng = np.random.default_rng(1)
        for test in tests:
            if warm:
                measure(model.engine, replace(test, generated=min(test.generated, 4)), rng)
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            runs = [measure(model.engine, test, rng) for _ in range(repetitions)]
            traits = model.machine.traits
            clock = rates(model.clock(chain(*runs)), traits)
            yield facts | {"test_time": now} | times(test, runs, traits) | clock


def need_replies(model: Model, name: str) -> None:
    """UnsupportedError, which says what there is instead, for models that do not answer prompts."""
    facts = model.engine.facts
    if facts.next is not None and not facts.encodes:
        return
    head = getattr(model.config, "head", "sequence")  # a net of numbers has classes too
    use = "translate" if facts.encodes else USES[head]
    raise UnsupportedError(
        f"model {model.program.name!r} has no prompts and replies to time; valid: {use}, and "
        f"`lmclock stat {name}`, which says how fast that is"
    )


def _facts(model: Model, loading: options.Loading) -> dict[str, Any]:
    traits = model.machine.traits
    path = getattr(model.machine, "path", None)
    return {
        "build_commit": importlib.metadata.version("lmclock"),
        "cpu_info": processor(),
        "gpu_info": "",
        "backends": f"{traits.name} {path}" if path else traits.name,
        "model_filename": loading.name,
        **model_facts(model.program),
        "n_batch": loading.chunk,
        "n_ubatch": loading.chunk,
        "n_threads": traits.threads,
        "type_k": loading.cache,
        "type_v": loading.cache,
    }


def _size(record: dict[str, Any]) -> str:
    size = record["model_size"]
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _params(record: dict[str, Any]) -> str:
    count = record["model_n_params"]
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _test(record: dict[str, Any]) -> str:
    return Test(record["n_prompt"], record["n_gen"], record["n_depth"]).name


EXTRA = ("n_batch", "type_k")  # columns shown only where a set-up is not the usual one
# Name, least width, whether flush right, and the cell of a record.
Column = tuple[str, int, bool, Callable[[dict[str, Any]], str]]
COLUMNS: tuple[Column, ...] = (
    ("model", 24, False, lambda r: r["model_type"]),
    ("size", 11, True, _size),
    ("params", 9, True, _params),
    ("backend", 14, False, lambda r: r["backends"]),
    ("threads", 7, True, lambda r: str(r["n_threads"])),
    ("n_batch", 7, True, lambda r: str(r["n_batch"])),
    ("type_k", 6, True, lambda r: r["type_k"]),
    ("test", 15, True, _test),
    ("t/s", 18, True, lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"),
    ("Hz", 8, True, lambda r: f"{r['hz']:.2f}"),
    ("GB/s", 6, True, lambda r: f"{r['bytes_per_second'] / 1e9:.1f}"),
    ("of limit", 8, True, lambda r: f"{100 * r['of_bound']:.0f} %"),
)


def _write_md(records: Iterator[dict[str, Any]], extra: set[str]) -> None:
    shown = [c for c in COLUMNS if c[0] not in EXTRA or c[0] in extra]
    last: dict[str, Any] = {}
    for record in records:
        if not last:
            _line(name.rjust(w) if right else name.ljust(w) for name, w, right, _ in shown)
            _line("-" * (w - right) + ":" * right for _, w, right, _ in shown)
        cells = ((cell(record), w, right) for _, w, right, cell in shown)
        _line(text.rjust(w) if right else text.ljust(w) for text, w, right in cells)
        last = record
    click.echo(
        f"\nlmclock {last['build_commit']}; {last['cpu_info']}; times in {last['tick_source']} "
        f"ticks; limits measured {last['limits_when']}, repetitions vary by up to "
        f"{100 * last['limits_spread']:.0f} %"
    )


def _line(cells: Iterator[str]) -> None:
    click.echo(f"| {' | '.join(cells)} |")


def _write_csv(records: Iterator[dict[str, Any]]) -> None:
    """Every field but the samples, quoted."""
    for number, record in enumerate(records):
        row = {k: v for k, v in record.items() if not isinstance(v, list)}
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        if not number:
            writer.writerow(row)
        writer.writerow(row.values())
        click.echo(text.getvalue(), nl=False)


def _write_jsonl(records: Iterator[dict[str, Any]]) -> None:
    for record in records:
        click.echo(json.dumps(record, ensure_ascii=False))


def _write_json(records: Iterator[dict[str, Any]]) -> None:
    options.print_json(list(records))


WRITERS: dict[str, Callable[[Iterator[dict[str, Any]]], None]] = {
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
}
