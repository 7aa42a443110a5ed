"""The real model from its package: what it is, and that it knows the capital of France."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers import Runner

from lmclock.assemble import Assembled, assemble
from lmclock.config import Rope
from lmclock.files import GGUF
from lmclock.listing import parse, render
from lmclock.text import from_gguf

MACHINES = ["array", "native"]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Assembled:
    return assemble(smollm2)


def test_what_it_is(model: Assembled) -> None:
    c = model.config
    assert (c.layers, c.width, c.heads, c.kv_heads, c.key) == (30, 576, 9, 3, 64)
    assert c.rope == Rope(64, 100000.0, "adjacent") and c.tied and c.eos == (2,)
    assert model.notes == () and model.program.context == 8192
    formats = [w.format for w in model.program.weights]
    assert (formats.count("q4_1"), formats.count("q8_0"), formats.count("f32")) == (210, 1, 61)
    text = render(model.program)
    assert parse(text) == model.program
    assert len(text.splitlines()) < 50, "thirty equal layers fold into one"


@pytest.mark.parametrize("machine", MACHINES)
def test_paris(model: Assembled, machine: str) -> None:
    pytest.importorskip(f"lmclock.machines.{machine}")
    tokeniser = from_gguf(model.reader.metadata)
    ids = list(tokeniser.encode("The capital of France is"))
    runner = Runner(model.program, model.weights, machine, pages=8)
    runner.cycle({"france": ids[:2]}, pick="none")
    work, said = ids[2:], []
    for _ in range(2):
        (token,) = runner.cycle({"france": work}, value="next")["france"][0].tolist()
        said.append(token)
        work = [token]
    assert tokeniser.decode(said).startswith(" Paris.")


def test_short_texts_get_the_ids_the_library_gives(smollm2: Path) -> None:
    """Texts up to the limit are merged straight from the file's list; README text and noise."""
    metadata = GGUF.open(smollm2).metadata
    short, library = from_gguf(metadata), from_gguf(metadata)
    assert len(library.encode("x" * 100)) > 0  # a long text: from here on the library encodes
    draw = random.Random(1)
    text = (Path(__file__).parent.parent / "README.zh-CN.md").read_text()
    for _ in range(60):
        at = draw.randrange(len(text) - 32)
        noise = "".join(chr(draw.choice((32, 97, 0x301, 0x1F600, 0xE9, 0xA0))) for _ in range(12))
        for part in (text[at : at + draw.randrange(1, 33)], noise):
            assert short.encode(part) == library.encode(part)
