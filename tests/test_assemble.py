"""From files to programs: the listing itself, the weights behind it, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmclock.assemble import assemble, title
from lmclock.assemble.weights import Rows, Stored, joined, same_bytes, whole
from lmclock.errors import FileError, LmclockError, OptionError, UnsupportedError
from lmclock.files import open_weights
from lmclock.listing import parse, render
from lmclock.passes import optimise

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 16, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}  # fmt: skip

LISTING = """\
program  llama "tiny" context=128
input    ids tok ids
weight   rope_freqs 1x2 f32 = 0.5 0.005
weight   token_embd 16x8 f32
.repeat i = 0..2
  weight   blk.{i}.attn_norm 1x8 f32
  weight   blk.{i}.attn_q 16x8 f32
  weight   blk.{i}.attn_k 8x8 f32
  weight   blk.{i}.attn_v 8x8 f32
  weight   blk.{i}.attn_q_norm 1x4 f32
  weight   blk.{i}.attn_k_norm 1x4 f32
  weight   blk.{i}.attn_output 8x16 f32
  weight   blk.{i}.ffn_norm 1x8 f32
  weight   blk.{i}.ffn_gate 12x8 f32
  weight   blk.{i}.ffn_up 12x8 f32
  weight   blk.{i}.ffn_down 8x12 f32
.end
weight   output_norm 1x8 f32
state    kv[3] paged heads=2 key=4 value=4 format=f16

section  step
embed    x.0, ids, token_embd
.repeat i = 0..2
  norm     h.{i}, x.{i}, blk.{i}.attn_norm     eps=1e-06
  linear   q.{i}, h.{i}, blk.{i}.attn_q
  linear   k.{i}, h.{i}, blk.{i}.attn_k
  linear   v.{i}, h.{i}, blk.{i}.attn_v
  norm     qn.{i}, q.{i}, blk.{i}.attn_q_norm  eps=1e-06 groups=4
  norm     kn.{i}, k.{i}, blk.{i}.attn_k_norm  eps=1e-06 groups=2
  rope     q'.{i}, qn.{i}                      heads=4 freqs=rope_freqs
  rope     k'.{i}, kn.{i}                      heads=2 freqs=rope_freqs
  store    kv[{i}], k'.{i}, v.{i}
  attend   a.{i}, q'.{i}, kv[{i}]              heads=4 kv_heads=2
  linear   o.{i}, a.{i}, blk.{i}.attn_output
  binary   x'.{i}, x.{i}, o.{i}
  norm     h'.{i}, x'.{i}, blk.{i}.ffn_norm    eps=1e-06
  linear   g.{i}, h'.{i}, blk.{i}.ffn_gate
  linear   u.{i}, h'.{i}, blk.{i}.ffn_up
  act      s.{i}, g.{i}
  binary   f.{i}, s.{i}, u.{i}                 kind=mul
  linear   d.{i}, f.{i}, blk.{i}.ffn_down
  binary   x.{i+1}, x'.{i}, d.{i}
