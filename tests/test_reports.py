"""Reports say what the clock counted: the same numbers as JSON and as text; traces that open."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from measured import batch, cycle, limits, steady, table
from rich.console import Console
from tiny import llama

from lmclock.clock import Clock
from lmclock.cycle import STAGES, Cycle, Run
from lmclock.machines import Ticks, Traits
from lmclock.passes import optimise
from lmclock.reports.stat import LEAF_TITLES, clock_time, percent, print_stat, si
from lmclock.reports.summary import one_line, summary, title
from lmclock.reports.trace import write_trace

PROGRAM = optimise(llama(), 2)
BODY = PROGRAM.section("step").instructions
TRAITS = Traits("native", 2, ("f32",), 1e9, "tsc")


def all_kinds() -> Clock:
    clock = Clock(PROGRAM, 2, 1e9, limits())
    for of, options in (
        (batch((0, 9)), {}),
        (batch((9, 1)), {}),
        (batch((10, 1)), {}),
        (batch((11, 1), (0, 4)), {"retired": 2}),
    ):
        clock.add(steady(of, len(BODY), 3000, **options))
    return clock


def printed(report: dict[str, Any], **options: Any) -> str:
    stream = io.StringIO()
    print_stat(report, Console(file=stream, soft_wrap=True, **options))
    return stream.getvalue()


def test_the_numbers_follow_from_the_account() -> None:
    clock = all_kinds()
    report = summary(clock, TRAITS)
    assert list(report["kinds"]) == ["decode", "mixed", "prefill"]
    tally, k = clock.kinds["decode"], report["kinds"]["decode"]
    seconds = 2 * (10 + 10 + len(BODY) * 3001 + 10) / 1e9
    assert k["seconds"] == pytest.approx(seconds)
    assert (k["cycles"], k["retired"], k["decode_rows"], k["prompt_tokens"]) == (2, 2, 2, 0)
    assert k["hz"] == pytest.approx(2 / seconds)
    assert k["hz"] * k["tokens_per_cycle"] == pytest.approx(k["tokens_per_second"])
    assert sum(k["tree"].values()) == pytest.approx(1)
    assert sum(k["stages"].values()) + k["run_seconds_per_cycle"] == pytest.approx(seconds / 2)
    assert k["of_bound"] == pytest.approx(2 * k["bound_seconds_per_cycle"] / seconds)
    moved = sum(table[:, 0].sum() for table in tally.traffic.values())
    assert k["bytes_per_second"] == pytest.approx(moved / seconds)
    entries = k["instructions"]
    assert sum(e["count"] for e in entries) == len(BODY)
    assert sum(e["bytes"] for e in entries) == pytest.approx(moved)
    spent = sum(e["seconds"] for e in entries)
    assert spent == pytest.approx(2 * len(BODY) * 3000e-9)
    assert [e["seconds"] for e in entries] == sorted((e["seconds"] for e in entries), reverse=True)
    json.dumps(report, allow_nan=False)


def test_an_instruction_faster_than_its_limit_shows_more_than_all_of_it() -> None:
    clock = Clock(PROGRAM, 2, 1e9, limits(near=1e9, far=1e9))
    clock.add(steady(batch((9, 1)), len(BODY), 1))
    k = summary(clock, TRAITS)["kinds"]["decode"]
    assert k["model_error"] > 0 and max(e["of_limit"] for e in k["instructions"]) > 1
    assert f"model error {percent(k['model_error'], 1)}" in printed(summary(clock, TRAITS))


def test_the_spread_is_that_of_the_figure_the_limit_hangs_on() -> None:
    memory, compute = Clock(PROGRAM, 2, 1e9, limits()), Clock(PROGRAM, 2, 1e9, limits(peak=1e6))
    for clock, side, spread in ((memory, "memory", None), (compute, "compute", 0.02)):
        clock.add(steady(batch((9, 1)), len(BODY), 3000))
        k = summary(clock, TRAITS)["kinds"]["decode"]
        footprint = clock.limits.spread_at(clock.kinds["decode"].cycle_bytes)
        assert (k["bound_side"], k["bound_spread"]) == (side, spread or footprint)
        assert 0.01 < footprint <= 0.04


def test_parts_of_a_mixed_cycle_make_its_limit() -> None:
    k = summary(all_kinds(), TRAITS)["kinds"]["mixed"]
    parts = k["parts"]
    assert (parts["decode"]["rows"], parts["prefill"]["rows"]) == (1, 4)
    both = sum(part["bound_seconds_per_cycle"] for part in parts.values())
    assert both == pytest.approx(k["bound_seconds_per_cycle"])
    text = printed(summary(all_kinds(), TRAITS))
    for name, part in parts.items():
        time = clock_time(part["bound_seconds_per_cycle"])
        assert re.search(rf"{time}  - {name} \((alone|rest)\)", text), name


def test_the_text_holds_the_numbers_of_the_json() -> None:
    report = summary(all_kinds(), TRAITS)
    text = printed(report)
    parts = re.split(r"\n\n (?:prefill|mixed|decode)\n", text)
    sections = dict(zip(["head", "prefill", "mixed", "decode"], parts, strict=True))
    assert sections["head"] == " tiny on native, 2 threads\n a processor"
    for kind, k in report["kinds"].items():
        said = sections[kind]
        for wanted in (
            rf"{k['cycles']}  cycles +# {re.escape(si(k['hz'], 'Hz'))}, "
            rf"{re.escape(clock_time(k['seconds'] / k['cycles']))} a cycle",
            rf"{k['retired']}  generated tokens +# {k['tokens_per_cycle']:.2f} a cycle, "
            rf"{k['tokens_per_second']:,.1f} tok/s",
            rf"moved at least +# {re.escape(si(k['bytes_per_cycle'], 'B'))} a cycle, "
            rf"{re.escape(si(k['bytes_per_second'], 'B/s'))}",
            rf"{re.escape(si(k['operations_per_second'], 'op/s'))}",
            rf"{re.escape(clock_time(k['bound_seconds_per_cycle']))}  limit of a cycle +# "
            rf"{percent(k['of_bound'], 1)} reached \({k['bound_side']} limit, varies by "
            rf"{percent(k['bound_spread'])}\)",
            rf"fetch {re.escape(clock_time(k['stages']['fetch']))}",
        ):
            assert re.search(wanted, said), f"{kind}: {wanted}\n{said}"
        for leaf, share in k["tree"].items():
            assert re.search(rf"{percent(share, 1)}  {re.escape(LEAF_TITLES[leaf])}", said), leaf
        for e in k["instructions"][:10]:
            line = next(x for x in said.splitlines() if f"%  {e['name']} " in x)
            assert line.split()[0] == f"{100 * e['share']:.1f}"
            assert f"{e['bytes_per_second'] / 1e9:.1f}" in line and e["bound"] in line
    assert "4  prompt tokens" in sections["mixed"] and "1  decode rows" in sections["mixed"]
    assert "decode rows" not in sections["decode"], "as many as generated tokens"


def test_it_fits_80_columns_and_is_plain_where_it_should_be() -> None:
    clock = all_kinds()
    wide = replace(PROGRAM, name="A model whose name goes on and on " * 2)
    clock.program = wide
    report = summary(clock, replace(TRAITS, threads=128))
    report["limits"]["processor"] = "AMD"
    body = printed(report, width=120).splitlines()[1:]  # after the model's name
    assert max(map(len, body)) <= 80
    assert "\x1b" not in printed(report) and "\x1b" not in printed(
        report, force_terminal=True, no_color=True, color_system=None
    )
    assert "\x1b[1m" in printed(report, force_terminal=True)


def test_a_limit_that_varies_much_is_said_to() -> None:
    clock = all_kinds()
    assert "side by side" not in printed(summary(clock, TRAITS))
    found = clock.limits
    shaky = tuple((size, replace(rate, spread=0.3)) for size, rate in found.bandwidth)
    clock.limits = replace(found, bandwidth=shaky)
    assert "above 5 %, compare runs side by side only" in printed(summary(clock, TRAITS))


def test_a_reply_in_one_line() -> None:
    line = one_line(all_kinds())
    for part in ("prefill 9 tokens", "mixed 2 tokens", "decode 2 tokens", "1.00 tokens/cycle",
                 "% of the limit (which varies by"):  # fmt: skip
        assert part in line
    assert one_line(Clock(PROGRAM, 2, 1e9, limits())) == "no cycle ran"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00 B"), (999, "999 B"), (1234, "1.23 kB"), (56.7e9, "56.7 GB"), (4e15, "4000 TB")],
)
def test_si(value: float, text: str) -> None:
    assert si(value, "B") == text


def test_times_in_the_unit_that_reads_best() -> None:
    assert [clock_time(t) for t in (2.5, 3e-3, 4.56e-6, 7e-9, 0.0)] == [
        "2.5 s", "3 ms", "4.56 us", "7 ns", "0 ns",
    ]  # fmt: skip


def test_titles_leave_layers_out() -> None:
    titles = {title(i) for i in BODY}
    assert {"qkv blk.*.attn_q", "attend kv[*]", "embed token_embd", "sample next"} <= titles
    assert not [t for t in titles if re.search(r"\d", t)]


# --- traces


def recorded(threads: int = 2, count: int = 5, seed: int = 0) -> list[Cycle]:
    """Cycles with random ticks, gaps and zero-length shares among them."""
    rng = np.random.default_rng(seed)
    cycles, now = [], 10**15
    for n in range(count):
        begin, shape = now, (len(BODY), threads)
        of = batch((n, 1)) if n else batch((0, 7))
        stamps = table(rng.integers(0, 50, shape), rng.integers(0, 4, shape), now + 33)
        end = int(stamps.max()) + 3
        run = Run("step", Ticks(now + 31, end, stamps))
        now = end + 20
        marks = (begin, begin + 10, begin + 30, end + 1, now)
        cycles.append(replace(cycle(of, run, stamps=marks), number=n))
        now += int(rng.integers(0, 5))
    return cycles


def traced(cycles: list[Cycle], rate: float = 2.1e9, **options: Any) -> str:
    stream = io.StringIO()
    traits = replace(TRAITS, tick_rate=rate)
    write_trace(cycles, PROGRAM, traits, stream, **options)
    return stream.getvalue()


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    return round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)


@pytest.mark.parametrize("rate", [1e9, 2.1e9, 2.6999e9, 24e6])
def test_events_are_whole_and_nest(rate: float) -> None:
    cycles = recorded()
    events = json.loads(traced(cycles, rate))
    assert all({"name", "ph", "pid", "tid", "ts"} <= event.keys() for event in events)
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in slices)
    kinds = {cat: [e for e in slices if e["cat"] == cat] for cat in
             ("cycle", "stage", "instruction")}  # fmt: skip
    assert len(kinds["cycle"]) == 5 and len(kinds["stage"]) == 5 * len(STAGES)
    ran = sum(int((c.runs[0].ticks.table[:, :, 1] > c.runs[0].ticks.table[:, :, 0]).sum())
              for c in cycles)  # fmt: skip
    assert len(kinds["instruction"]) == ran
    whole = [nanoseconds(e) for e in kinds["cycle"]]
    execute = [nanoseconds(e) for e in kinds["stage"] if e["name"] == "execute"]
    assert whole[0][0] == 0 and all(a[1] <= b[0] for a, b in pairwise(whole))
    for stage in kinds["stage"]:
        a, b = nanoseconds(stage)
        assert any(x <= a <= b <= y for x, y in whole), stage
    for thread in (1, 2):
        track = [nanoseconds(e) for e in kinds["instruction"] if e["tid"] == thread]
        assert track and all(x[1] <= y[0] for x, y in pairwise(track)), "no overlap"
        assert all(any(x <= a <= b <= y for x, y in execute) for a, b in track)


def test_counters_and_arguments() -> None:
    cycles = recorded()
    events = json.loads(traced(cycles))
    counters = {e["name"]: e["args"] for e in events if e["ph"] == "C" and e["ts"] == 0}
    assert counters["rows"] == {"prompt": 7, "decode": 0}
    args = next(e["args"] for e in events if e["name"].startswith("linear token_embd"))
    assert args["bytes"] > 100 * 64 and args["operations"] == 2 * 100 * 64
    assert args["assembly"].startswith("linear") and BODY[args["number"]].op == "linear"


def test_names_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    named = replace(PROGRAM, name='a "model"\n\\ é \ud800')
    stream = io.StringIO()
    write_trace(recorded(count=1), named, TRAITS, stream)
    assert stream.getvalue().isascii()
    first = json.loads(stream.getvalue())[0]
    assert first["args"]["name"] == 'engine: a "model"\n\\ é \ud800'


def test_a_trace_cut_short_still_opens() -> None:
    lines = traced(recorded(count=2)).splitlines()
    for keep in (2, 10, len(lines) // 2, len(lines) - 1):
        text = "\n".join(lines[:keep]).removesuffix(",")
        assert len(json.loads(text + "]")) == keep - 1, "an event per line"


def test_a_trace_is_kept_small_by_whole_cycles() -> None:
    cycles = recorded()
    stream = io.StringIO()
    whole = write_trace(cycles, PROGRAM, TRAITS, stream)
    assert whole.cycles == 5 and len(json.loads(stream.getvalue())) == whole.events
    stream = io.StringIO()
    written = write_trace(cycles, PROGRAM, TRAITS, stream, most=whole.events // 2)
    events = json.loads(stream.getvalue())
    assert written.cycles == sum(e.get("cat") == "cycle" for e in events) < 5
    assert written.events == len(events) <= whole.events // 2
