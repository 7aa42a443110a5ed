"""Names of the models whose decoders are made of RMS norms, rotary attention and gated feed-forward
layers: Llama 2 and 3, Mistral and Mixtral, SmolLM2, Qwen2 and Qwen3 with and without experts, Gemma
1 to 3, Phi-3, OLMo-2, Granite. What tells them apart is in DecoderConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmclock.assemble.decoder import build
from lmclock.assemble.weights import Whole
from lmclock.config.decoder import DecoderConfig

__all__ = ["HARMLESS", "build", "names"]

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
    "blk.{i}.attn_qkv": "model.layers.{i}.self_attn.qkv_proj",
    "blk.{i}.ffn_gate_up": "model.layers.{i}.mlp.gate_up_proj",
    "blk.{i}.ffn_gate_inp": "model.layers.{i}.mlp.gate",
    "blk.{i}.ffn_gate_exps": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "blk.{i}.ffn_up_exps": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "blk.{i}.ffn_down_exps": "model.layers.{i}.mlp.experts.{e}.down_proj",
    # transformers 5, where it is told not to save files as they used to be
    "blk.{i}.ffn_gate_up_exps": Whole("model.layers.{i}.mlp.experts.gate_up_proj"),
    "blk.{i}.ffn_down_all": Whole("model.layers.{i}.mlp.experts.down_proj"),
    "blk.{i}.ffn_gate_inp_all": "model.layers.{i}.mlp.gate",
    "blk.{i}.ffn_gate_inp_shexp": "model.layers.{i}.mlp.shared_expert_gate",
    "blk.{i}.ffn_gate_shexp": "model.layers.{i}.mlp.shared_expert.gate_proj",
    "blk.{i}.ffn_up_shexp": "model.layers.{i}.mlp.shared_expert.up_proj",
    "blk.{i}.ffn_down_shexp": "model.layers.{i}.mlp.shared_expert.down_proj",
}
MIXTRAL = {
    "blk.{i}.ffn_gate_inp": "model.layers.{i}.block_sparse_moe.gate",
    "blk.{i}.ffn_gate_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "blk.{i}.ffn_up_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "blk.{i}.ffn_down_exps": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}
POST_NORMS = {
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}
# Tables that follow from the configuration, and a second copy of a tied output matrix.
HARMLESS = r"rotary_emb\.inv_freq$|\.attn_rot_embd\.weight$|^lm_head\.weight$"


def names(c: DecoderConfig) -> Mapping[str, str]:
    """Our names of weights -> those of the Hugging Face files."""
    return NAMES | (POST_NORMS if c.post_norm else {}) | (MIXTRAL if c.model == "mixtral" else {})
