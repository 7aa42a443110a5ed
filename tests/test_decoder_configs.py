"""Options of the decoder families: what a config.json means, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_decoders import CASES

from lmclock.config import from_gguf, from_hf
from lmclock.config.decoder import DecoderConfig
from lmclock.config.experts import Experts
from lmclock.errors import FileError, LmclockError, UnsupportedError

DATA: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module", autouse=True)
def _data() -> None:
    for case, make in CASES.items():
        DATA[case] = make().to_diff_dict() | {"architectures": None}


def config(case: str, **changes: Any) -> DecoderConfig:
    found = from_hf(DATA[case] | changes)
    assert isinstance(found, DecoderConfig)
    return found


@pytest.mark.parametrize("case", CASES)
def test_unknown_keys_of_every_family(case: str) -> None:
    plain = config(case)
    for key, value in (("residual_gate_scale", 2.0), ("moe_bias", True), ("kv_sharing", 3)):
        with pytest.raises(UnsupportedError, match=f"{key}={value} may change the arithmetic"):
            config(case, **{key: value})
    noted = config(case, training_mood="good", kv_sharing=0)
    assert noted == plain and "kv_sharing" in noted.notes[0] and "training_mood" in noted.notes[0]


def test_gpt2_and_its_kin() -> None:
    plain = config("gpt2")
    assert plain.rope is None and plain.tied and plain.act == "gelu_tanh" and not plain.qk_scales
    assert plain.hidden == (256, 256) and plain.fused == "stacked" and plain.transposed
    by_layer = config("gpt2-options").qk_scales
    assert by_layer == (0.25, 0.125)
    assert config("gpt2-unscaled").qk_scales == (1.0, 1.0)
    assert config("bigcode").kv_heads == 1 and config("bigcode-all-heads").kv_heads == 4
    neox = config("neox")
    assert neox.rope is not None and neox.rope.dims == 4 and neox.parallel and neox.qkv_bias
    old = {key: value for key, value in DATA["neox"].items() if key != "rope_parameters"}
    older = from_hf(old | {"rotary_pct": 0.5, "rotary_emb_base": 500})
    assert older.rope.dims == 8 and older.rope.base == 500.0


def test_experts() -> None:
    assert config("mixtral").experts == Experts(5, 2, 96, (True, True))
    moe = config("qwen2-moe")
    assert moe.experts == Experts(6, 3, 32, (True, False, True), renorm=False, shared=48)
    assert config("qwen2-moe-renormed").experts.sparse == (False, True)
    assert config("qwen3-moe").experts.renorm and not config("qwen3-moe").experts.shared


def test_gemmas() -> None:
    first, second, third = (config(case) for case in ("gemma", "gemma2", "gemma3"))
    assert first.embed_scale == 8.0 and first.norm_offset == 1.0 and not first.post_norm
    assert config("gemma", hidden_act="gelu").act == "gelu_tanh", "as Gemma's first files mean it"
    assert second.windows == (5, 0, 5) and second.post_norm
    assert second.softcap == 3.0 and second.final_softcap == 4.0
    assert second.qk_scales[0] == pytest.approx(10**-0.5)
    assert config("gemma2", attn_logit_softcapping=None).softcap == 0.0
    missing = {k: v for k, v in DATA["gemma2"].items() if "softcapping" not in k}
    assert from_hf(missing).softcap == 50.0
    assert third.windows == (5, 5, 5, 5, 5, 0, 5) and third.qk_norm
    assert (third.rope.base, third.local_rope.base) == (1e6, 1e4)
    new = ("rope_parameters", "layer_types", "_sliding_window_pattern")
    old = {k: v for k, v in DATA["gemma3"].items() if k not in new}
    older = from_hf(old | {"rope_theta": 2e6, "rope_local_base_freq": 3e4,
                           "sliding_window_pattern": 3,
                           "rope_scaling": {"rope_type": "linear", "factor": 8.0}})  # fmt: skip
    assert (older.rope.base, older.local_rope.base, older.rope.factor) == (2e6, 3e4, 8.0)
    assert older.windows == (5, 5, 0, 5, 5, 0, 5) and older.local_rope.scaling == "none"
    assert older.context == 128, "Gemma 3 states the context its stretched positions reach"


BAD: list[tuple[str, dict[str, Any], type, str]] = [
    ("gpt2", {"add_cross_attention": True}, UnsupportedError, "add_cross_attention"),
    ("gpt2", {"n_head": 5}, FileError, "64 does not split into 5 heads"),
    ("gpt2", {"activation_function": "mish"}, UnsupportedError, "activation_function is 'mish'"),
    ("gpt2", {"rotary_dim": 8}, UnsupportedError, "rotary_dim=8"),
    ("neox", {"use_parallel_residual": 1}, FileError, "use_parallel_residual is '1'"),
    ("neox", {"rope_parameters": {"partial_rotary_factor": 0.1}}, FileError, "rotary dimensions"),
    ("mixtral", {"num_experts_per_tok": 9}, FileError, "num_experts_per_tok=9 of 5 experts"),
    ("mixtral", {"num_local_experts": 0}, FileError, "num_local_experts is '0'"),
    ("qwen2-moe", {"mlp_only_layers": "none"}, FileError, "valid: a list of layer numbers"),
    ("qwen2-moe", {"mlp_only_layers": [0, 1, 2]}, FileError, "no layer that has them"),
    ("qwen2-moe", {"norm_topk_prob": "yes"}, FileError, "valid: true or false"),
    ("qwen3-moe", {"n_shared_experts": 1, "expert_bias": True}, UnsupportedError, "expert_bias"),
    ("gemma2", {"query_pre_attn_scalar": 0}, FileError, "query_pre_attn_scalar is '0'"),
    ("gemma3", {"use_bidirectional_attention": True}, UnsupportedError, "use_bidirectional"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 7}, UnsupportedError, "chunked_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": {}, "other": {}}}, UnsupportedError,
     "valid: full_attention or sliding_attention"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}},
     UnsupportedError, "'longrope' is not supported"),
    ("granite", {"attention_bias": True}, FileError, "residual_multiplier=0.3 of products with"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "kind", "message"), BAD)
def test_refused(case: str, change: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(LmclockError) as caught:
        config(case, **change)
    assert type(caught.value) is kind and message in str(caught.value)
    assert "\n" not in str(caught.value)


MOE = {
    "general.architecture": "qwen2moe", "qwen2moe.block_count": 2, "qwen2moe.context_length": 64,
    "qwen2moe.embedding_length": 64, "qwen2moe.feed_forward_length": 96,
    "qwen2moe.attention.head_count": 4, "qwen2moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen2moe.vocab_size": 9, "qwen2moe.expert_count": 6, "qwen2moe.expert_used_count": 3,
}  # fmt: skip
TENSORS = ["blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_inp_shexp.weight"]


def test_gguf_experts() -> None:
    plain = from_gguf(MOE, TENSORS)
    assert plain.experts == Experts(6, 3, 32, (False, True), renorm=False, shared=96)
    for key, value, message in (
        ("expert_used_count", 7, "expert_used_count=7 of 6 experts"),
        ("expert_gating_func", 2, "expert_gating_func=2 is not supported; valid: 1, softmax"),
        ("expert_weights_scale", 2.5, "expert_weights_scale=2.5 may change the arithmetic"),
        ("expert_group_count", 4, "expert_group_count=4 may change the arithmetic"),
    ):
        with pytest.raises(LmclockError, match=message):
            from_gguf(MOE | {f"qwen2moe.{key}": value}, TENSORS)
    dense = {key.replace("qwen2moe", "gemma"): value for key, value in MOE.items()}
    with pytest.raises(UnsupportedError, match=r"gemma\.expert_count=6 is not supported"):
        from_gguf(dense | {"general.architecture": "gemma"}, TENSORS)


def test_gguf_windows_and_scales_that_files_leave_out() -> None:
    base = {
        "block_count": 12, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 9,
        "attention.sliding_window": 8,
    }  # fmt: skip

    def read(arch: str, **changes: Any) -> Any:
        keys = {f"{arch}.{key}": value for key, value in (base | changes).items()}
        return from_gguf({"general.architecture": arch} | keys)

    assert read("gemma2").windows == (8, 0) * 6 and read("gemma2").softcap == 50.0
    assert read("gemma3").windows == ((8,) * 5 + (0,)) * 2
    stated = {"attention.sliding_window_pattern": 3}
    assert read("gemma3", **stated).windows == ((8, 8, 0) * 4)
    assert read("gemma3").local_rope.base == 10000.0
    assert read("gemma3", **{"rope.freq_base_swa": 5e3}).local_rope.base == 5e3
    wide = {"block_count": 62, "attention.key_length": 32}
    assert read("gemma3", **wide).qk_scales == (0.25,) * 62, "27B: 1 / sqrt(width / heads)"
    assert not any(read("gemma3", **wide | {"block_count": 48}).qk_scales)
