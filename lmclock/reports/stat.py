"""`stat` as text, in the manner of perf stat: counts, `#` comments with rates, a tree, the hottest.

Input is what `summary` returns; nothing is computed here but units.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

LEAF_TITLES = {
    "memory_limit": "at the memory limit",
    "compute_limit": "at the compute limit",
    "memory_gap": "above the memory limit (inferred: the memory roof binds)",
    "core_gap": "above the compute limit (inferred: the compute roof binds)",
    "discarded": "discarded rows",
    "wait": "waiting (barriers, imbalance)",
    "front_end": "front end (fetch, decode, write back)",
}
ORDER = ("encode", "prefill", "mixed", "decode")


def si(value: float, unit: str) -> str:
    """`12.3 GB/s`: three digits and a decimal prefix."""
    scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
    factor, prefix = next((s for s in scales if abs(value) >= s[0]), scales[-1])
    scaled = value / factor
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {prefix}{unit}"


def clock_time(seconds: float) -> str:
    """A duration in the unit that reads best."""
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def print_stat(report: dict[str, Any], console: Console, hottest: int = 10) -> None:
    """The whole report; `hottest` instructions per kind of cycle."""
    machine, limits = report["machine"], report["limits"]
    console.print(
        f"[bold]{report['program']}[/] on {machine['name']} ({limits['path']}, "
        f"{machine['threads']} threads), {limits['processor']}",
        highlight=False,
    )
    for kind in ORDER:
        if kind in report["kinds"]:
            _print_kind(kind, report["kinds"][kind], console, hottest)
    console.print(
        f"\n times in {machine['tick_source']} ticks at {machine['ticks_per_second'] / 1e6:,.1f} "
        f"MHz; limits measured {limits['when']}, repetitions vary by up to "
        f"{100 * limits['spread']:.0f} %",
        highlight=False,
    )


def _print_kind(kind: str, k: dict[str, Any], console: Console, hottest: int) -> None:
    console.print(f"\n[bold]{kind}[/]")
    tokens = k["prompt_tokens"] + k["decode_rows"]
    per_cycle = k["seconds"] / max(k["cycles"], 1)
    rows = [
        (f"{k['cycles']:,}", "cycles", f"{si(k['hz'], 'Hz')}, {clock_time(per_cycle)} a cycle"),
        (
            f"{tokens:,}",
            "tokens in",
            f"{k['rows_per_cycle']:.2f} a cycle, {k['rows_per_second']:,.1f} tok/s",
        ),
        (f"{k['retired']:,}", "tokens out", f"{k['tokens_per_cycle']:.2f} a cycle"),
        (
            si(k["bytes_per_cycle"] * k["cycles"], "B"),
            "moved at least",
            f"{si(k['bytes_per_cycle'], 'B')} a cycle, {si(k['bytes_per_second'], 'B/s')}",
        ),
        (
            si(k["operations_per_cycle"] * k["cycles"], "op"),
            "operations",
            f"{si(k['operations_per_second'], 'op/s')}",
        ),
        (
            clock_time(k["bound_seconds_per_cycle"]),
            "limit of a cycle",
            f"{100 * k['of_bound']:.1f} % of the limit reached",
        ),
    ]
    for value, name, comment in rows:
        console.print(f"{value:>16}  {name:<18} # {comment}", highlight=False)
    stages = ", ".join(
        f"{name} {clock_time(t)}" for name, t in k["stages"].items() if name != "execute"
    )
    run = clock_time(k["run_seconds_per_cycle"])
    entry = clock_time(k["stages"]["execute"])
    console.print(f"\n  stages: {stages}, execute {run} (+ {entry} around it)", highlight=False)
    console.print("\n  where the time goes", highlight=False)
    for leaf, share in k["tree"].items():
        bar = "#" * round(30 * share)
        console.print(f"  {100 * share:6.1f} %  {LEAF_TITLES[leaf]:<60} {bar}", highlight=False)
    console.print(
        f"  100.0 %  of {clock_time(k['seconds'])}; model error {100 * k['model_error']:.1f} % "
        "(instructions faster than their limit)",
        highlight=False,
    )
    console.print()
    console.print(_hottest(k["instructions"][:hottest]))


def _hottest(entries: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, side in (
        ("  time", "right"), ("instruction", "left"), ("times", "right"), ("GB/s", "right"),
        ("Gop/s", "right"), ("of limit", "right"), ("bound", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for e in entries:
        table.add_row(
            f"{100 * e['share']:.1f} %", e["name"], f"{e['count']}",
            f"{e['bytes_per_second'] / 1e9:.1f}", f"{e['operations_per_second'] / 1e9:.1f}",
            f"{100 * e['of_limit']:.0f} %", e["bound"],
        )  # fmt: skip
    return table
