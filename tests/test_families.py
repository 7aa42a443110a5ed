"""Every model type, one tiny checkpoint each: it loads, runs, is accounted for to the tick, traced,
printed and drawn, and two machines agree on it. A configuration that is changed at random is a
sound program or one clear sentence.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured import limits
from rich.console import Console
from tiny_families import FIXTURES, write

import lmclock
from lmclock.assemble import Assembled, assemble
from lmclock.cli.bench import need_replies
from lmclock.clock import Clock
from lmclock.config import HF_TYPES, from_hf
from lmclock.cycle import Cycle
from lmclock.debug.diff import diff
from lmclock.errors import LmclockError, UnsupportedError
from lmclock.flowchart import mermaid
from lmclock.listing import parse, render
from lmclock.machines import create
from lmclock.model import Model
from lmclock.passes import optimise
from lmclock.probe import probe, work_of
from lmclock.reports.stat import print_stat
from lmclock.reports.summary import summary
from lmclock.reports.trace import write_trace
from lmclock.verify import verify

IDS = [3, 1, 4, 1, 5, 9, 2]
of_every_type = pytest.mark.parametrize("model_type", FIXTURES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each type, written when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = write(name, root / name)
            return self[name]

    return Folders()


def test_every_type_has_a_checkpoint() -> None:
    assert set(FIXTURES) == set(HF_TYPES)


def prompt(made: Assembled) -> list[int] | None:
    """Ids for programs that read tokens; None stands for random numbers."""
    return None if any(not i.ids for i in made.program.inputs) else IDS


def ran(model: Model) -> tuple[Cycle, ...]:
    ids = prompt(model.assembled)
    return probe(model, ids, max_new_tokens=4, ignore_eos=True, temperature=0)


def nested(events: list[dict[str, Any]]) -> None:
    """Slices of one track lie beside or within each other."""
    tracks: dict[Any, list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            begin, end = (round(1000 * x) for x in (event["ts"], event["ts"] + event["dur"]))
            tracks.setdefault((event["pid"], event["tid"]), []).append((begin, -end))
    assert len(tracks) >= 2
    for track in tracks.values():
        open_ends: list[int] = []
        for begin, minus_end in sorted(track):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or -minus_end <= open_ends[-1]
            open_ends.append(-minus_end)


@of_every_type
def test_it_runs_and_every_tick_is_accounted_for(model_type: str, folders: dict[str, Path]) -> None:
    with lmclock.load(str(folders[model_type]), threads=2, context=0) as model:
        facts, cycles = model.engine.facts, ran(model)
        clock = Clock(model.program, 2, model.machine.traits.tick_rate, limits())
        for cycle in cycles:
            clock.add(cycle)
        for tally in clock.kinds.values():
            tally.account.check()
        goes_on = facts.next is not None and facts.carries
        kinds = ["encode"] if facts.encodes or facts.main == "encode" else []
        kinds += ["prefill"] if facts.main == "step" else []
        assert list(clock.kinds) == ([*kinds, "decode"] if goes_on else kinds)
        assert len(cycles) == facts.encodes + (4 if goes_on else 1)
        sections = [[run.section for run in c.runs] for c in cycles]
        assert sections[0] == ["encode" if facts.encodes else facts.main]
        assert all(s == ["step"] for s in sections[1:])
        report = summary(clock, model.machine.traits)
        for kind in report["kinds"].values():
            assert abs(sum(kind["tree"].values()) - 1) < 1e-9 and kind["bytes_per_cycle"] > 0
        text = io.StringIO()
        print_stat(report, Console(file=text, width=100), 5)
        assert all(kind in text.getvalue() for kind in clock.kinds)
        out = io.StringIO()
        write_trace(cycles, model.program, model.machine.traits, out)
        nested(json.loads(out.getvalue()))


@of_every_type
def test_bench_times_it_or_says_what_there_is(model_type: str, folders: dict[str, Path]) -> None:
    with lmclock.load(str(folders[model_type]), threads=1, context=0) as model:
        facts = model.engine.facts
        if facts.next is not None and not facts.encodes:
            return need_replies(model, "x")
        with pytest.raises(UnsupportedError, match=r"valid: \w.*, and `lmclock stat x`"):
            need_replies(model, "x")


@of_every_type
def test_it_is_printed_and_drawn(model_type: str, folders: dict[str, Path]) -> None:
    made = assemble(folders[model_type])
    for level in (0, 1, 2):
        program = optimise(made.program, level)
        for comments in (False, True):
            assert parse(render(program, comments=comments)) == program
        chart = mermaid(program)
        assert chart.startswith("flowchart") and all(s.name in chart for s in program.sections)


@of_every_type
def test_two_machines_agree(model_type: str, folders: dict[str, Path]) -> None:
    made = assemble(folders[model_type])
    program = optimise(made.program, 1)
    work = work_of(made, prompt(made))
    native = create("native", threads=1)
    found = diff(program, made.weights, create("array"), native, work.ids, 2,
                 source=work.source, inputs=work.inputs)  # fmt: skip
    native.close()
    body = [i for s in program.sections for i in s.instructions]
    assert {d.value for d in found} == {o for i in body for o in i.outs}
    assert max(d.nmse for d in found) < 1e-7


# --- configurations nobody has seen

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(-(2**70), 2**70),
    st.floats(-10, 10), st.sampled_from([1e300, float("inf"), float("nan")]), st.text(max_size=8),
    st.lists(st.integers(-1, 5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)  # fmt: skip
STRANGE = ("attn_bias_scale", "num_experts", "hidden_act", "tie_word_embeddings", "author",
           "rope_scaling", "layer_types", "sliding_window", "id2label", "module_names")  # fmt: skip


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@of_every_type
def test_an_unknown_field_is_an_error_or_a_note(model_type: str, folders: dict[str, Path]) -> None:
    data = config_of(folders[model_type])
    with pytest.raises(UnsupportedError, match=r"zz_attention_factor=3\.5 may change the arithm"):
        from_hf(data | {"zz_attention_factor": 3.5})
    notes = from_hf(data | {"zz_author": "somebody"}).notes
    assert sum(note.count("zz_author") for note in notes) == 1


@of_every_type
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(draw=st.data())
def test_any_configuration_is_sound_or_one_sentence(
    model_type: str, folders: dict[str, Path], draw: st.DataObject
) -> None:
    folder = folders[model_type]
    data = config_of(folder)
    keys = draw.draw(st.lists(st.sampled_from([*data, *STRANGE]), min_size=1, max_size=2))
    changed = data | {key: draw.draw(VALUES) for key in keys}
    try:
        config = from_hf(changed, "changed")
        made = assemble(folder, change=lambda _: config)
        verify(optimise(made.program, 2))
    except LmclockError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
