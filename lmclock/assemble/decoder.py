"""Every decoder-only family: attention and feed-forward layers as DecoderConfig describes them.

A family file (llama.py, gpt.py) holds the names its files use, and takes `build` from here.
"""

from __future__ import annotations

from dataclasses import replace

from lmclock.assemble.blocks import (
    Attention,
    Builder,
    Norm,
    Place,
    attention,
    feed_forward,
    gated_feed_forward,
    logits,
)
from lmclock.assemble.edited import split, split_experts, stacked, turn
from lmclock.assemble.weights import same_bytes, whole
from lmclock.config.decoder import DecoderConfig
from lmclock.config.experts import Experts
from lmclock.program import State


def build(c: DecoderConfig, b: Builder, cache: str) -> tuple[State, ...]:
    """Appends section `step`; the states it needs, keys and values in format `cache`."""
    norm = Norm(c.eps, c.norm, c.norm_offset)
    blocks = _attention_blocks(c, b, norm)
    b.section("step")
    b.input("ids", "tok")
    x = b.embed("x.0" if c.rope else "t", "token_embd", c.vocab, c.width, scale=c.embed_scale)
    if not c.rope:
        b.input("pos", "tok")
        x = b.residual("x.0", x, b.embed("p", "position_embd", c.context, c.width, "pos"))
    for i, block in enumerate(blocks):
        at = Place(i)
        _unpack(c, b, at)
        h = b.norm(at.value("h"), x, at.weight("attn_norm"), c.width, norm) if c.pre_norm else x
        o = _posted(c, b, attention(b, h, block, at), at, norm, "o'", "post_attention_norm")
        after = b.residual(at.value("x'"), x, o)
        h = x if c.parallel else after
        if c.pre_norm:
            h = b.norm(at.value("h'"), h, at.weight("ffn_norm"), c.width, norm)
        d = _feed_forward(c, b, h, at)
        d = _posted(c, b, d, at, norm, "d'", "post_ffw_norm")
        x = b.residual(at.value("x", later=1), after, d)
    logits(b, x, c.width, c.vocab, norm, _output_matrix(c, b), scale=c.logits_scale,
           softcap=c.final_softcap)  # fmt: skip
    return (State("kv", c.layers, "paged", c.kv_heads, c.key, c.value, format=cache),)


def _attention_blocks(c: DecoderConfig, b: Builder, norm: Norm) -> list[Attention]:
    """The attention of every layer, with its own window, rotation and scale."""
    rotation = b.rotation(c.rope, c.key) if c.rope else None
    local = b.rotation(c.local_rope, c.key, "", "rope_freqs_local") if c.local_rope else rotation
    block = Attention(
        c.width, c.heads, c.kv_heads, c.key, c.value,
        norm=norm if c.qk_norm else None, norm_whole=c.qk_norm_whole,
        qkv_bias=c.qkv_bias, output_bias=c.output_bias, softcap=c.softcap, scale=c.residual_scale,
    )  # fmt: skip
    scales = c.qk_scales or (0.0,) * c.layers
    return [
        replace(block, state=f"kv[{i}]", window=window, rotation=local if window else rotation,
                qk_scale=0.0 if scale == c.key**-0.5 else scale)
        for i, (window, scale) in enumerate(zip(c.windows, scales, strict=True))
    ]  # fmt: skip


def _posted(
    c: DecoderConfig, b: Builder, y: str, at: Place, norm: Norm, out: str, name: str
) -> str:
    return b.norm(at.value(out), y, at.weight(name), c.width, norm) if c.post_norm else y


