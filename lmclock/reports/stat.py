"""`stat` as text, in the manner of perf stat: counts, `#` comments with rates, a tree, the hottest.

Input is what `summary` returns; nothing is computed here but units. 80 columns are enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LEAF_TITLES = {
    "memory_limit": "at the memory limit",
    "compute_limit": "at the compute limit",
    "memory_gap": "memory-side gap *",
    "core_gap": "core-side gap *",
    "discarded": "discarded rows",
    "wait": "wait (barriers, imbalance)",
    "front_end": "front end (fetch, decode, write back)",
}
ORDER = ("encode", "prefill", "mixed", "decode")
PAIRED = 0.05  # a limit that varies more than this bears no claim but paired ratios
HEADINGS = ("time", "instruction", "times", "GB/s", "Gop/s", "of limit", "bound")
COLUMNS = "{:>7}  {:<25.25} {:>5}  {:>6}  {:>6}  {:>8}  {:<7}"


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


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def print_stat(report: dict[str, Any], console: Console, hottest: int = 10) -> None:
    """The whole report; `hottest` instructions per kind of cycle."""
    machine, limits = report["machine"], report["limits"]

    def say(line: str = "", style: str | None = None) -> None:
        console.print(line, style=style, highlight=False, markup=False)

    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    say(f" {report['program']} on {machine['name']}, {threads}", "bold")
    say(f" {limits['processor']}")
    for kind in ORDER:
        if kind in report["kinds"]:
            say(f"\n {kind}", "bold")
            for line in _kind(kind, report["kinds"][kind], hottest):
                say(line)
    say(
        f"\n times in {machine['tick_source']} ticks of "
        f"{machine['ticks_per_second'] / 1e6:,.1f} MHz; * inferred from the roof that binds"
    )
    of = f"{limits['path']}, {limits['threads']} thread{'s' * (limits['threads'] != 1)}"
    say(f" limits of {limits['when']} ({of}), which vary by up to {percent(limits['spread'])}")
    if any(k["bound_spread"] > PAIRED for k in report["kinds"].values()):
        limit = percent(PAIRED)
        say(f" (above {limit}, compare runs side by side only; `calibrate` measures anew)")


def _kind(kind: str, k: dict[str, Any], hottest: int) -> list[str]:
    lines = [f"{value:>12}  {name:<16} # {comment}" for value, name, comment in _counts(kind, k)]
    each = k["stages"] | {"execute": k["stages"]["execute"] + k["run_seconds_per_cycle"]}
    spent = (f"{name.replace('_', ' ')} {clock_time(t)}" for name, t in each.items())
    lines += ["", f"  a cycle: {', '.join(spent)}", *_experts(k), "", "  where the time goes"]
    for leaf, share in k["tree"].items():
        line = f"  {percent(share, 1):>7}  {LEAF_TITLES[leaf]:<38} {'#' * round(30 * share)}"
        lines.append(line.rstrip())
    lines += [
        f"  100.0 %  of {clock_time(k['seconds'])}; model error {percent(k['model_error'], 1)} "
        "(faster than the limit)",
        "",
        COLUMNS.format(*HEADINGS).rstrip(),
    ]
    for e in k["instructions"][:hottest]:
        line = COLUMNS.format(
            percent(e["share"], 1), e["name"], e["count"],
            f"{e['bytes_per_second'] / 1e9:.1f}", f"{e['operations_per_second'] / 1e9:.1f}",
            percent(e["of_limit"]), e["bound"],
        )  # fmt: skip
        lines.append(line.rstrip())
    return lines


def _experts(k: dict[str, Any]) -> list[str]:
    """Experts that a cycle used, layer by layer."""
    if "experts" not in k:
        return []
    how = "observed" if k["experts"]["observed"] else "expected of even choices"
    layers = k["experts"]["layers"]
    of = "/".join(map(str, sorted({layer["of"] for layer in layers})))
    numbers = [f"{layer['used']:.1f}" for layer in layers]
    rows = [numbers[at : at + 12] for at in range(0, len(numbers), 12)]
    title = f"  experts used of {of}, by layer ({how}):"
    return [title, *("  " + "".join(f"{number:>6}" for number in row) for row in rows)]


def _counts(kind: str, k: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(value, name, comment) of each counter."""
    cycles = k["cycles"]
    each = clock_time(k["seconds"] / cycles)
    rows = [(f"{cycles:,}", "cycles", f"{si(k['hz'], 'Hz')}, {each} a cycle")]
    decode = k["decode_rows"] if k["prompt_tokens"] or k["decode_rows"] != k["retired"] else 0
    for count, name in ((k["prompt_tokens"], "prompt tokens"), (decode, "decode rows")):
        if count:
            rows.append(
                (f"{count:,}", name, f"{count / cycles:.2f} a cycle, "
                 f"{count / k['seconds']:,.1f} tok/s")
            )  # fmt: skip
    if kind != "encode":
        rows.append(
            (f"{k['retired']:,}", "generated tokens",
             f"{k['tokens_per_cycle']:.2f} a cycle, {k['tokens_per_second']:,.1f} tok/s")
        )  # fmt: skip
    rows += [
        (si(k["bytes_per_cycle"] * cycles, "B"), "moved at least",
         f"{si(k['bytes_per_cycle'], 'B')} a cycle, {si(k['bytes_per_second'], 'B/s')}"),
        (si(k["operations_per_cycle"] * cycles, "op"), "operations",
         f"{si(k['operations_per_cycle'], 'op')} a cycle, "
         f"{si(k['operations_per_second'], 'op/s')}"),
        (clock_time(k["bound_seconds_per_cycle"]), "limit of a cycle",
         f"{percent(k['of_bound'], 1)} reached ({k['bound_side']} limit, "
         f"varies by {percent(k['bound_spread'])})"),
    ]  # fmt: skip
    for name, part in k.get("parts", {}).items():
        share = part["bound_seconds_per_cycle"] / k["bound_seconds_per_cycle"]
        what = "alone" if name == "decode" else "rest"
        rows.append(
            (clock_time(part["bound_seconds_per_cycle"]), f"- {name} ({what})",
             f"{percent(share)} of the limit, {part['rows']:,} rows")
        )  # fmt: skip
    return rows
