"""Tiny random checkpoints of every family against transformers in fp32: prefill and cached decode,
from Hugging Face folders and from the same weights as GGUF.

Weights are drawn such that logits are near one, so that 1e-4 means something; two controls at the
end show that a wrong pair order and a forgotten scaling are far outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from parity import TOLERANCE, assert_parity, prefilled, random_model, reference
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lmclock.assemble import assemble
from lmclock.errors import FileError

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500.0}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "rope_theta": 500.0}  # fmt: skip
SHARP = YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
MSCALE = YARN | {"mscale": 1.4, "mscale_all_dim": 0.7}


def _case(kind: type, kv_heads: int, rope: dict[str, Any] | None = None, **options: Any) -> Any:
    return kind(**SMALL | {"num_key_value_heads": kv_heads, "rope_parameters": rope} | options)


CASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _case(LlamaConfig, 4),
    "llama-tied-llama3": lambda: _case(LlamaConfig, 2, LLAMA3, tie_word_embeddings=True),
    "llama-biases-linear": lambda: _case(
        LlamaConfig, 1, LINEAR, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3
    ),
    "llama-wide-heads-yarn": lambda: _case(LlamaConfig, 2, YARN, head_dim=24),
    "llama-yarn-sharp": lambda: _case(LlamaConfig, 2, SHARP, hidden_act="gelu"),
    "llama-yarn-mscale": lambda: _case(LlamaConfig, 2, MSCALE, hidden_act="gelu_pytorch_tanh"),
    "mistral-window": lambda: _case(MistralConfig, 2, sliding_window=5, head_dim=8),
    "mistral-open": lambda: _case(MistralConfig, 4, sliding_window=None),
    "qwen2-tied": lambda: _case(Qwen2Config, 2, tie_word_embeddings=True),
    "qwen2-windows-yarn": lambda: _case(
        Qwen2Config, 1, YARN, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: _case(Qwen3Config, 2, head_dim=32, tie_word_embeddings=True),
    "qwen3-biases-layers": lambda: _case(
        Qwen3Config, 1, head_dim=8, attention_bias=True, use_sliding_window=True,
        sliding_window=3, layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip

MACHINES = ["array", "native"]


# --- Hugging Face folders


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", CASES)
def test_folder(case: str, machine: str, tmp_path: Path) -> None:
    pytest.importorskip(f"lmclock.machines.{machine}")
    model = random_model(CASES[case]())
    model.save_pretrained(tmp_path)
    assert_parity(assemble(tmp_path, cache="f32"), reference(model), machine)


def test_shards_of_bfloat16(tmp_path: Path) -> None:
    model = random_model(CASES["qwen3"]()).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = assemble(tmp_path, cache="f32")
    assert {w.format for w in ours.program.weights} == {"bf16"}
    # Loaded anew: model.float() would keep rotary frequencies that bfloat16 has rounded.
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_parity(ours, reference(again))


# --- GGUF files


STEMS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{STEMS[rest]}.{ending}"
    return f"{STEMS[stem]}.{ending}"


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in llama's GGUF order: dimension j beside dimension j + half."""
    halves = w.reshape(heads, 2, -1, *w.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w.shape)


def write_gguf(path: Path, model: Any, quant: str = "f32", **metadata: Any) -> None:
    """The model as GGUF; with a quantised format, `model` gets the weights as they are stored."""
    c, arch = (
        model.config,
        {"mistral": "llama"}.get(model.config.model_type, model.config.model_type),
    )
    writer = gguf.GGUFWriter(path, arch)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_name("tiny")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(metadata.pop("rotary", head))
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    _write_scaling(writer, model, head)
    if window := getattr(c, "sliding_window", None):
        writer.add_sliding_window(window)
        if kinds := getattr(c, "layer_types", None):
            pattern = [kind == "sliding_attention" for kind in kinds]
            writer.add_array(f"{arch}.attention.sliding_window_pattern", pattern)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        _write_tensor(writer, model, name, weight, quant if weight.ndim == 2 else "f32", arch)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):  # fmt: skip
        write()


def _write_scaling(writer: Any, model: Any, head: int) -> None:
    rope = model.config.rope_parameters
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-np.arange(0, head, 2) / head)
        factors = plain / model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    elif rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_tensor(writer: Any, model: Any, name: str, weight: Any, quant: str, arch: str) -> None:
    values, c = weight.numpy().copy(), model.config
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    if arch == "llama" and (projection := name.split(".")[-2]) in heads:
        values = interleave(values, heads[projection])
    if quant == "f32":
        writer.add_tensor(gguf_name(name), values)
        return
    kind = gguf.GGMLQuantizationType[quant.upper()]
    writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    stored = gguf.quants.quantize(weight.numpy().copy(), kind)  # rows as transformers orders them
    with torch.no_grad():
        weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))


GGUF_CASES = [
    ("llama", "f32"), ("llama-tied-llama3", "f32"), ("llama-biases-linear", "q8_0"),
    ("llama-wide-heads-yarn", "f32"), ("mistral-window", "q4_0"), ("qwen2-tied", "q8_0"),
    ("qwen2-windows-yarn", "f32"), ("qwen3", "q4_0"), ("qwen3-biases-layers", "f32"),
]  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("case", "quant"), GGUF_CASES)
def test_gguf(case: str, quant: str, machine: str, tmp_path: Path) -> None:
    pytest.importorskip(f"lmclock.machines.{machine}")
    model = random_model(CASES[case]())
    write_gguf(tmp_path / "tiny.gguf", model, quant)
    ours = assemble(tmp_path / "tiny.gguf", cache="f32")
    assert quant in {w.format for w in ours.program.weights}
    assert_parity(ours, reference(model), machine)


def test_partial_rotation(tmp_path: Path) -> None:
    """8 of 16 dimensions rotate. transformers turns all pairs (j, j + 8) of a head, so it gets its
    dimensions reordered and frequencies of zero for pairs that must stand still.
    """
    model = random_model(_case(Qwen2Config, 2))
    write_gguf(tmp_path / "tiny.gguf", model, rotary=8)
    order = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                heads = weight.reshape(-1, 16, *weight.shape[1:])
                weight.copy_(heads[:, order].reshape(weight.shape).clone())
        turning = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
        model.model.rotary_emb.inv_freq.copy_(torch.cat([turning, torch.zeros(4)]))
    assert_parity(assemble(tmp_path / "tiny.gguf", cache="f32"), reference(model))


# --- controls: what the tolerance would catch


@pytest.mark.parametrize(("case", "attr"), [("llama", "pairs"), ("llama-tied-llama3", "freqs")])
def test_a_wrong_rotation_is_far_off(case: str, attr: str, tmp_path: Path) -> None:
    model = random_model(CASES[case]())
    write_gguf(tmp_path / "tiny.gguf", model)
    ours = assemble(tmp_path / "tiny.gguf", cache="f32")
    (step,) = ours.program.sections
    changed = tuple(
        replace(i, attrs=tuple(a for a in i.attrs if a[0] != attr)) if i.op == "rope" else i
        for i in step.instructions
    )
    program = ours.program.with_sections((replace(step, instructions=changed),))
    wrong = prefilled(replace(ours, program=program), "array")
    assert np.abs(wrong - reference(model)).max() > 100 * TOLERANCE


def test_factors_that_are_no_divisors(tmp_path: Path) -> None:
    model = random_model(CASES["llama-tied-llama3"]())
    model.model.rotary_emb.inv_freq.fill_(torch.inf)
    write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(FileError, match="rope_freqs holds a factor that is not above"):
        assemble(tmp_path / "tiny.gguf")
