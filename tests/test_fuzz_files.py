"""The long-running fuzzer of `make fuzz`: its seeds are sound, and it would notice a defect."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

import lmclock.files
from lmclock.errors import FileError
from lmclock.files import GGUF, Safetensors, open_weights
from tools import fuzz_files


def test_seeds_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "x"
    kinds = []
    for raw in fuzz_files.seeds():
        path.write_bytes(raw)
        try:
            with open_weights(path) as weights:
                kinds.append(type(weights))
                for tensor in weights.tensors.values():
                    if tensor.format.name != "i64":
                        tensor.unpack()
        except FileError as error:
            assert "valid: a plain file name" in str(error)  # the index, whose shards are not there
    assert kinds == [GGUF, Safetensors]


def test_random_changes_find_nothing(tmp_path: Path) -> None:
    for raw in itertools.islice(fuzz_files.mutations(random.Random(0)), 300):
        fuzz_files.check(raw, tmp_path)


def test_a_defect_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise IndexError

    def impolite(path: Path) -> None:
        raise FileError("\x1b[2J")

    for wrong, raised in ((broken, IndexError), (impolite, AssertionError)):
        monkeypatch.setattr(lmclock.files, "open_weights", wrong)
        with pytest.raises(raised):
            fuzz_files.check(b"", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(fuzz_files, "SLOW", 0.0)
    with pytest.raises(AssertionError, match="4 bytes took"):
        fuzz_files.check(b"GGUF", tmp_path)
