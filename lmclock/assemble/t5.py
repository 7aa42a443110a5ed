"""T5, its version 1.1, flan-T5 and mT5: pre-norm blocks without biases, positions relative and
learned, one table of them for all layers of a stack, and attention without a factor on q.k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from lmclock.assemble.blocks import (
    Attention,
    Builder,
    Norm,
    Place,
    attention,
    cross_attention,
    cross_keys,
    feed_forward,
    gated_feed_forward,
    logits,
)
from lmclock.assemble.weights import same_bytes
from lmclock.config.t5 import T5Config
from lmclock.program import State

_ATTENTION = {"q": "q", "k": "k", "v": "v", "output": "o"}
# Copies of the shared embedding; the cross-attention of old files has a table nobody reads.
HARMLESS = (
    r"^(en|de)coder\.embed_tokens\.weight$|^lm_head\.weight$"
    r"|^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"
)


def names(c: T5Config) -> Mapping[str, str]:
    """Our names of weights -> those of the Hugging Face files."""
    found = {"token_embd": "shared", "output": "lm_head"}
    for ours, side, last in (("enc", "encoder", 1), ("dec", "decoder", 2)):
        found[f"{ours}.output_norm"] = f"{side}.final_layer_norm"
        # The first layer's table is that of all: without its number the layers look alike.
        table = "block.0.layer.0.SelfAttention.relative_attention_bias"
        found[f"{ours}.attn_rel_b"] = f"{side}.{table}"
        layer = f"{side}.block.{{i}}.layer"
        blocks = {"attn": (0, "SelfAttention"), "cross_attn": (1, "EncDecAttention")}
        for kind, (number, module) in blocks.items():
            found[f"{ours}.blk.{{i}}.{kind}_norm"] = f"{layer}.{number}.layer_norm"
            for name, theirs in _ATTENTION.items():
                found[f"{ours}.blk.{{i}}.{kind}_{name}"] = f"{layer}.{number}.{module}.{theirs}"
        found[f"{ours}.blk.{{i}}.ffn_norm"] = f"{layer}.{last}.layer_norm"
        inner = {"gate": "wi_0", "up": "wi_1" if c.gated else "wi", "down": "wo"}
        for name, theirs in inner.items():
            found[f"{ours}.blk.{{i}}.ffn_{name}"] = f"{layer}.{last}.DenseReluDense.{theirs}"
    return found


def build(c: T5Config, b: Builder, cache: str) -> tuple[State, ...]:
    """Appends sections `encode` and `step`; cached keys and values are in format `cache`."""
    norm = Norm(c.eps)
    b.section("encode")
    b.input("src_ids", "src")
    x = b.embed("ex.0", "token_embd", c.vocab, c.width, "src_ids")
    block = _block(c, b, "enc", "full")
    for i in range(c.layers):
        at = Place(i, "enc.blk", "e")
        x = _layer(b, c, norm, at, x, {"attn": partial(attention, b, a=block, at=at)})
    x = b.norm("ez", x, "enc.output_norm", c.width, norm)
    cross = [_block(c, b, state=f"cross[{i}]") for i in range(c.decoder_layers)]
    for i, one in enumerate(cross):
        cross_keys(b, x, one, Place(i, "dec.blk"))
    b.section("step")
    b.input("ids", "tok")
    x = b.embed("x.0", "token_embd", c.vocab, c.width)
    for i, one in enumerate(cross):
        at, own = Place(i, "dec.blk"), _block(c, b, "dec", "causal", f"kv[{i}]")
        inner = {
            "attn": partial(attention, b, a=own, at=at),
            "cross_attn": partial(cross_attention, b, a=one, at=at),
        }
        x = _layer(b, c, norm, at, x, inner)
    scale = c.width**-0.5 if c.scaled else 1.0
    logits(b, x, c.width, c.vocab, norm, _output(b), norm_name="dec.output_norm", scale=scale)
    return tuple(
        State(name, c.decoder_layers, kind, c.heads, c.key, c.key, format=cache)
        for name, kind in (("kv", "paged"), ("cross", "frozen"))
    )


def _block(
    c: T5Config, b: Builder, side: str = "", mask: str = "full", state: str | None = None
) -> Attention:
    """Self-attention of one side, or cross-attention, which knows no positions."""
    table = b.weight(f"{side}.attn_rel_b", c.buckets, c.heads) if side else None
    return Attention(
        c.width, c.heads, c.heads, c.key, c.key, state, mask=mask, qk_scale=1.0,
        rel_bias=table, max_distance=c.max_distance if table else None,
    )  # fmt: skip


def _layer(
    b: Builder,
    c: T5Config,
    norm: Norm,
    at: Place,
    x: str,
    inner: Mapping[str, Callable[[str], str]],
) -> str:
    """Each block adds to x what it makes of x normalised; the feed-forward block is the last."""
    for number, (name, block) in enumerate(inner.items(), 1):
        mark = "'" * number
        h = b.norm(at.value(f"h{mark}"), x, at.weight(f"{name}_norm"), c.width, norm)
        x = b.residual(at.value(f"x{mark}"), x, block(h))
    h = b.norm(at.value("h"), x, at.weight("ffn_norm"), c.width, norm)
    make = gated_feed_forward if c.gated else feed_forward
    return b.residual(at.value("x", later=1), x, make(b, h, c.width, c.hidden, c.act, at, False))


def _output(b: Builder) -> str:
    """The embedding, unless the file holds another matrix of its own."""
    if not b.stored.has("output"):
        return "token_embd"
    copy, embedding = b.stored.get("output"), b.stored.get("token_embd")
    return "token_embd" if same_bytes(copy, embedding) else "output"