.end
pick     last, x.3
norm     z, last, output_norm                  eps=1e-06
linear   logits, z, token_embd
sample   next, logits
"""


def tensors(config: dict[str, Any] = CONFIG) -> dict[str, np.ndarray]:
    """Random tensors of the configuration, under their Hugging Face names."""
    c, rng = config, np.random.default_rng(0)
    d, f, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q),
        "self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    names = {
        f"model.layers.{i}.{stem}.weight": shape
        for i in range(c["num_hidden_layers"])
        for stem, shape in shapes.items()
    } | {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in names.items()}


def folder(path: Path, changes: dict[str, Any] | None = None, **arrays: np.ndarray | None) -> Path:
    """A model folder called `tiny`; `changes` to its configuration, `arrays` by tensor name with
    underscores doubled for dots, None to leave one out.
    """
    path = path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | (changes or {})))
    named = {name.replace("__", "."): array for name, array in arrays.items()}
    kept = {name: array for name, array in (tensors() | named).items() if array is not None}
    save_file(kept, path / "model.safetensors")
    return path


def test_the_listing(tmp_path: Path) -> None:
    model = assemble(folder(tmp_path))
    assert render(model.program, comments=False) == LISTING
    assert parse(LISTING) == model.program == parse(render(model.program))
    assert model.notes == ()


def test_passes_find_what_they_look_for(tmp_path: Path) -> None:
    program = assemble(folder(tmp_path)).program
    ops = [i.op for i in optimise(program, 1).section("step").instructions]
    layer = ["qkv", "norm", "norm", "rope", "rope", "store", "attend", "linear", "glu", "linear"]
    assert ops == ["embed", *layer * 3, "pick", "linear", "sample"]


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path)
    model = assemble(path)
    want = tensors()
    assert set(model.weights) == {w.name for w in model.program.weights} - {"rope_freqs"}
    for declared in model.program.weights:
        if declared.values is None:
            view = model.weights[declared.name]
            assert (view.name, view.shape) == (declared.name, declared.shape)
            assert not view.data.flags.owndata and not view.data.flags.writeable
    model.reader.close()
    for name, stored in (("token_embd", "model.embed_tokens"),
                         ("blk.2.attn_k", "model.layers.2.self_attn.k_proj"),
                         ("output_norm", "model.norm")):  # fmt: skip
        array = want[f"{stored}.weight"]
        got = model.weights[name].unpack()
        np.testing.assert_array_equal(got, array.reshape(got.shape))


def test_an_open_reader_will_do(tmp_path: Path) -> None:
    with open_weights(folder(tmp_path)) as reader:
        model = assemble(reader, cache="f32")
    assert model.program.states[0].format == "f32" and model.reader is reader
    with pytest.raises(OptionError, match="cache='f8' is unknown; valid: f32, f16 or q8_0"):
        assemble(reader, cache="f8")


# --- tied output


EMBEDDING = tensors()["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("tied", "copy", "output"),
    [
        (True, None, "token_embd"),
        (True, EMBEDDING, "token_embd"),
        (True, EMBEDDING + 1, "output"),
        (False, EMBEDDING, "output"),
    ],
)
def test_output_matrix(tied: bool, copy: np.ndarray | None, output: str, tmp_path: Path) -> None:
    path = folder(tmp_path, {"tie_word_embeddings": tied}, lm_head__weight=copy)
    assert assemble(path).program.section("step").instructions[-2].weights == (output,)


def test_untied_output_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"lacks tensor lm_head\.weight"):
        assemble(folder(tmp_path, {"tie_word_embeddings": False}))


# --- files that do not fit


Q = "model__layers__1__self_attn__q_proj__weight"
BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {Q: None}, "the file lacks tensor model.layers.1.self_attn.q_proj.weight"),
    ({}, {Q: np.zeros((16, 9), np.float32)}, "q_proj.weight is 16 x 9, but the configuration"),
    ({}, {Q: np.zeros((), np.float32)}, "is a single number"),
    ({}, {Q: np.zeros((2, 8, 8), np.float32)}, "is 2 x 8 x 8, but"),
    ({}, {"model__norm__weight": np.ones(9, np.float32)}, "model.norm.weight is 9, but"),
    ({"vocab_size": 17}, {}, "embed_tokens.weight is 16 x 8, but the configuration makes it 17"),
    ({"num_hidden_layers": 4}, {}, "lacks tensor model.layers.3.input_layernorm.weight"),
    ({"num_hidden_layers": 2}, {}, "11 tensors of the file have no place in a qwen3 model"),
    ({"attention_bias": True}, {}, "lacks tensor model.layers.0.self_attn.q_proj.bias"),
    ({}, {"score__weight": np.ones((2, 8), np.float32)}, "no place in a qwen3 model of this"),
    ({"head_dim": 8}, {}, "q_proj.weight is 16 x 8, but the configuration makes it 32 x 8"),
    ({"model_type": "llama", "architectures": None}, {}, "6 tensors of the file have no place"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arrays", "message"), BAD)
def test_files_that_do_not_fit(
    changes: dict[str, Any], arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError) as caught:
        assemble(folder(tmp_path, changes, **arrays))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tables_that_follow_from_the_configuration_are_ignored(tmp_path: Path) -> None:
    inverse = {"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(2, np.float32)}
    notes = assemble(folder(tmp_path, **inverse)).notes
    assert notes == ("tensors ignored: model.layers.0.self_attn.rotary_emb.inv_freq",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing: safetensors alone"),
        ("", "is empty"),
        ("[]", "holds no JSON object"),
        ("{", "is not valid JSON"),
        ('{"model_type": NaN}', "NaN is no number"),
        ('{"vocab_size": 1, "vocab_size": 2}', "a key appears twice"),
        ("[" * 200_000, "is not valid JSON"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "is not valid JSON"),
        ('{"model_type": "\udcff"}', "is not valid JSON"),
        ('{"model_type": "qwen3", "auto_map": {}}', "remote code is never run"),
    ],
)
def test_broken_config_json(text: str | None, message: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LmclockError) as caught:
        assemble(path)
    assert message in str(caught.value)


def test_names(tmp_path: Path) -> None:
    assert title('a "b"; c\n\x1b[31m') == "a b c 31m"
    assert title("\n") == "model"
    cache = tmp_path / "models--org--small"
    (cache / "snapshots").mkdir(parents=True)
    path = folder(tmp_path).rename(cache / "snapshots" / "0123abcd")
    assert assemble(path).program.name == "org/small"


# --- views


def test_rows_and_joined_parts(tmp_path: Path) -> None:
    stored = open_weights(folder(tmp_path)).tensors
    q, k = (stored[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    both = joined("qk", [Rows(q, 4, 2), Rows(k, 0, 8)])
    assert both.shape == (10, 8)
    want = np.concatenate([q.unpack()[4:6], k.unpack()])
    np.testing.assert_array_equal(both.unpack(), want)
    norm = stored["model.norm.weight"]
    assert whole("n", norm).shape == (1, 8) and same_bytes(whole("a", norm), whole("b", norm))
    with pytest.raises(UnsupportedError, match=r"cannot be joined to qd: .*\(8, 'f32'\)"):
        joined("qd", [Rows(q, 0, 1), Rows(stored["model.layers.0.mlp.down_proj.weight"], 0, 1)])


def test_names_in_files() -> None:
    names = Stored({}, {"output": "lm_head", "blk.{i}.attn_q": "layers.{i}.q"})
    assert names.name_in_file("blk.12.attn_q.bias") == "layers.12.q.bias"
    assert names.name_in_file("output") == "lm_head.weight"
    assert names.name_in_file("rope_freqs") is None and not names.has("rope_freqs")
    assert Stored({}, None).name_in_file("blk.1.attn_q") == "blk.1.attn_q.weight"
