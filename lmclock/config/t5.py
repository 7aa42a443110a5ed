"""T5, its version 1.1, flan-T5 and mT5: relative positions, root-mean-square norms, no biases.

A new model type is a row of HF_TYPES.
"""

from __future__ import annotations

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

MAX_BUCKETS, MAX_DISTANCE = 1 << 12, 1 << 20


@dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Sizes in elements; `scaled` says that the output matrix gets rows divided by sqrt(width)."""

    width: int
    layers: int
    decoder_layers: int
    heads: int
    key: int
    hidden: int
    act: str
    gated: bool
    eps: float
    buckets: int
    max_distance: int
    scaled: bool


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes. `scales`: a tied embedding is scaled before it gives logits."""

    architecture: str
    projection: str
    scales: bool
    family: str = "t5"


HF_TYPES = {
    "t5": HfType("T5ForConditionalGeneration", "relu", scales=True),
    "mt5": HfType("MT5ForConditionalGeneration", "gated-gelu", scales=False),
}
_HARMLESS = (
    *SEQ2SEQ_HARMLESS, "dense_act_fn", "dropout_rate", "initializer_factor", "is_gated_act",
    "n_positions", "output_past", "scale_decoder_outputs",
)  # fmt: skip


def from_hf(f: Fields, model: str, name: str) -> T5Config:
    """The configuration in a config.json of one of HF_TYPES."""
    row = HF_TYPES[model]
    refuse_other_uses(f, (row.architecture,), causal=False)
    layers = f.integer("num_layers", high=MAX_LAYERS)
    projection = f.text("feed_forward_proj", row.projection)
    gated, act = projection.startswith("gated-"), projection.removeprefix("gated-")
    if act not in ACTIVATIONS:
        valid = (*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS))
        raise f.wrong("feed_forward_proj", projection, ", ".join(valid))
    if projection == "gated-gelu":  # what the published models mean by it
        act = "gelu_new"
    # Version 1.1 says so that its logits come from a matrix of its own, and are not scaled.
    tied = f.flag("tie_word_embeddings", True)
    scaled = f.flag("scale_decoder_outputs", tied) if row.scales else False
    config = T5Config(
        family=row.family, model=model, source="hf", name=name, vocab=f.integer("vocab_size"),
        context=0, width=f.integer("d_model"), layers=layers,
        decoder_layers=f.integer("num_decoder_layers", layers, high=MAX_LAYERS),
        heads=f.integer("num_heads", high=MAX_HEADS), key=f.integer("d_kv"),
        hidden=f.integer("d_ff"), act=ACTIVATIONS[act], gated=gated,
        eps=f.number("layer_norm_epsilon", 1e-6),
        buckets=f.integer("relative_attention_num_buckets", 32, high=MAX_BUCKETS),
        max_distance=f.integer("relative_attention_max_distance", 128, high=MAX_DISTANCE),
        scaled=scaled, bos=None, **of_target(f),
        notes=f.rest(_HARMLESS, f"model_type {model}"),
    )  # fmt: skip
    # Both ways a quarter of the buckets hold one distance each: there must be some beyond.
    if config.buckets < 4 or config.buckets % 4 or config.max_distance <= config.buckets // 2:
        raise FileError(
            f"{f.where}: {config.buckets} buckets do not share distances up to "
            f"{config.max_distance}; valid: a multiple of 4, and distances beyond its half"
        )
    return config
