"""The classic encoder-decoder Transformer, Marian, BART and mBART. What tells them apart is in
Seq2SeqConfig: where norms stand, which positions and embeddings there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from lmclock.assemble.blocks import (
    Attention,
    Builder,
    Norm,
    Place,
    attention,
    cross_attention,
    cross_keys,
    feed_forward,
    logits,
)
from lmclock.assemble.edited import split
from lmclock.assemble.weights import Whole, same_bytes
from lmclock.config.seq2seq import OWN_TYPE, Seq2SeqConfig, Stack
from lmclock.formats import Array
from lmclock.program import State

_SIDES = {"enc": "encoder", "dec": "decoder"}
_BLOCKS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj", "attn_norm": "self_attn_layer_norm",
    "cross_attn_q": "encoder_attn.q_proj", "cross_attn_k": "encoder_attn.k_proj",
    "cross_attn_v": "encoder_attn.v_proj", "cross_attn_output": "encoder_attn.out_proj",
    "cross_attn_norm": "encoder_attn_layer_norm",
    "ffn_up": "fc1", "ffn_down": "fc2", "ffn_norm": "final_layer_norm",
}  # fmt: skip
_TORCH_BLOCKS = {
    "attn_output": "self_attn.out_proj", "attn_norm": "norm1",
    "cross_attn_output": "multihead_attn.out_proj", "cross_attn_norm": "norm2",
    "ffn_up": "linear1", "ffn_down": "linear2",
}  # fmt: skip
# Copies of tied matrices, tables that follow from the configuration, and marks of old versions.
HARMLESS = r"(^|\.)(en|de)coder\.(embed_(tokens|positions)\.weight|version)$|^lm_head\.weight$"


def names(c: Seq2SeqConfig) -> Mapping[str, str]:
    """Our names of weights -> those of the Hugging Face files, or of torch.nn.Transformer's."""
    if c.model == OWN_TYPE:
        return _torch_names(c)
    found = {
        "token_embd": "model.shared" if c.shared else "model.decoder.embed_tokens",
        "source_embd": "model.encoder.embed_tokens",
        "output": "lm_head",
        "output_bias": Whole("final_logits_bias"),
    }
    for ours, side in _SIDES.items():
        stem = f"model.{side}"
        found[f"{ours}.position_embd"] = f"{stem}.embed_positions"
        found[f"{ours}.embd_norm"] = f"{stem}.layernorm_embedding"
        found[f"{ours}.output_norm"] = f"{stem}.layer_norm"
        for name, theirs in _BLOCKS.items():
            found[f"{ours}.blk.{{i}}.{name}"] = f"{stem}.layers.{{i}}.{theirs}"
    return found


def _torch_names(c: Seq2SeqConfig) -> Mapping[str, str]:
    """A module with children transformer, embedding (or source_ and target_embedding), positions
    of the same two kinds where they are learned, and output.
    """
    found = {
        "token_embd": "embedding" if c.shared else "target_embedding",
        "source_embd": "source_embedding",
        "output": "output",
        "output_bias": Whole("output.bias"),
        "enc.position_embd": "source_positions",
        "dec.position_embd": "target_positions",
    }
    for ours, side in _SIDES.items():
        stem = f"transformer.{side}"
        found[f"{ours}.output_norm"] = f"{stem}.norm"
        blocks = {**_TORCH_BLOCKS, "ffn_norm": "norm2" if ours == "enc" else "norm3"}
        for name, theirs in blocks.items():
            found[f"{ours}.blk.{{i}}.{name}"] = f"{stem}.layers.{{i}}.{theirs}"
        for kind, module in (("attn", "self_attn"), ("cross_attn", "multihead_attn")):
            joint, at = f"{ours}.blk.{{i}}.{kind}_qkv", f"{stem}.layers.{{i}}.{module}.in_proj"
            found |= {joint: Whole(f"{at}_weight"), f"{joint}.bias": Whole(f"{at}_bias")}
    return found


def _split(c: Seq2SeqConfig, b: Builder) -> None:
    """torch.nn.Transformer keeps queries, keys and values in one matrix."""
    blocks = [(f"enc.blk.{i}", "attn") for i in range(c.encoder.layers)]
    for kind in ("attn", "cross_attn"):
        blocks += [(f"dec.blk.{i}", kind) for i in range(c.decoder.layers)]
    for at, kind in blocks:
        parts = [(f"{at}.{kind}_{letter}", c.width) for letter in "qkv"]
        split(b.stored, f"{at}.{kind}_qkv", parts, c.width, "", 1)


