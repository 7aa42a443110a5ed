"""The verbs on tiny folders of every kind of decoder: run, stat, trace, disasm and diff."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from measured import limits
from parity import random_model
from tiny_decoders import CASES
from tiny_vocabularies import save_folder, trained

from lmclock import cli
from lmclock.assemble import assemble
from lmclock.hardware.calibrate import cache_file, save
from lmclock.listing import parse

KINDS = ("gpt2", "neox", "mixtral", "qwen2-moe", "gemma2", "gemma3")
Command = Callable[[str], str]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokeniser; Gemma's has enough layers for its pattern to repeat."""
    path = tmp_path_factory.mktemp(request.param) / request.param
    config, tokeniser = CASES[request.param](), trained("gpt-2")
    config.vocab_size = tokeniser.get_vocab_size()
    if config.model_type.startswith("gemma"):
        config.num_hidden_layers = 14
        kinds = ["sliding_attention"] * (5 if request.param == "gemma3" else 1)
        config.layer_types = ([*kinds, "full_attention"] * 14)[:14]
    random_model(config).save_pretrained(path)
    return save_folder(path, tokeniser, eos_token="<|end|>")


@pytest.fixture
def lmclock(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Command:
    """Runs a command line beside the folder within this process; limits are made up."""
    monkeypatch.chdir(folder.parent)
    save(limits(), cache_file(1))

    def command(line: str) -> str:
        capsys.readouterr()
        words = shlex.split(line.replace("MODEL", str(folder)))
        monkeypatch.setattr(sys, "argv", ["lmclock", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = capsys.readouterr()
        assert ended.value.code == 0, done.err
        return str(done.out)

    return command


def test_run(lmclock: Command) -> None:
    line = "run MODEL -p 'the quick' -n 6 --temp 0 --ignore-eos --json --machine"
    found = [json.loads(lmclock(f"{line} {machine}"))["tokens"] for machine in ("array", "native")]
    assert len(found[0]) == 6 and found[0] == found[1]


def test_stat_and_trace(lmclock: Command, folder: Path, tmp_path: Path) -> None:
    line = "stat MODEL --machine array -p 'the quick' -n 6 --ignore-eos"
    text = lmclock(line)
    kinds = json.loads(lmclock(f"{line} --json"))["kinds"]
    experts = assemble(folder).config.experts  # type: ignore[attr-defined]
    assert ("experts used of" in text) == ("experts" in kinds["decode"]) == (experts is not None)
    if experts:
        used = [layer["used"] for layer in kinds["decode"]["experts"]["layers"]]
        assert kinds["decode"]["experts"]["observed"]
        assert used == [experts.top] * sum(experts.sparse), "one row uses so many"
    file = tmp_path / "t.json"
    lmclock(f"trace MODEL --machine array -n 3 -o {file} --ignore-eos")
    names = {event["name"] for event in json.loads(file.read_text())}
    assert any(name.startswith("attend") for name in names)


def test_disasm_folds_what_repeats(lmclock: Command, folder: Path) -> None:
    text = lmclock("disasm MODEL")
    assert parse(text).family in ("llama", "gpt")
    if folder.name == "gemma3":
        assert ".repeat j = 0..6 step 6" in text and ".repeat i = {j}..{j+4}" in text
    if folder.name == "gemma2":
        assert ".repeat j = 0..12 step 2" in text
    assert lmclock("disasm MODEL --mermaid").startswith("flowchart")


def test_diff(lmclock: Command) -> None:
    said = lmclock("diff MODEL --a array --b native -p 'the quick' -n 2 --tolerance 1e-6")
    assert "no instruction diverges" in said
