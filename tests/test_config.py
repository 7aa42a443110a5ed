"""Configurations of others: what published ones mean, and that broken ones are refused in one
sentence that names the culprit.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmclock.assemble.rope import frequencies
from lmclock.config import GGUF_TYPES, HF_TYPES, ModelConfig, Rope, from_gguf, from_hf
from lmclock.errors import FileError, LmclockError, UnsupportedError
from lmclock.fields import shortest

# The config.json of four published models, shortened by what says nothing of the arithmetic.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
LLAMA_3_2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "sliding_window": 32768, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
GGUF = {
    "general.architecture": "llama", "general.name": "Smollm2 135M", "llama.block_count": 30,
    "llama.context_length": 8192, "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536, "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3, "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "general.file_type": 3,
    "llama.vocab_size": 49152, "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k not in keys}


# --- what published configurations mean


def test_smollm2_is_the_same_in_both_formats() -> None:
    hf, gguf = from_hf(SMOLLM2, "SmolLM2"), from_gguf(GGUF, ["token_embd.weight"])
    assert (hf.layers, hf.heads, hf.kv_heads, hf.key, hf.value) == (30, 9, 3, 64, 64)
    assert hf.hidden == (1536,) * 30 and hf.windows == (0,) * 30 and hf.tied
    assert hf.rope == Rope(64, 100000.0) and gguf.rope == Rope(64, 100000.0, "adjacent")
    differ = {k for k in vars(hf) if getattr(hf, k) != getattr(gguf, k)}
    assert differ == {"source", "name", "rope", "notes"}
    assert hf.notes == ("ignored in config.json: rope_interleaved, transformers.js_config",)


def test_defaults_are_those_of_the_model_type() -> None:
    sizes = without(MISTRAL, "num_key_value_heads", "sliding_window", "max_position_embeddings")
    mistral = from_hf(sizes)
    assert (mistral.kv_heads, mistral.windows[0], mistral.context) == (8, 4096, 131072)
    assert from_hf(MISTRAL | {"sliding_window": None}).windows[0] == 0
    llama = from_hf(without(SMOLLM2, "num_key_value_heads"))
    assert llama.kv_heads == 9
    qwen3 = from_hf(QWEN2 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.key == 128 and qwen3.qk_norm and not qwen3.qkv_bias
    qwen2 = from_hf(QWEN2)
    assert qwen2.qkv_bias and not qwen2.output_bias and not any(qwen2.windows)
    assert from_hf(SMOLLM2 | {"attention_bias": True}).output_bias
    assert from_hf(LLAMA_3_2).eos == (128001, 128008, 128009)


def test_windows_by_layer() -> None:
    used = QWEN2 | {"use_sliding_window": True, "sliding_window": 100}
    assert from_hf(used).windows == (0,) * 21 + (100,) * 3
    kinds = ["sliding_attention", "full_attention"] * 12
    assert from_hf(used | {"layer_types": kinds}).windows == (100, 0) * 12
    swa = {"llama.attention.sliding_window": 7, "llama.block_count": 2}
    assert from_gguf(GGUF | swa).windows == (7, 7)
    pattern = {"llama.attention.sliding_window_pattern": np.array([True, False])}
    assert from_gguf(GGUF | swa | pattern).windows == (7, 0)


def test_both_spellings_of_rope_scaling() -> None:
    old = from_hf(LLAMA_3_2)
    parameters = LLAMA_3_2["rope_scaling"] | {"rope_theta": 500000.0}
    new = from_hf(
        without(LLAMA_3_2, "rope_scaling", "rope_theta") | {"rope_parameters": parameters}
    )
    assert old == new
    assert old.rope.scaling == "llama3" and old.rope.original == 8192 and old.context == 131072
    older = from_hf(SMOLLM2 | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert older.rope == Rope(64, 100000.0, scaling="linear", factor=4.0, original=8192)
    assert older.context == 4 * 8192


def test_yarn() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = from_hf(QWEN2 | {"rope_scaling": yarn})
    assert config.context == 131072 and config.rope.gain == pytest.approx(0.1 * math.log(4) + 1)
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "context_length": 131072,
            "rope.scaling.original_context_length": 32768}  # fmt: skip
    gguf = from_gguf(GGUF | {f"llama.{k}": v for k, v in keys.items()})
    for name in ("scaling", "factor", "original", "low", "high", "gain", "truncate"):
        assert getattr(gguf.rope, name) == getattr(config.rope, name), name


def test_optional_parts_of_gguf_are_what_the_tensors_say() -> None:
    names = ["output.weight", "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_down.bias"]
    config = from_gguf(GGUF, names)
    assert not config.tied and config.qkv_bias and config.output_bias and config.mlp_bias
    assert from_gguf(GGUF).tied
    uneven = GGUF | {"llama.feed_forward_length": np.arange(1, 31), "llama.vocab_size": None}
    config = from_gguf(uneven | {"tokenizer.ggml.tokens": ["a"] * 7})
    assert config.hidden == tuple(range(1, 31)) and config.vocab == 7


def test_numbers_of_four_bytes_read_as_they_were_meant() -> None:
    assert from_gguf(GGUF).eps == 1e-05
    assert shortest(float(np.float32(0.1))) == 0.1 and shortest(0.1) == 0.1
    assert shortest(1 / 3) == 1 / 3


# --- frequencies


def test_unscaled_frequencies_need_no_table() -> None:
    assert frequencies(Rope(64)) is None


def test_llama3_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    rope = Rope(64, 500000.0, scaling="llama3", factor=32.0, original=8192)
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 8192 * plain / (2 * np.pi)
    got = frequencies(rope)
    np.testing.assert_allclose(got[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(got[turns < 1], plain[turns < 1] / 32, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any() and np.all((got < plain)[between] & (got > plain / 32)[between])


def test_factors_divide() -> None:
    got = frequencies(Rope(8, 10000.0), np.array([1.0, 2.0, 4.0, 8.0]))
    np.testing.assert_allclose(got, [1, 0.05, 0.0025, 0.000125], rtol=1e-6)


# --- refusals

BAD_HF: list[tuple[dict[str, Any], type, str]] = [
    ({"model_type": "gemma9"}, UnsupportedError, "valid: llama, mistral, mixtral, qwen2,"),
    ({"model_type": None}, FileError, "lacks model_type"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, UnsupportedError, "remote code is never run"),
    ({"architectures": ["LlamaForTokenClassification"]}, UnsupportedError, "LlamaForCausalLM"),
    ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "'gptq'"),
    ({"hidden_size": None}, FileError, "lacks hidden_size"),
    ({"hidden_size": "576"}, FileError, "hidden_size is '576'; valid: an integer"),
    ({"hidden_size": True}, FileError, "hidden_size"),
    ({"hidden_size": 577}, FileError, "577 does not split into 9 heads"),
    ({"num_attention_heads": 0}, FileError, "num_attention_heads is '0'"),
    ({"num_hidden_layers": 10**9}, FileError, "from 1 to 4096"),
    ({"num_key_value_heads": 2}, FileError, "9 heads do not share 2 key/value heads"),
    ({"num_key_value_heads": 0}, FileError, "num_key_value_heads is '0'"),
    ({"head_dim": 33}, FileError, "33 rotary dimensions are odd"),
    ({"vocab_size": 2**40}, FileError, "vocab_size"),
    ({"rms_norm_eps": float("nan")}, FileError, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, FileError, "rms_norm_eps"),
    ({"hidden_act": "mish"}, UnsupportedError, "valid: silu, swish, gelu"),
    ({"tie_word_embeddings": "yes"}, FileError, "valid: true or false"),
    ({"rope_theta": 0.5}, FileError, "frequency base of RoPE is 0.5"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedError, "'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedError, "'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, FileError, "rope_parameters lacks factor"),
    ({"rope_scaling": {"type": "linear", "factor": 1e29}}, FileError, "a context of"),
    ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, UnsupportedError, "mrope_sec"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, UnsupportedError, "one flat"),
    ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor=0.5"),
    ({"sliding_window": 128}, UnsupportedError, "sliding_window=128 may change the arithmetic"),
    ({"logits_scaling": 8.0}, UnsupportedError, "logits_scaling=8.0"),
    ({"num_local_experts": 8}, UnsupportedError, "num_local_experts"),
    ({"use_qk_norm": True}, UnsupportedError, "use_qk_norm=True"),
    ({"is_causal": False}, UnsupportedError, "is_causal"),
    ({"eos_token_id": "x"}, FileError, "eos_token_id"),
]  # fmt: skip

BAD_GGUF: list[tuple[dict[str, Any], type, str]] = [
    ({"general.architecture": "rwkv7"}, UnsupportedError, "valid: llama, qwen2, qwen3,"),
    ({"general.architecture": 3}, FileError, "general.architecture is '3'; valid: a string"),
    ({"llama.block_count": None}, FileError, "GGUF metadata lacks llama.block_count"),
    ({"llama.block_count": 10**9}, FileError, "llama.block_count"),
    ({"llama.attention.head_count": 0}, FileError, "llama.attention.head_count is '0'"),
    ({"llama.attention.head_count": 5}, FileError, "576 does not split into 5 heads"),
    ({"llama.attention.head_count_kv": 4}, FileError, "9 heads do not share 4"),
    ({"llama.attention.head_count_kv": np.arange(1, 31)}, UnsupportedError, "from layer to layer"),
    ({"llama.attention.head_count_kv": [3]}, FileError, "or 30 of them"),
    ({"llama.rope.dimension_count": 63}, FileError, "63 rotary dimensions are odd"),
    ({"llama.rope.dimension_count": 128}, FileError, "128 rotary dimensions in heads of 64"),
    ({"llama.rope.scaling.type": "longrope"}, UnsupportedError, "'longrope'"),
    ({"llama.expert_count": 8}, FileError, "lacks llama.expert_used_count"),
    ({"llama.attention.causal": False}, UnsupportedError, "causal"),
    ({"llama.logit_scale": 0.5}, UnsupportedError, "llama.logit_scale=0.5"),
    ({"llama.attention.sliding_window_pattern": [True]}, FileError, "30 flags"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, FileError, "2 tokens, but llama.vocab_size is 49152"),
    ({"tokenizer.ggml.tokens": 5}, FileError, "tokenizer.ggml.tokens is '5'; valid: a list"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), BAD_HF)
def test_refused_config_json(change: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as caught:
        from_hf(SMOLLM2 | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "kind", "message"), BAD_GGUF)
def test_refused_metadata(change: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind) as caught:
        from_gguf(GGUF | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_neutral_values_of_unknown_keys_pass() -> None:
    neutral = {"logits_scaling": 1.0, "num_local_experts": 0, "use_qk_norm": False,
               "final_logit_softcapping": None, "sliding_window": None,
               "layer_types": []}  # fmt: skip
    assert from_hf(SMOLLM2 | neutral).notes[0].count(",") == len(neutral) + 1


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)  # fmt: skip
FIELDS = ["rope_parameters", "sliding_window", "use_sliding_window", "layer_types", "head_dim"]
SCALING = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"])},
    optional=dict.fromkeys(
        ["factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "rope_theta",
         "original_max_position_embeddings", "attention_factor", "truncate", "mscale"],
        ANYTHING | st.floats(1e-3, 1e3) | st.integers(1, 1 << 20),
    ),
)  # fmt: skip


def sound(config: ModelConfig) -> None:
    """What the assembler relies on."""
    assert config.heads % config.kv_heads == 0 and config.rope.dims % 2 == 0
    assert len(config.hidden) == len(config.windows) == config.layers
    table = frequencies(config.rope)
    assert table is None or (table.shape == (config.rope.dims // 2,) and np.isfinite(table).all())


@given(st.data())
def test_any_value_anywhere_is_a_config_or_a_typed_error(data: st.DataObject) -> None:
    base, read = data.draw(
        st.sampled_from([(SMOLLM2, from_hf), (QWEN2, from_hf), (GGUF, from_gguf)])
    )
    keys = [*base, "layer\n", *(FIELDS if read is from_hf else ["llama.rope.scaling.factor"])]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), ANYTHING, min_size=1, max_size=3))
    try:
        sound(read(base | changes))
    except LmclockError as error:
        assert "\n" not in str(error)


@given(SCALING)
def test_any_scaling_is_finite_frequencies_or_a_typed_error(scaling: dict[str, Any]) -> None:
    try:
        sound(from_hf(QWEN2 | {"rope_parameters": scaling}))
    except LmclockError as error:
        assert "\n" not in str(error)


def test_every_type_has_a_family() -> None:
    from lmclock.assemble import FAMILIES

    rows = []
    for table, types in (("HF_TYPES", HF_TYPES), ("GGUF_TYPES", GGUF_TYPES)):
        for name in set(types.values()):
            translator = importlib.import_module(f"lmclock.config.{name}")
            own = getattr(translator, table)
            assert set(own) == {model for model, file in types.items() if file == name}
            rows += own.values()
    assert {row.family for row in rows} == set(FAMILIES)
