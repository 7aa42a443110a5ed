"""The verifier: each rule has a program that breaks it, and the message says where."""

from __future__ import annotations

import pytest

from lmclock.errors import ProgramError
from lmclock.listing import parse, render
from lmclock.passes import LEVELS, optimise
from lmclock.verify import verify
from tests.tiny import llama

HEAD = """program t "t"
input ids tok ids
input x tok f32 width=64
weight e 10x64 f32
weight w 32x64 f32
weight n 1x64 f32
state kv[1] paged heads=2 key=16 value=16 format=f32
state h[1] fixed width=10
section step
"""


def test_a_sound_program_passes_at_every_level() -> None:
    for level in LEVELS:
        verify(optimise(llama(), level))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("norm y, z, n", "an operand is read before it is defined"),
        ("norm y, x, n\nnorm y, x, n", "a value is defined twice"),
        ("norm w, x, n", "a result has the name of a weight"),
        ("linear y, x, n2", "the number of operands"),
        ("linear y, x, w bias=b", "a weight is not declared"),
        ("linear y, x, w bias=n", "a bias has not as many elements"),
        ("linear y, x, w add=x", "add= differs from the result in rows or width"),
        ("linear y, x, w norm=w", "norm= has not as many elements"),
        (
            "embed a, ids, e\nlinear y, a, w\nlinear z, y, w",
            "weight w takes rows of width 64, not 32",
        ),
        ("norm y, x, w", "norm weight has 2048 elements, the row part 64"),
        ("norm y, x, n groups=3", "width 64 is not a multiple of groups=3"),
        ("embed y, x, e", "ids"),
        ("norm y, ids, n", "ids stand where numbers are meant"),
        ("attend y, x, kv[0] heads=4 kv_heads=2", "the state is read before any store"),
        ("store kv[1], x, x", "unknown state 'kv[1]'; valid: kv[0..0]"),
        ("store kv[0], x, x", "state kv[0] holds k rows of width 32, not 64"),
        ("store h[0], x, x", "this kind of state does not go with the opcode"),
        ("rope y, x heads=3", "width 64 is not a multiple of heads=3"),
        ("rope y, x heads=4 dims=15", "dims=15 must be even and at most the head width 16"),
        (
            "linear k, x, w\nstore kv[0], k, k\nattend y, x, kv[0] heads=3",
            "not a multiple of heads=3",
        ),
        ("linear k, x, w\nstore kv[0], k, k\nattend y, x, kv[0] heads=4", "has 2 heads, not 4"),
        ("linear k, x, w\nbinary y, x, k", "operands differ"),
        ("pick p, x\nbinary y, x, p", "operands differ"),
        ("route p, i, x, w experts=32 top=33", "top=33 must be 1 to experts=32"),
    ],
)
def test_each_rule_names_the_instruction(body: str, message: str) -> None:
    with pytest.raises(ProgramError) as error:
        verify(parse(HEAD + body))
    text = str(error.value)
    assert message in text
    assert text.startswith(f"step {len(body.splitlines()) - 1}: {body.splitlines()[-1].split()[0]}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('program t "t"', "has no section"),
        ('program t "t"\nweight w 2x31 q8_0\nsection step', "not a multiple of the format's block"),
        ('program t "t"\nweight w 2x32 q9_9\nsection step', "'q9_9' is not supported; valid: f32"),
        ('program t "t"\nweight w 0x32 f32\nsection step', "rows and width must be positive"),
        ('program t "t"\nstate s[1] fixed\nsection step', "a fixed state needs width="),
        ('program t "t"\nstate s[1] paged heads=2\nsection step', "needs heads=, key= and value="),
        ('program t "t"\nstate s[0] fixed width=2\nsection step', "the count must be positive"),
        ('program t "t"\nstate s[1] fixed width=2 format=q4_0\nsection step', "f32, f16 or q8_0"),
        (
            'program t "t"\nstate s[1] paged heads=1 key=16 value=16 format=q8_0\nsection step',
            "multiples of 32",
        ),
        ('program t "t"\ninput w tok ids\nweight w 1x1 f32\nsection step', "w is declared twice"),
    ],
)
def test_declarations_are_checked(text: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message.replace("[", r"\[").replace("(", r"\(")):
        verify(parse(text))


def test_a_listing_edited_by_hand_is_caught() -> None:
    text = render(llama(layers=2)).replace("y.{i}, blk.{i}.ffn_norm", "z.{i}, blk.{i}.ffn_norm")
    with pytest.raises(ProgramError, match=r"step 11: norm .*read before it is defined"):
        verify(parse(text))
