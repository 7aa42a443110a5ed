"""Listings: every program prints as text that parses back to the same program."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmclock.errors import FileError, ProgramError
from lmclock.flowchart import mermaid
from lmclock.folding import fold, fold_twice, unfold
from lmclock.isa import ATTRS, OPCODES, Instruction, make
from lmclock.listing import parse, read, render
from lmclock.passes import optimise
from lmclock.program import Input, Program, Section, State, Weight
from tests.tiny import llama

VALUES = st.from_regex(r"[a-z]{1,3}(\.[0-9]{1,2})?(\.[a-z]{1,3})?", fullmatch=True)
WEIGHTS = st.from_regex(r"w[a-z]{0,3}\.[0-9]{1,2}\.[a-z]{1,4}", fullmatch=True)


@st.composite
def instructions(draw: st.DrawFn) -> Instruction:
    """Any instruction the table allows, sound or not."""
    row = OPCODES[draw(st.sampled_from(sorted(OPCODES)))]
    attrs = {}
    for name in draw(st.lists(st.sampled_from(row.attrs), unique=True)) if row.attrs else []:
        kind = ATTRS[name].kind
        attrs[name] = draw(
            {
                "int": st.integers(0, 10**6),
                "float": st.floats(0, 1e6, width=32).map(float),
                "enum": st.sampled_from(row.members(name) or ("",)),
                "value": VALUES,
                "weight": WEIGHTS,
            }[kind]
        )
    counts = [row.count(row.ins), row.count(row.weights)]
    ins, weights = (draw(st.integers(*c)) for c in counts)
    state = f"kv[{draw(st.integers(0, 3))}]" if row.state else None
    return make(
        row.name,
        tuple(f"{draw(VALUES)}.o{k}" for k in range(len(row.outs))),
        tuple(draw(VALUES) for _ in range(ins)),
        tuple(draw(WEIGHTS) for _ in range(weights)),
        state,
        **attrs,
    )


@given(st.lists(instructions(), max_size=12), st.integers(0, 4096))
def test_any_program_survives_the_round_trip(body: list[Instruction], context: int) -> None:
    names = dict.fromkeys(w for i in body for w in i.all_weights())
    program = Program(
        "test",
        "any name",
        (Input("ids", "tok"), Input("x", "src", 7, ids=False)),
        tuple(Weight(name, (3, 32), "q4_1") for name in names),
        (State("kv", 4, "paged", 2, 8, 8, format="f16"), State("h", 2, "fixed", width=6)),
        (Section("step", tuple(body)),),
        context,
    )
    assert parse(render(program, comments=False)) == program


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_models_fold_and_parse_back(layers: int, level: int) -> None:
    program = optimise(llama(layers=layers), level)
    text = render(program)
    assert parse(text) == program
    assert text.count(".repeat") == (2 if layers > 1 else 0), "one fold of weights, one of layers"
    # A listing grows with the kinds of layers, not with their number.
    assert layers == 1 or len(text.splitlines()) == len(
        render(optimise(llama(2), level)).splitlines()
    )


def test_layers_that_differ_are_not_folded() -> None:
    program = llama(layers=4, formats=("q4_1", "q4_1", "q8_0", "q4_1"))
    assert parse(render(program)) == program
    assert "0..1" in render(program)


@given(st.lists(st.sampled_from(["a.0", "a.1", "a.2", "b.0, a.1", "b.1, a.2", "c"]), max_size=30))
def test_folding_loses_nothing(lines: list[str]) -> None:
    for folded in (fold(lines), fold_twice(lines)):
        assert [line for _, line in unfold("\n".join(folded))] == lines


LINES = st.builds("{}.{} w={}".format, st.sampled_from("ab"), st.integers(0, 6), st.integers(0, 1))


@given(st.lists(LINES, max_size=4), st.integers(1, 4), st.integers(1, 4))
def test_folding_twice_loses_nothing(group: list[str], count: int, step: int) -> None:
    def later(line: str, k: int) -> str:
        return re.sub(r"\.(\d)", lambda m: f".{int(m[1]) + k * step}", line)

    lines = [later(line, k) for k in range(count) for line in group]
    folded = fold_twice(lines)
    assert [line for _, line in unfold("\n".join(folded))] == lines
    assert len(folded) <= len(lines) + 2


def test_layers_that_alternate_fold_into_their_period() -> None:
    """Five layers of one kind and one of another, four times, and two more."""
    kinds = [0 if i % 6 == 5 else 8 for i in range(26)]
    lines = [
        line
        for i, window in enumerate(kinds)
        for line in (f"norm h.{i}, x.{i}", f"attend x.{i + 1}, h.{i}, kv[{i}]   window={window}")
    ]
    assert fold_twice(lines) == [
        ".repeat j = 0..18 step 6",
        "  .repeat i = {j}..{j+4}",
        "    norm h.{i}, x.{i}",
        "    attend x.{i+1}, h.{i}, kv[{i}]   window=8",
        "  .end",
        "  norm h.{j+5}, x.{j+5}",
        "  attend x.{j+6}, h.{j+5}, kv[{j+5}]   window=0",
        ".end",
        ".repeat i = 24..25",
        "  norm h.{i}, x.{i}",
        "  attend x.{i+1}, h.{i}, kv[{i}]   window=8",
        ".end",
    ]
    two = [line for i in range(6) for line in (f"norm a.{i} w={i % 2}", f"act b.{i}")]
    assert fold_twice(two)[0] == ".repeat j = 0..4 step 2" and len(fold_twice(two)) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("section step\nfoo y, x", "unknown opcode or declaration 'foo'; valid: program"),
        ("section nowhere", "'nowhere' must be encode, step or train"),
        ("norm y, x", "norm stands before the first section"),
        ("section step\nnorm y, x kind=max", "kind='max' is unknown; valid: rms or layer"),
        ("section step\nnorm y, x speed=3", "norm has no attribute 'speed'; valid: kind, eps"),
        ("section step\nnorm y, x eps=small", "eps='small' is not a number"),
        ("section step\nnorm y, x eps=1 eps=1", "eps= is given twice"),
        ("section step\nnorm y, 3", "'3' is not a name"),
        ("weight w 3 f32", "expected `weight NAME ROWSxWIDTH FORMAT"),
        ("weight w 1x2 f32 = 1.0", "1 values do not fill 1x2"),
        ("weight w 1x2 f32\nweight w 1x2 f32", "w is declared twice"),
        ("state kv[2] liquid", "kinds: paged, fixed or frozen"),
        ("state kv[2] paged rows=3", "state has no rows=; valid: heads"),
        ("input ids up ids", "spaces: tok, src, pick or seq"),
        ("program llama", 'expected `program FAMILY "NAME"'),
        (".repeat i = 0..2\nnorm y, x", "a .repeat has no .end"),
        (".end", "line 1: .end without .repeat"),
        ("section step\n.repeat i = 0..999999\nnorm y, x\nnorm z, y\n.end", "unfolds to over"),
        (".repeat i = 0..1\n.repeat i = 0..1\n.end\n.end", "a block of the same letter"),
        (".repeat j = 0..4 step 0\n.end", "line 1: not `.repeat i = A..B`"),
        (
            ".repeat i = 0..999\n.repeat j = 0..999\n.repeat i = 0..1\n.end\n.end\n.end",
            "same letter",
        ),
        (".repeat i = 0..9999\n.repeat j = 0..9999\n.end\n.end", "unfolds to over"),
        ("", "the listing has no `program"),
    ],
)
def test_a_bad_listing_gets_one_clear_sentence(text: str, message: str) -> None:
    with pytest.raises(ProgramError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_listing_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(FileError, match="cannot read listing"):
        read(str(tmp_path / "missing.lmc"))
    (tmp_path / "binary.lmc").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot read listing"):
        read(str(tmp_path / "binary.lmc"))


def test_the_flowchart_folds_layers() -> None:
    few, many = (mermaid(llama(layers=n)) for n in (2, 30))
    assert len(few.splitlines()) == len(many.splitlines())
    assert "layers 0 to 29 (30 times)" in many
    assert many.startswith("flowchart TD")
    assert "next layer" in many