def build(c: Seq2SeqConfig, b: Builder, cache: str) -> tuple[State, ...]:
    """Appends sections `encode` and `step`; cached keys and values are in format `cache`."""
    norm = Norm(c.eps, "layer", biased=c.bias)
    head = c.width // c.decoder.heads
    if c.model == OWN_TYPE:
        _split(c, b)
    b.section("encode")
    b.input("src_ids", "src")
    b.input("src_pos", "src")
    x = _embedded(b, c, norm, "enc", "src_")
    block = _block(c, c.encoder)
    for i in range(c.encoder.layers):
        at = Place(i, "enc.blk", "e")
        x = _sub_layer(b, c, norm, at, "attn", x, partial(attention, b, a=block, at=at))
        x = _feed_forward(b, c, norm, at, x, c.encoder)
    if c.last_norm:
        x = b.norm("ez", x, "enc.output_norm", c.width, norm)
    cross = [_block(c, c.decoder, state=f"cross[{i}]") for i in range(c.decoder.layers)]
    for i, one in enumerate(cross):
        cross_keys(b, x, one, Place(i, "dec.blk"))
    b.section("step")
    b.input("ids", "tok")
    b.input("pos", "tok")
    x = _embedded(b, c, norm, "dec", "")
    for i, one in enumerate(cross):
        at, own = Place(i, "dec.blk"), _block(c, c.decoder, "causal", f"kv[{i}]")
        x = _sub_layer(b, c, norm, at, "attn", x, partial(attention, b, a=own, at=at))
        cross_block = partial(cross_attention, b, a=one, at=at)
        x = _sub_layer(b, c, norm, at, "cross_attn", x, cross_block)
        x = _feed_forward(b, c, norm, at, x, c.decoder)
    logits(
        b, x, c.width, c.vocab, norm if c.last_norm else None, _output(c, b),
        norm_name="dec.output_norm", bias="output_bias" if c.output_bias else None,
    )  # fmt: skip
    shape = (c.decoder.layers, c.decoder.heads, head, head)
    return tuple(
        State(name, shape[0], kind, *shape[1:], format=cache)
        for name, kind in (("kv", "paged"), ("cross", "frozen"))
    )


def _block(
    c: Seq2SeqConfig, stack: Stack, mask: str = "full", state: str | None = None
) -> Attention:
    head = c.width // stack.heads
    return Attention(
        c.width, stack.heads, stack.heads, head, head, state,
        qkv_bias=c.bias, output_bias=c.bias, mask=mask,
    )  # fmt: skip


def _embedded(b: Builder, c: Seq2SeqConfig, norm: Norm, side: str, space: str) -> str:
    """Token and position of each row of one side."""
    v = "e" if side == "enc" else ""
    table, size = ("token_embd", c.vocab)
    if side == "enc" and not c.shared:
        table, size = "source_embd", c.source_vocab
    scale = c.embed_scale
    words = b.embed(f"{v}w", table, size, c.width, f"{space}ids", scale=scale)
    rows, places = c.context + c.offset, f"{side}.position_embd"
    if c.positions == "sinusoidal" and not b.stored.has(places):
        # One table serves both sides.
        table = b.table("position_embd", sinusoids(c.context, c.width, c.pairs))
    else:
        table = b.weight(places, rows, c.width)
    where = b.add("embed", f"{v}p", f"{space}pos", table, offset=c.offset)
    x = b.residual(f"{v}y" if c.embed_norm else f"{v}x.0", words, where)
    return b.norm(f"{v}x.0", x, f"{side}.embd_norm", c.width, norm) if c.embed_norm else x


def sinusoids(rows: int, width: int, pairs: str) -> Array:
    """Vaswani et al. 2017, section 3.5: sines and cosines of each pair's own frequency, float32
    (rows, width); the sines before the cosines (halves), or one beside the other (adjacent).
    """
    half = width // 2
    angles = np.arange(rows)[:, None] / 10000.0 ** (2 * np.arange(half) / width)
    both = np.sin(angles), np.cos(angles)
    table = np.concatenate(both, axis=1) if pairs == "halves" else np.stack(both, axis=2)
    return table.reshape(rows, width).astype(np.float32)


def _sub_layer(
    b: Builder, c: Seq2SeqConfig, norm: Norm, at: Place, name: str, x: str,
    inner: Callable[[str], str],
) -> str:  # fmt: skip
    """x + inner(norm x), or norm(x + inner x)."""
    mark = {"attn": "'", "cross_attn": "''", "ffn": ""}[name]
    out = at.value("x", later=1) if name == "ffn" else at.value(f"x{mark}")
    weight = at.weight(f"{name}_norm")
    if c.pre_norm:
        return b.residual(out, x, inner(b.norm(at.value(f"h{mark}"), x, weight, c.width, norm)))
    return b.norm(out, b.residual(at.value(f"r{mark}"), x, inner(x)), weight, c.width, norm)


def _feed_forward(b: Builder, c: Seq2SeqConfig, norm: Norm, at: Place, x: str, stack: Stack) -> str:
    block = partial(
        feed_forward, b, width=c.width, hidden=stack.hidden, act=c.act, at=at, bias=c.bias
    )
    return _sub_layer(b, c, norm, at, "ffn", x, block)


def _output(c: Seq2SeqConfig, b: Builder) -> str:
    """The embedding where they are tied, unless the file holds another matrix of its own."""
    if c.tied and b.stored.has("output"):
        copy, embedding = b.stored.get("output"), b.stored.get("token_embd")
        return "token_embd" if same_bytes(copy, embedding) else "output"
    return "token_embd" if c.tied else "output"
