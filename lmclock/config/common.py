"""What all configurations have in common: `ModelConfig`, `Rope`, look-ups translators share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmclock.config.generation import Generation, generation
from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.fields import Fields

MAX_LAYERS = 4096  # a bound on what a hostile file can make us allocate
MAX_HEADS = 1 << 16


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `dims` of each head rotate in pairs, pair j by position * base^(-2j/dims).

    Scaling stretches the positions by `factor`: all pairs (linear), or those that turn less than
    `low` times over the `original` context in full, those that turn more than `high` times not at
    all, and a blend between (llama3: in turns, yarn: in pair number). `gain` multiplies the result.
    """

    dims: int
    base: float = 10000.0
    pairs: str = "halves"  # or adjacent
    scaling: str = "none"  # or linear, llama3, yarn
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    truncate: bool = True  # yarn: the blend begins and ends at whole pairs
    gain: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the rest of lmclock asks of any model; each family adds its own sizes and options."""

    family: str  # the file of assemble/
    model: str  # what the file calls it: llama, mistral, qwen2 ...
    source: str  # hf or gguf: whose tensor names the file uses
    name: str
    vocab: int
    context: int
    bos: int | None = None
    eos: tuple[int, ...] = ()
    start: int | None = None  # the token that begins a target, of models with an encoder
    generation: Generation = field(default_factory=Generation)  # of models with an encoder
    notes: tuple[str, ...] = field(default=(), compare=False)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

# Fields that say nothing of a forward pass, or repeat what the tensors say.
HF_HARMLESS = (
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attention_dropout",
    "attn_implementation", "chunk_size_feed_forward", "dtype", "embd_pdrop", "hidden_dropout",
    "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id",
    "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "pruned_heads", "resid_pdrop", "torch_dtype", "transformers_version",
    "use_cache",
)  # fmt: skip

# What config.json files say of generation besides: config/generation.py reads what it needs.
GENERATION = (
    "bad_words_ids", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "prefix",
    "remove_invalid_values", "repetition_penalty", "task_specific_params", "temperature", "top_k",
    "top_p", "typical_p",
)  # fmt: skip


# Fields of encoder-decoders that say nothing of a forward pass.
SEQ2SEQ_HARMLESS = (
    *HF_HARMLESS, *GENERATION, "classifier_dropout", "gradient_checkpointing", "is_encoder_decoder",
    "tokenizer_class",
)  # fmt: skip


def of_target(f: Fields) -> dict[str, Any]:
    """Fields of ModelConfig that say how a target begins, ends, and is searched for. Models whose
    files do not say begin it with the padding token.
    """
    start = next(iter(f.ids("decoder_start_token_id") or f.ids("pad_token_id")), None)
    return {"start": start, "eos": f.ids("eos_token_id"), "generation": generation(f)}


def refuse_other_uses(f: Fields, architectures: tuple[str, ...], causal: bool = True) -> str:
    """The one architecture of `architectures` that a config.json names, the first where it names
    none; UnsupportedError for other uses of the same model type, and for quantised weights.
    """
    names = f.take("architectures")
    found = [name for name in architectures if isinstance(names, list) and name in names]
    if names and not found:
        raise UnsupportedError(
            f"config.json: architectures {str(names)[:80]} is not supported; "
            f"valid: {choices(architectures)}"
        )
    if causal and f.take("is_causal", True) is not True:
        raise UnsupportedError("config.json: is_causal is not true; only causal models run")
    quantised = f.take("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise UnsupportedError(
            f"config.json: weights quantised by {str(method)[:80]!r} are not supported; "
            "valid: plain safetensors, or a GGUF file"
        )
    return (found or list(architectures))[0]


def head_width(stated: int | None, width: int, heads: int) -> int:
    if stated is None and width % heads:
        raise FileError(f"width {width} does not split into {heads} heads, and no other is stated")
    return stated or width // heads
