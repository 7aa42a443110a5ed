"""The clock's numbers as plain dicts: what `--json` prints and what every text report reads.

All times are seconds, all rates per second, all shares fractions of one.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lmclock.clock import LEAVES, Clock, Tally
from lmclock.cycle import STAGES
from lmclock.isa import Instruction
from lmclock.machines import Traits

_LAYER = re.compile(r"(?<=[A-Za-z_]\.)\d+(?!\w)|(?<=\[)\d+(?=\])")


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
            "when": limits.when,
            "spread": limits.spread,
            "peaks": {kind: peak.best for kind, peak in limits.peaks.items()},
        },
        "kinds": {kind: _kind(clock, tally) for kind, tally in sorted(clock.kinds.items())},
    }


def _kind(clock: Clock, tally: Tally) -> dict[str, Any]:
    seconds = tally.ticks / clock.rate
    account = tally.account
    whole = account.total / (clock.rate * account.threads)
    cycles = max(tally.cycles, 1)
    moved, done = np.sum([t.sum(axis=0) for t in tally.traffic.values()], axis=0)
    bound = account.bound / (clock.rate * account.threads)
    share = {leaf: ticks / max(account.total, 1) for leaf, ticks in account.tree().items()}
    rows = tally.prompt_tokens + tally.decode_rows
    return {
        "cycles": tally.cycles,
        "seconds": seconds,
        "hz": tally.cycles / seconds if seconds else 0.0,
        "prompt_tokens": tally.prompt_tokens,
        "decode_rows": tally.decode_rows,
        "retired": tally.retired,
        "rows_per_cycle": rows / cycles,
        "tokens_per_cycle": tally.retired / cycles,
        "rows_per_second": rows / seconds if seconds else 0.0,
        "bytes_per_cycle": float(moved) / cycles,
        "operations_per_cycle": float(done) / cycles,
        "bytes_per_second": float(moved) / seconds if seconds else 0.0,
        "operations_per_second": float(done) / seconds if seconds else 0.0,
        "bound_seconds_per_cycle": bound / cycles,
        "of_bound": bound / seconds if seconds else 0.0,
        "stages": {
            stage: account.stages[stage] / max(account.total, 1) * whole / cycles
            for stage in STAGES
        },
        "run_seconds_per_cycle": (account.total - sum(account.stages.values()))
        / (clock.rate * account.threads)
        / cycles,
        "tree": {leaf: share[leaf] for leaf in LEAVES},
        "model_error": account.model_error / max(account.total, 1),
        "instructions": _instructions(clock, tally),
    }


def _instructions(clock: Clock, tally: Tally) -> list[dict[str, Any]]:
    """One entry per instruction of the folded program (layers summed), the most time first."""
    groups: dict[str, dict[str, Any]] = {}
    account = tally.account
    per_second = clock.rate * account.threads
    for section, busy in account.busy.items():
        body = clock.program.section(section).instructions
        for k, i in enumerate(body[: len(busy)]):
            name = title(i)
            if len(account.busy) > 1:
                name = f"{section}: {name}"
            entry = groups.setdefault(
                name,
                {"name": name, "op": i.op, "count": 0, "seconds": 0.0, "limit_seconds": 0.0,
                 "bytes": 0.0, "operations": 0.0, "memory_seconds": 0.0},
            )  # fmt: skip
            entry["count"] += 1
            entry["seconds"] += float(busy[k]) / per_second
            entry["limit_seconds"] += float(account.ideal[section][k]) / per_second
            entry["memory_seconds"] += float(account.memory_bound[section][k]) / per_second
            entry["bytes"] += float(tally.traffic[section][k, 0])
            entry["operations"] += float(tally.traffic[section][k, 1])
    total = account.total / per_second
    found = sorted(groups.values(), key=lambda e: -e["seconds"])
    for entry in found:
        seconds = entry["seconds"]
        entry["share"] = seconds / total if total else 0.0
        entry["bytes_per_second"] = entry["bytes"] / seconds if seconds else 0.0
        entry["operations_per_second"] = entry["operations"] / seconds if seconds else 0.0
        entry["of_limit"] = entry["limit_seconds"] / seconds if seconds else 0.0
        memory = entry.pop("memory_seconds")
        entry["bound"] = "memory" if 2 * memory >= entry["limit_seconds"] else "compute"
    return found


def title(i: Instruction) -> str:
    """An instruction without its layer number: `glu blk.*.ffn_gate`, `attend kv[*]`."""
    subject = i.weights[0] if i.weights else i.state or (i.outs[0] if i.outs else "")
    return f"{i.op} {_LAYER.sub('*', subject)}"


def one_line(clock: Clock) -> str:
    """A reply's clock in one line: Hz, tokens per cycle, share of the limit."""
    parts = []
    for kind in ("prefill", "mixed", "decode"):
        tally = clock.kinds.get(kind)
        if not tally:
            continue
        k = _kind(clock, tally)
        if kind == "prefill":
            parts.append(f"prefill {k['prompt_tokens']} tokens, {k['rows_per_second']:,.0f} tok/s")
            continue
        parts.append(
            f"{kind} {k['retired']} tokens, {k['hz']:,.1f} Hz x {k['tokens_per_cycle']:.2f} "
            f"tokens/cycle, {100 * k['of_bound']:.0f} % of the limit"
        )
    return "; ".join(parts) or "no cycle ran"
