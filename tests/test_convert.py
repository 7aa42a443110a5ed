"""`lmclock convert` against transformers' own safetensors, and against pickles that mean harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from lmclock import cli
from lmclock.assemble import assemble
from lmclock.errors import FileError, LmclockError, UnsupportedError
from lmclock.files import convert as module
from lmclock.files import open_weights
from lmclock.files.convert import convert

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip


def model(kind: str) -> Any:
    t5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
        "tied": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
    }  # fmt: skip
    return made[kind]()


def legacy(folder: Path, of: Any, shards: int = 1) -> Path:
    """A folder as transformers wrote it before safetensors."""
    of.config.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "tf_model.h5").write_bytes(b"old")
    state = of.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" for n in range(shards)]
    places = {name: names[n % shards] for n, name in enumerate(state)}
    for at in names:
        torch.save({n: t for n, t in state.items() if places[n] == at}, folder / at)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["llama", "tied", "bert", "gpt2", "t5"])
def test_the_tensors_are_those_transformers_would_save(kind: str, tmp_path: Path) -> None:
    of = model(kind).to(torch.bfloat16 if kind == "llama" else torch.float32)
    of.save_pretrained(tmp_path / "theirs")
    want = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "old").mkdir()
    done = convert(legacy(tmp_path / "old", of), tmp_path / "new")
    got = load_file(tmp_path / "new" / "model.safetensors")
    assert got.keys() == want.keys() and done.tensors == len(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(got[name].dtype == want[name].dtype for name in want)
    kept = {p.name for p in (tmp_path / "old").iterdir()} - {"pytorch_model.bin", "tf_model.h5"}
    assert {p.name for p in (tmp_path / "new").iterdir()} == {*kept, "model.safetensors"}
    assert (tmp_path / "new" / "1_Pooling" / "config.json").exists()


def test_shards_and_the_command(tmp_path: Path) -> None:
    of = model("llama")
    (tmp_path / "old").mkdir()
    legacy(tmp_path / "old", of, shards=3)
    with pytest.raises(FileError, match=r"pytorch_model-00001-of-00003.bin .* `lmclock convert"):
        open_weights(tmp_path / "old")
    command = CliRunner()
    done = command.invoke(cli.group, ["convert", str(tmp_path / "old")])
    assert done.exit_code == 0 and "old-safetensors: 6 files, 21 tensors" in done.output
    made = assemble(tmp_path / "old-safetensors")
    q = made.weights["blk.1.attn_q"].unpack()
    np.testing.assert_array_equal(q, of.model.layers[1].self_attn.q_proj.weight.detach().numpy())
    again = command.invoke(cli.group, ["convert", str(tmp_path / "old")])
    assert "old-safetensors exists; valid: the name of a folder" in str(again.exception)


def test_checkpoints_with_more_than_weights(tmp_path: Path) -> None:
    """Weights within, shared memory that is no tie, transposed and empty tensors, all types."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base, "b": base[1:], "c": base, "t": base.T, "none": torch.empty(0, 5),
        "scalar": torch.tensor(3), "half": base.half(), "flags": base > 3, "double": base.double(),
    }  # fmt: skip
    torch.save({"epoch": 3, "state_dict": {**state, "step": 7}}, tmp_path / "x.pt")
    (tmp_path / "config.json").write_text("{}")
    done = convert(tmp_path / "x.pt", tmp_path.parent / f"{tmp_path.name}-new")
    got = load_file(done.folder / "model.safetensors")
    assert got.keys() == state.keys() and done.notes == ("not tensors, left out: step",)
    assert all(torch.equal(got[name], state[name]) for name in state)
    assert all(got[name].dtype == state[name].dtype for name in state)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def zipped(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")


def test_hostile_pickles_are_refused_with_one_sentence(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = pickle.dumps({"w": Evil(mark)}, protocol=2)
    whole = io.BytesIO()
    torch.save({"w": torch.ones(4, 4)}, whole)
    big = pickle.dumps({"w": torch.ones(2)}, protocol=2)
    cases: dict[str, Any] = {
        "code": lambda p: zipped(p, code),
        "code, old format": lambda p: p.write_bytes(code),
        "cut": lambda p: p.write_bytes(whole.getvalue()[:300]),
        "noise": lambda p: p.write_bytes(bytes(range(256)) * 8),
        "text": lambda p: p.write_text("hello"),
        "empty": lambda p: p.write_bytes(b""),
        "a list": lambda p: torch.save([torch.ones(2)], p),
        "no tensors": lambda p: torch.save({"a": 1}, p),
        "a name with a space": lambda p: torch.save({"a b": torch.ones(2)}, p),
        "a name that is none": lambda p: torch.save({3: torch.ones(2)}, p),
        "complex": lambda p: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, p),
        "sparse": lambda p: torch.save({"a": torch.ones(2, 2).to_sparse()}, p),
        "a zip without storages": lambda p: zipped(p, big),
        "a module": lambda p: torch.save(torch.nn.Linear(2, 2), p),
    }
    for name, write in cases.items():
        source = tmp_path / name.replace(" ", "_")
        source.mkdir()
        write(source / "pytorch_model.bin")
        with pytest.raises(LmclockError) as caught:
            convert(source, tmp_path / "out")
        message = str(caught.value)
        assert "pytorch_model.bin" in message and "\n" not in message and len(message) < 500, name
        assert not mark.exists() and not (tmp_path / "out").exists(), name
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_an_index_may_name(tmp_path: Path) -> None:
    for shard in ("../x.bin", "/etc/passwd", "x.safetensors", "missing.bin"):
        index = {"weight_map": {"w": shard}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(FileError, match=r"index\.json (puts|names)"):
            convert(tmp_path, tmp_path / "out")


def test_a_link_that_leads_elsewhere_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    source = tmp_path / "old"
    source.mkdir()
    torch.save({"w": torch.ones(2)}, source / "pytorch_model.bin")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "more").symlink_to(tmp_path)
    convert(source, tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lmclock\[torch\]'"):
        module.convert(tmp_path, tmp_path / "out")
    with pytest.raises(FileError, match=r"holds no pytorch_model\.bin"):
        (tmp_path / "empty").mkdir()
        module.convert(tmp_path / "empty", tmp_path / "out")
