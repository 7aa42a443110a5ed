"""Tiny configurations of every decoder family beside Llama's, each with the options that tell it
from the others set to something that shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
SHARED = {"num_key_value_heads": 2}
WIDE = SHARED | {"head_dim": 24}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


def _rope(theta: float = 500.0, **options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | options


GEMMA3_ROPES = {"full_attention": _rope(1e6, rope_type="linear", factor=8.0),
                "sliding_attention": _rope(1e4)}  # fmt: skip

CASES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2Config(**GPT2),
    "gpt2-options": lambda: hf.GPT2Config(
        **GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=80, tie_word_embeddings=False,
        activation_function="relu", reorder_and_upcast_attn=True,
    ),
    "gpt2-unscaled": lambda: hf.GPT2Config(**GPT2, scale_attn_weights=False),
    "bigcode": lambda: hf.GPTBigCodeConfig(**GPT2),
    "bigcode-all-heads": lambda: hf.GPTBigCodeConfig(**GPT2, multi_query=False),
    "neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "neox-sequential": lambda: hf.GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
        rope_parameters=_rope(partial_rotary_factor=0.5),
    ),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, **SHARED, num_local_experts=5, sliding_window=5),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **SIZES | {"num_hidden_layers": 3}, **SHARED, **EXPERTS, mlp_only_layers=[1],
        shared_expert_intermediate_size=48,
    ),
    "qwen2-moe-renormed": lambda: hf.Qwen2MoeConfig(
        **SIZES, **SHARED, **EXPERTS, decoder_sparse_step=2, norm_topk_prob=True, qkv_bias=False,
        shared_expert_intermediate_size=48,
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**SIZES, **WIDE, **EXPERTS, norm_topk_prob=True),
    "gemma": lambda: hf.GemmaConfig(**SIZES, **WIDE),
    "gemma2": lambda: hf.Gemma2Config(
        **SIZES | {"num_hidden_layers": 3}, **WIDE, sliding_window=5, query_pre_attn_scalar=10,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7}, **WIDE, sliding_window=5, query_pre_attn_scalar=24
    ),
    "gemma3-stretched": lambda: hf.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 3}, **WIDE, sliding_window=5, sliding_window_pattern=2,
        rope_parameters=GEMMA3_ROPES, final_logit_softcapping=3.0, tie_word_embeddings=False,
    ),
    "phi3": lambda: hf.Phi3Config(
        **SIZES, **SHARED, pad_token_id=0, sliding_window=6,
        rope_parameters=_rope(partial_rotary_factor=0.5), original_max_position_embeddings=128,
    ),
    "olmo2": lambda: hf.Olmo2Config(**SIZES, **SHARED),
    "granite": lambda: hf.GraniteConfig(
        **SIZES, **SHARED, embedding_multiplier=3.0, attention_multiplier=0.2,
        residual_multiplier=0.3, logits_scaling=1.7,
    ),
}  # fmt: skip
