"""Encoder-decoders of plain attention and feed-forward layers: Marian, BART, mBART, and the classic
Transformer in a format of lmclock's own, which a model built on torch.nn.Transformer can be saved
in (docs/families.md).

A new model type is a row of HF_TYPES.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmclock.config.common import (
    ACTIVATIONS,
    MAX_HEADS,
    MAX_LAYERS,
    SEQ2SEQ_HARMLESS,
    ModelConfig,
    of_target,
    refuse_other_uses,
)
from lmclock.config.generation import beside
from lmclock.errors import FileError
from lmclock.fields import Fields

__all__ = ["beside", "from_hf"]

POSITIONS = ("learned", "sinusoidal")


@dataclass(frozen=True)
class Stack:
    """The sizes of the encoder or of the decoder."""

    layers: int
    heads: int
    hidden: int


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(ModelConfig):
    """An encoder and a decoder; `vocab` is the target's. Sizes in elements."""

    source_vocab: int
    width: int
    encoder: Stack
    decoder: Stack
    act: str
    eps: float
    pre_norm: bool  # each block normalises what it reads, else the sum it leaves
    last_norm: bool  # one more norm after each stack
    embed_norm: bool  # and one after the embeddings
    embed_scale: float
    positions: str  # learned or sinusoidal
    pairs: str  # sinusoidal: sines and cosines in halves of the row, or adjacent
    offset: int  # of position 0 in the table of learned positions
    shared: bool  # source and target have one embedding
    tied: bool  # the output matrix is the target's embedding
    output_bias: bool
    bias: bool  # of every projection and norm


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes; `must` are fields that older files state and that cannot differ.

    positions, pairs, offset, pre_norm, last_norm, embed_norm: as in Seq2SeqConfig
    """

    architecture: str
    positions: str
    family: str = "seq2seq"
    pairs: str = "halves"
    offset: int = 0
    pre_norm: bool = False
    last_norm: bool = False
    embed_norm: bool = False


HF_TYPES = {
    "marian": HfType("MarianMTModel", "sinusoidal"),
    "bart": HfType("BartForConditionalGeneration", "learned", offset=2, embed_norm=True),
    "mbart": HfType("MBartForConditionalGeneration", "learned", offset=2, pre_norm=True,
                    last_norm=True, embed_norm=True),
    # lmclock's own: what the others' types fix is stated in the file.
    "transformer": HfType("", "", pairs="adjacent", last_norm=True),
}  # fmt: skip
OWN_TYPE = "transformer"
_HARMLESS = (
    *SEQ2SEQ_HARMLESS, "activation_dropout", "classif_dropout", "decoder_layerdrop", "dropout",
    "encoder_layerdrop", "extra_pos_embeddings", "init_std", "num_hidden_layers", "save_step",
)  # fmt: skip
_OWN_HARMLESS = (*_HARMLESS, "dropout", "architectures", "batch_first")


def from_hf(f: Fields, model: str, name: str) -> Seq2SeqConfig:
    """The configuration in a config.json of one of HF_TYPES, or of the classic Transformer."""
    if model == OWN_TYPE:
        return _own(f, name)
    row = HF_TYPES[model]
    refuse_other_uses(f, (row.architecture,), causal=False)
    _obey(f, row)
    width, vocab = f.integer("d_model"), f.integer("vocab_size")
    shared = f.flag("share_encoder_decoder_embeddings", True)
    scaled = f.flag("scale_embedding", False)
    config = Seq2SeqConfig(
        family=row.family, model=model, source="hf", name=name,
        vocab=vocab if shared else f.integer("decoder_vocab_size", vocab), source_vocab=vocab,
        context=f.integer("max_position_embeddings", 1024), width=width,
        encoder=_stack(f, "encoder"), decoder=_stack(f, "decoder"),
        act=ACTIVATIONS[f.text("activation_function", "gelu", ACTIVATIONS)], eps=1e-5,
        pre_norm=row.pre_norm, last_norm=row.last_norm, embed_norm=row.embed_norm,
        embed_scale=math.sqrt(width) if scaled else 1.0, positions=row.positions, pairs=row.pairs,
        offset=row.offset, shared=shared, tied=f.flag("tie_word_embeddings", True),
        output_bias=True, bias=True, bos=next(iter(f.ids("bos_token_id")), None),
        **of_target(f),
        notes=f.rest((*_HARMLESS, "decoder_vocab_size"), f"model_type {model}"),
    )  # fmt: skip
    return _checked(config, f)


def _obey(f: Fields, row: HfType) -> None:
    """Files of older versions say what their model type now means; they must agree with it."""
    said = {
        "normalize_before": row.pre_norm,
        "add_final_layer_norm": row.last_norm,
        "normalize_embedding": row.embed_norm,
        "static_position_embeddings": row.positions == "sinusoidal",
        "add_bias_logits": False,
    }
    for key, meant in said.items():
        if f.flag(key, meant) != meant:
            raise f.wrong(key, not meant, f"{str(meant).lower()} in this model_type")


def _stack(f: Fields, which: str) -> Stack:
    return Stack(
        f.integer(f"{which}_layers", high=MAX_LAYERS),
        f.integer(f"{which}_attention_heads", high=MAX_HEADS),
        f.integer(f"{which}_ffn_dim"),
    )


def _own(f: Fields, name: str) -> Seq2SeqConfig:
    """Field names and defaults are torch.nn.Transformer's where it has them."""
    row = HF_TYPES[OWN_TYPE]
    width, heads = f.integer("d_model", 512), f.integer("nhead", 8, high=MAX_HEADS)
    hidden, vocab = f.integer("dim_feedforward", 2048), f.integer("vocab_size")
    layers = f.integer("num_layers", 6, high=MAX_LAYERS)
    bias = f.flag("bias", True)
    config = Seq2SeqConfig(
        family=row.family, model=OWN_TYPE, source="hf", name=name,
        vocab=vocab, source_vocab=f.integer("source_vocab_size", vocab),
        context=f.integer("max_position_embeddings", 512), width=width,
        encoder=Stack(f.integer("num_encoder_layers", layers, high=MAX_LAYERS), heads, hidden),
        decoder=Stack(f.integer("num_decoder_layers", layers, high=MAX_LAYERS), heads, hidden),
        act=ACTIVATIONS[f.text("activation", "relu", ("relu", "gelu"))],
        eps=f.number("layer_norm_eps", 1e-5), pre_norm=f.flag("norm_first", False),
        last_norm=row.last_norm, embed_norm=row.embed_norm,
        embed_scale=math.sqrt(width) if f.flag("scale_embedding", True) else 1.0,
        positions=f.text("positions", "sinusoidal", POSITIONS), pairs=row.pairs, offset=row.offset,
        shared=f.flag("shared_embeddings", True), tied=f.flag("tie_word_embeddings", True),
        output_bias=f.flag("output_bias", False), bias=bias,
        bos=next(iter(f.ids("bos_token_id")), None), **of_target(f),
        notes=f.rest(_OWN_HARMLESS, f"model_type {OWN_TYPE}"),
    )  # fmt: skip
    return _checked(config, f)


def _checked(c: Seq2SeqConfig, f: Fields) -> Seq2SeqConfig:
    """What no single field shows."""
    checks = (
        *((c.width % s.heads == 0, f"width {c.width} does not split into {s.heads} heads")
          for s in (c.encoder, c.decoder)),
        (c.start is None or c.start < c.vocab, f"token {c.start} begins a target, but the "
         f"vocabulary has {c.vocab}"),
        (not c.shared or c.vocab == c.source_vocab, f"an embedding shared by {c.source_vocab} "
         f"source and {c.vocab} target tokens"),
        (c.width % 2 == 0 or c.positions == "learned", f"sinusoidal positions of odd width "
         f"{c.width}"),
    )  # fmt: skip
    for holds, message in checks:
        if not holds:
            raise FileError(f"{f.where}: {message}")
    return c
