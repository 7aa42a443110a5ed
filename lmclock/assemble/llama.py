"""Llama 2 and 3, Mistral, SmolLM2, Qwen2 and Qwen3: pre-norm attention with rotary positions and
shared key/value heads, then a gated feed-forward layer. What tells them apart is in DecoderConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmclock.assemble.blocks import (
    Attention,
    Builder,
    Norm,
    Place,
    attention,
    each_layer,
    gated_feed_forward,
    logits,
)
from lmclock.assemble.weights import same_bytes
from lmclock.config.decoder import DecoderConfig
from lmclock.program import State

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
}
# Tables that follow from the configuration, and a second copy of a tied output matrix.
HARMLESS = r"rotary_emb\.inv_freq$|\.attn_rot_embd\.weight$|^lm_head\.weight$"


def names(c: DecoderConfig) -> Mapping[str, str]:
    """Our names of weights -> those of the Hugging Face files."""
    return NAMES


def build(c: DecoderConfig, b: Builder, cache: str) -> tuple[State, ...]:
    """Appends section `step`; the states it needs, keys and values in format `cache`."""
    norm = Norm(c.eps)
    block = Attention(
        c.width, c.heads, c.kv_heads, c.key, c.value,
        norm=norm if c.qk_norm else None, rotation=b.rotation(c.rope, c.key),
        qkv_bias=c.qkv_bias, output_bias=c.output_bias,
    )  # fmt: skip
    b.section("step")
    b.input("ids", "tok")
    x = b.embed("x.0", "token_embd", c.vocab, c.width)
    for i, layer in enumerate(each_layer(block, c.windows, "kv")):
        at = Place(i)
        h = b.norm(at.value("h"), x, at.weight("attn_norm"), c.width, norm)
        x = b.residual(at.value("x'"), x, attention(b, h, layer, at))
        h = b.norm(at.value("h'"), x, at.weight("ffn_norm"), c.width, norm)
        d = gated_feed_forward(b, h, c.width, c.hidden[i], c.act, at, c.mlp_bias)
        x = b.residual(at.value("x", later=1), x, d)
    logits(b, x, c.width, c.vocab, norm, output_matrix(c, b))
    return (State("kv", c.layers, "paged", c.kv_heads, c.key, c.value, format=cache),)


def output_matrix(c: DecoderConfig, b: Builder) -> str:
    """The embedding where they are tied; a tied file may hold a second copy, which must be one."""
    if c.tied and b.stored.has("output"):
        copy, embedding = b.stored.get("output"), b.stored.get("token_embd")
        return "token_embd" if same_bytes(copy, embedding) else "output"
    return "token_embd" if c.tied else "output"
