"""Names of the models whose decoders are made of layer norms and plain feed-forward layers: GPT-2,
GPT-BigCode (StarCoder), and GPT-NeoX (Pythia). What tells them apart is in DecoderConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmclock.assemble.decoder import build
from lmclock.config.decoder import DecoderConfig

__all__ = ["HARMLESS", "build", "names"]

GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}
NEOX = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.{i}.attn_norm": "gpt_neox.layers.{i}.input_layernorm",
    "blk.{i}.attn_qkv": "gpt_neox.layers.{i}.attention.query_key_value",
    "blk.{i}.attn_output": "gpt_neox.layers.{i}.attention.dense",
    "blk.{i}.ffn_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "blk.{i}.ffn_down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}
# Causal masks and tables that older files keep, and a second copy of a tied output matrix.
HARMLESS = r"\.(attn|attention)\.(bias|masked_bias)$|inv_freq$|^lm_head\.weight$"


def names(c: DecoderConfig) -> Mapping[str, str]:
    """Our names of weights -> those of the Hugging Face files."""
    return GPT2 if c.rope is None else NEOX
