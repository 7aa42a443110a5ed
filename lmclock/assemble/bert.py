"""BERT, MiniLM, RoBERTa, XLM-RoBERTa and DistilBERT: one section, `encode`, whose rows see each
other in both directions; each block is followed by a LayerNorm. The last value is the head's: an
embedding (a row for each text) or `logits` (a row for each text, or for each token).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lmclock.assemble.blocks import Attention, Builder, Norm, Place, attention, feed_forward
from lmclock.config.encoder import EncoderConfig
from lmclock.program import State

_LAYER = "encoder.layer.{i}"
NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.{i}.attn_q": f"{_LAYER}.attention.self.query",
    "blk.{i}.attn_k": f"{_LAYER}.attention.self.key",
    "blk.{i}.attn_v": f"{_LAYER}.attention.self.value",
    "blk.{i}.attn_output": f"{_LAYER}.attention.output.dense",
    "blk.{i}.attn_output_norm": f"{_LAYER}.attention.output.LayerNorm",
    "blk.{i}.ffn_up": f"{_LAYER}.intermediate.dense",
    "blk.{i}.ffn_down": f"{_LAYER}.output.dense",
    "blk.{i}.layer_output_norm": f"{_LAYER}.output.LayerNorm",
    "pooler": "pooler.dense",
    "cls": "pooler.dense",
    "cls.output": "classifier",
    "token.output": "classifier",
    "answer.output": "qa_outputs",
    "masked": "cls.predictions.transform.dense",
    "masked_norm": "cls.predictions.transform.LayerNorm",
    "output": "cls.predictions.decoder",
    "output.bias": "cls.predictions",
}
_DISTIL = "transformer.layer.{i}"
CHANGES = {
    "bert": {},
    "roberta": {
        "cls": "classifier.dense",
        "cls.output": "classifier.out_proj",
        "masked": "lm_head.dense",
        "masked_norm": "lm_head.layer_norm",
        "output": "lm_head.decoder",
        "output.bias": "lm_head",
    },
    "distilbert": {
        "blk.{i}.attn_q": f"{_DISTIL}.attention.q_lin",
        "blk.{i}.attn_k": f"{_DISTIL}.attention.k_lin",
        "blk.{i}.attn_v": f"{_DISTIL}.attention.v_lin",
        "blk.{i}.attn_output": f"{_DISTIL}.attention.out_lin",
        "blk.{i}.attn_output_norm": f"{_DISTIL}.sa_layer_norm",
        "blk.{i}.ffn_up": f"{_DISTIL}.ffn.lin1",
        "blk.{i}.ffn_down": f"{_DISTIL}.ffn.lin2",
        "blk.{i}.layer_output_norm": f"{_DISTIL}.output_layer_norm",
        "cls": "pre_classifier",
        "masked": "vocab_transform",
        "masked_norm": "vocab_layer_norm",
        "output": "vocab_projector",
        "output.bias": "vocab_projector",
    },
}
ROOTS = {"xlm-roberta": "roberta", "camembert": "roberta"}  # whose names a model type shares
TINY = 1e-24  # keeps an embedding of zeros from a division by zero, and changes no other
# Numbers that follow from the configuration; a second copy of what is tied; heads of other uses.
HARMLESS = (
    r"position_ids$|^pooler\.|^cls\.seq_relationship\.|^cls\.predictions\.|^lm_head\."
    r"|^vocab_(transform|layer_norm|projector)\."
)


def names(c: EncoderConfig) -> Mapping[str, str]:
    """Our names of weights -> those of the Hugging Face files."""
    found = NAMES | CHANGES[ROOTS.get(c.model, c.model)]
    if c.head == "next":
        found["cls.output"] = "cls.seq_relationship"
    if not c.tied:
        del found["output.bias"]  # it lies beside its matrix then
    return found


def prefix(c: EncoderConfig) -> str:
    """What may stand before the encoder's names where the file has a head too."""
    return f"{ROOTS.get(c.model, c.model)}."