def _unpack(c: DecoderConfig, b: Builder, at: Place) -> None:
    """Makes the layer's weights that the file holds in another form."""
    q, kv = c.heads * c.key, c.kv_heads * c.key
    parts = [(at.weight("attn_q"), q), (at.weight("attn_k"), kv),
             (at.weight("attn_v"), c.kv_heads * c.value)]  # fmt: skip
    fused, hidden = at.weight("attn_qkv"), c.hidden[at.layer]
    if c.fused != "none" and b.stored.has(fused):
        kind = "transposed" if c.transposed else c.fused
        split(b.stored, fused, parts, c.width, kind, c.heads)
    both = at.weight("ffn_gate_up" if b.stored.names else "ffn_up")
    if c.gated and c.fused == "stacked" and b.stored.has(both):
        pair = [(at.weight(name), hidden) for name in ("ffn_gate", "ffn_up")]
        split(b.stored, both, pair, c.width, "stacked", 1)
    if c.experts and b.stored.has(at.weight("ffn_gate_up_exps")):
        e, pair_of = c.experts, (at.weight("ffn_gate_exps"), at.weight("ffn_up_exps"))
        split_experts(b.stored, at.weight("ffn_gate_up_exps"), pair_of, e.count, e.hidden, c.width)
        down = (at.weight("ffn_down_exps"),)
        split_experts(b.stored, at.weight("ffn_down_all"), down, e.count, c.width, e.hidden)
        router = b.stored.tensor(at.weight("ffn_gate_inp_all"), (e.count, c.width))
        b.stored.make(whole(at.weight("ffn_gate_inp"), router))
    if c.transposed:
        turn(b.stored, at.weight("attn_output"), c.width, c.heads * c.value)
        turn(b.stored, at.weight("ffn_up"), hidden, c.width)
        turn(b.stored, at.weight("ffn_down"), c.width, hidden)


def _feed_forward(c: DecoderConfig, b: Builder, h: str, at: Place) -> str:
    if c.experts is None or not c.experts.sparse[at.layer]:
        block = gated_feed_forward if c.gated else feed_forward
        sizes = (c.width, c.hidden[at.layer], c.act)
        return block(b, h, *sizes, at, c.mlp_bias, c.residual_scale)
    e = c.experts
    y = _experts(c, b, h, at, Experts(e.count, e.top, e.hidden, (), e.renorm))
    if not e.shared:
        return y
    shared = _experts(c, b, h, at, Experts(1, 1, e.shared, (), False), "shexp", "sigmoid", "'")
    return b.residual(at.value("d"), y, shared)


def _experts(
    c: DecoderConfig, b: Builder, h: str, at: Place, e: Experts, ending: str = "exps",
    kind: str = "softmax", mark: str = "",
) -> str:  # fmt: skip
    """The best experts of each row. The shared one (`shexp`) is the only one of its kind, weighed
    by the sigmoid of its own score.
    """
    scores = at.weight("ffn_gate_inp" if ending == "exps" else "ffn_gate_inp_shexp")
    routed = at.value(f"p{mark}"), at.value(f"e{mark}")
    b.add("route", routed, h, b.weight(scores, e.count, c.width), experts=e.count, top=e.top,
          renorm=int(e.renorm), kind=kind)  # fmt: skip
    names = []
    for stem, rows, width in (("gate", e.hidden, c.width), ("up", e.hidden, c.width),
                              ("down", c.width, e.hidden)):  # fmt: skip
        name = at.weight(f"ffn_{stem}_{ending}")
        if ending == "exps":
            stacked(b.stored, name, e.count, rows, width)
        names.append(b.weight(name, e.count * rows, width))
    return b.add("experts", at.value(f"m{mark}"), (h, *routed), tuple(names),
                 experts=e.count, kind=c.act)  # fmt: skip


def _output_matrix(c: DecoderConfig, b: Builder) -> str:
    """The embedding where they are tied; a tied file may hold a second copy, which must be one."""
    if c.tied and b.stored.has("output"):
        copy, embedding = b.stored.get("output"), b.stored.get("token_embd")
        return "token_embd" if same_bytes(copy, embedding) else "output"
    return "token_embd" if c.tied else "output"
