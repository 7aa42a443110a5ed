"""The clock's numbers as plain dicts: what `--json` prints and what every text report reads.

All times are seconds, all rates per second, all shares fractions of one.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lmclock.clock import Clock, Tally
from lmclock.cycle import STAGES
from lmclock.isa import Instruction
from lmclock.machines import Traits

_LAYER = re.compile(r"(?<=\.)\d+(?!\w)|(?<=\[)\d+(?=\])")


def summary(clock: Clock, traits: Traits) -> dict[str, Any]:
    """Everything a stat report says: the machine, its limits, and one entry per kind of cycle."""
    limits = clock.limits
    return {
        "program": clock.program.name,
        "machine": {
            "name": traits.name,
            "threads": traits.threads,
            "tick_source": traits.tick_source,
            "ticks_per_second": traits.tick_rate,
        },
        "limits": {
            "processor": limits.processor,
            "path": limits.path,
            "threads": limits.threads,
            "when": limits.when,
            "spread": limits.spread,
            "peaks": {kind: peak.best for kind, peak in limits.peaks.items()},
        },
        "kinds": {kind: _kind(clock, kind, clock.kinds[kind]) for kind in sorted(clock.kinds)},
    }


def _kind(clock: Clock, kind: str, tally: Tally) -> dict[str, Any]:
    account = tally.account
    per_second = clock.rate * account.threads
    seconds, cycles = tally.ticks / clock.rate, tally.cycles
    moved, done = np.sum([t.sum(axis=0) for t in tally.traffic.values()], axis=0).tolist()
    bound = account.bound / per_second
    rows = tally.prompt_tokens + tally.decode_rows
    whole = max(account.total, 1)
    inside = account.total - sum(account.stages.values())
    entry = {
        "cycles": cycles,
        "seconds": seconds,
        "hz": _rate(cycles, seconds),
        "prompt_tokens": tally.prompt_tokens,
        "decode_rows": tally.decode_rows,
        "retired": tally.retired,
        "rows_per_cycle": rows / cycles,
        "rows_per_second": _rate(rows, seconds),
        "tokens_per_cycle": tally.retired / cycles,
        "tokens_per_second": _rate(tally.retired, seconds),
        "bytes_per_cycle": moved / cycles,
        "operations_per_cycle": done / cycles,
        "bytes_per_second": _rate(moved, seconds),
        "operations_per_second": _rate(done, seconds),
        "bound_seconds_per_cycle": bound / cycles,
        "bound_side": "memory" if tally.memory_seconds >= tally.compute_seconds else "compute",
        "bound_spread": _spread(clock, tally),
        "of_bound": _rate(bound, seconds),
        "stages": {s: account.stages[s] / per_second / cycles for s in STAGES},
        "run_seconds_per_cycle": inside / per_second / cycles,
        "tree": {leaf: ticks / whole for leaf, ticks in account.tree().items()},
        "model_error": account.model_error / whole,
        "instructions": _instructions(clock, tally),
    }
    if experts := _experts(clock, tally):
        entry["experts"] = {"observed": tally.observed, "layers": experts}
    if kind == "mixed":
        entry["parts"] = _parts(tally, bound, tally.decode_bound / per_second)
    return entry


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _spread(clock: Clock, tally: Tally) -> float:
    """How much the figures vary that the limit of these cycles hangs on."""
    if tally.memory_seconds >= tally.compute_seconds:
        return clock.limits.spread_at(tally.cycle_bytes)
    return max(peak.spread for peak in clock.limits.peaks.values())


def _parts(tally: Tally, bound: float, decode: float) -> dict[str, Any]:
    """A mixed cycle's limit: what its decode rows would need alone, and the rest for its prompt."""
    return {
        "decode": {"rows": tally.decode_rows, "bound_seconds_per_cycle": decode / tally.cycles},
        "prefill": {
            "rows": tally.prompt_tokens,
            "bound_seconds_per_cycle": (bound - decode) / tally.cycles,
        },
    }


def _experts(clock: Clock, tally: Tally) -> list[dict[str, Any]]:
    """Of every layer with a choice of experts: how many there are, and how many a cycle used."""
    return [
        {"name": i.weights[0], "of": i["experts"], "used": float(used) / tally.cycles}
        for section, table in tally.experts.items()
        for i, used in zip(clock.program.section(section).instructions, table, strict=True)
        if i.op == "experts" and i["experts"] > 1
    ]


def _instructions(clock: Clock, tally: Tally) -> list[dict[str, Any]]:
    """One entry per instruction of the folded program (layers summed), the most time first.

    `of_limit` is above one where the model of the limit is wrong: see `model_error`.
    """
    account = tally.account
    per_second = clock.rate * account.threads
    groups: dict[str, dict[str, Any]] = {}
    for section, busy in account.busy.items():
        sums = np.column_stack(
            [busy / per_second, account.limit[section] / per_second, tally.traffic[section],
             account.memory_bound[section], account.kept[section]]
        )  # fmt: skip
        for i, row in zip(clock.program.section(section).instructions, sums, strict=True):
            name = title(i) if len(account.busy) == 1 else f"{section}: {title(i)}"
            entry = groups.setdefault(name, {"name": name, "op": i.op, "count": 0, "sums": 0.0})
            entry["count"] += 1
            entry["sums"] += row
    for entry in groups.values():
        seconds, limit, moved, done, memory, kept = entry.pop("sums").tolist()
        entry |= {
            "seconds": seconds,
            "limit_seconds": limit,
            "bytes": moved,
            "operations": done,
            "share": _rate(seconds, account.total / per_second),
            "bytes_per_second": _rate(moved, seconds),
            "operations_per_second": _rate(done, seconds),
            "of_limit": _rate(limit, seconds),
            "bound": "memory" if 2 * memory >= kept else "compute",
        }
    return sorted(groups.values(), key=lambda entry: -entry["seconds"])


def title(i: Instruction) -> str:
    """An instruction without its layer number: `glu blk.*.ffn_gate`, `attend kv[*]`."""
    subject = i.weights[0] if i.weights else i.state or (i.outs[0] if i.outs else "")
    return f"{i.op} {_LAYER.sub('*', subject)}"


def one_line(clock: Clock) -> str:
    """A reply's clock in one line: Hz, tokens per cycle, share of the limit."""
    parts = []
    for kind in ("encode", "prefill", "mixed", "decode"):
        if kind not in clock.kinds:
            continue
        k = _kind(clock, kind, clock.kinds[kind])
        if kind in ("encode", "prefill"):
            parts.append(f"{kind} {k['prompt_tokens']} tokens, {k['rows_per_second']:,.0f} tok/s")
            continue
        parts.append(
            f"{kind} {k['retired']} tokens, {k['hz']:,.1f} Hz x {k['tokens_per_cycle']:.2f} "
            f"tokens/cycle, {100 * k['of_bound']:.0f} % of the limit "
            f"(which varies by {100 * k['bound_spread']:.0f} %)"
        )
    return "; ".join(parts) or "no cycle ran"