def build(c: EncoderConfig, b: Builder, cache: str) -> tuple[State, ...]:
    """Appends section `encode`; nothing is kept from one cycle to the next."""
    norm = Norm(c.eps, "layer")
    head = c.width // c.heads
    block = Attention(
        c.width, c.heads, c.heads, head, head, qkv_bias=True, output_bias=True, mask="full"
    )
    b.section("encode")
    x = _embedded(c, b, norm)
    for i in range(c.layers):
        at = Place(i)
        s = b.residual(at.value("s"), x, attention(b, x, block, at))
        h = b.norm(at.value("h"), s, at.weight("attn_output_norm"), c.width, norm)
        d = feed_forward(b, h, c.width, c.hidden, c.act, at, bias=True)
        s = b.residual(at.value("s'"), h, d)
        x = b.norm(at.value("x", later=1), s, at.weight("layer_output_norm"), c.width, norm)
    HEADS[c.head](c, b, x, norm)
    return ()


def _embedded(c: EncoderConfig, b: Builder, norm: Norm) -> str:
    """Tokens, positions and token types, which a request gives where they are not all 0."""
    b.input("src_ids", "src")
    b.input("src_pos", "src")
    t = b.embed("t", "token_embd", c.vocab, c.width, "src_ids")
    table = b.weight("position_embd", c.context + c.offset, c.width)
    p = b.add("embed", "p", "src_pos", table, offset=c.offset)
    e = b.residual("e", t, p)
    if c.types:
        b.input("types", "src")
        e = b.residual("e'", e, b.embed("tt", "token_types", c.types, c.width, "types"))
    return b.norm("x.0", e, "token_embd_norm", c.width, norm)


def _first(b: Builder, x: str) -> str:
    return b.add("pool", "first", x, kind="first")


def _embed(c: EncoderConfig, b: Builder, x: str, norm: Norm) -> None:
    """`embedding`, of length one where it is to be: rms of n elements times 1 / sqrt(n)."""
    parts = []
    for way in c.sentence.pooling:
        if way == "pooler":
            dense = b.linear("dense", _first(b, x), "pooler", c.width, c.width, bias=True)
            parts.append(b.add("act", "pooled", dense, kind="tanh"))
        else:
            kind = {"cls": "first"}.get(way, way)
            name = "pooled" if len(c.sentence.pooling) == 1 else f"pooled_{way}"
            parts.append(b.add("pool", name, x, kind=kind))
    whole = parts[0]
    for n, part in enumerate(parts[1:]):
        whole = b.add("concat", f"beside_{n}", (whole, part))
    if c.sentence.normalise:
        width = c.width * len(parts)
        unit = b.constant("unit", np.full(width, width**-0.5, np.float32))
        b.add("norm", "embedding", whole, unit, kind="rms", eps=TINY)


def _sequence(c: EncoderConfig, b: Builder, x: str, norm: Norm) -> None:
    h = b.linear("dense", _first(b, x), "cls", c.width, c.width, bias=True)
    h = b.add("act", "pooled", h, kind=c.before)
    b.linear("logits", h, "cls.output", len(c.labels), c.width, bias=True)


def _token(c: EncoderConfig, b: Builder, x: str, norm: Norm) -> None:
    b.linear("logits", x, "token.output", len(c.labels), c.width, bias=True)


def _answer(c: EncoderConfig, b: Builder, x: str, norm: Norm) -> None:
    """Two columns: whether an answer starts at a token, and whether it ends there."""
    b.linear("logits", x, "answer.output", 2, c.width, bias=True)


def _masked(c: EncoderConfig, b: Builder, x: str, norm: Norm) -> None:
    h = b.linear("dense", x, "masked", c.width, c.width, bias=True)
    act = "gelu" if ROOTS.get(c.model, c.model) == "roberta" else c.act
    h = b.add("act", "active", h, kind=act)
    h = b.norm("z", h, "masked_norm", c.width, norm)
    table = b.weight("token_embd" if c.tied else "output", c.vocab, c.width)
    b.add("linear", "logits", h, table, bias=b.weight("output.bias", 1, c.vocab))


HEADS = {
    "embed": _embed,
    "sequence": _sequence,
    "next": _sequence,
    "token": _token,
    "answer": _answer,
    "masked": _masked,
}
