"""Decoders of rotary attention and gated feed-forward: Llama, Mistral, SmolLM2, Qwen2, Qwen3.

A new model type is a row of HF_TYPES and GGUF_TYPES.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lmclock.config.common import (
    ACTIVATIONS,
    HF_HARMLESS,
    MAX_HEADS,
    MAX_LAYERS,
    ModelConfig,
    Rope,
    head_width,
    refuse_other_uses,
)
from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.fields import MOST, REQUIRED, Fields


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """A decoder of attention and gated feed-forward layers; sizes in elements."""

    layers: int
    width: int  # of the residual stream
    heads: int
    kv_heads: int
    key: int  # width of one head's query and key
    value: int  # width of one head's value
    hidden: tuple[int, ...]  # feed-forward width of each layer
    eps: float
    rope: Rope
    windows: tuple[int, ...]  # newest positions each layer sees; 0: all
    act: str = "silu"
    tied: bool = False  # the output matrix is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised on its own


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes. A bias is True, False or the field that says; None: no default."""

    family: str
    architecture: str
    context: int
    kv_heads: int | None = None
    head: int | None = None
    window: str = "none"  # one for all layers, or by layers
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    partial: bool = False  # partial_rotary_factor is obeyed


HF_TYPES = {
    "llama": HfType("llama", "LlamaForCausalLM", 2048, qkv_bias="attention_bias",
                    output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": HfType("llama", "MistralForCausalLM", 131072, kv_heads=8, window="all"),
    "qwen2": HfType("llama", "Qwen2ForCausalLM", 32768, window="layers", qkv_bias=True),
    "qwen3": HfType("llama", "Qwen3ForCausalLM", 32768, head=128, window="layers",
                    qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
}  # fmt: skip


@dataclass(frozen=True)
class GgufType:
    """What a `general.architecture` fixes; `pairs` is the order its converter leaves q and k in."""

    family: str
    pairs: str
    qk_norm: bool = False


GGUF_TYPES = {
    "llama": GgufType("llama", "adjacent"),
    "qwen2": GgufType("llama", "halves"),
    "qwen3": GgufType("llama", "halves", qk_norm=True),
}

_GGUF_HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")


def from_hf(f: Fields, model: str, name: str) -> DecoderConfig:
    """The configuration in a config.json of one of HF_TYPES."""
    row = HF_TYPES[model]
    refuse_other_uses(f, (row.architecture,))
    layers = f.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = f.integer("num_attention_heads", high=MAX_HEADS)
    width, context = f.integer("hidden_size"), f.integer("max_position_embeddings", row.context)
    head = head_width(f.integer("head_dim", row.head), width, heads)
    rope, context = _hf_rope(f, row, head, context)
    kv_heads = f.integer("num_key_value_heads", row.kv_heads or heads, high=MAX_HEADS)
    config = DecoderConfig(
        family=row.family, model=model, source="hf", name=name, layers=layers, width=width,
        heads=heads, kv_heads=kv_heads, key=head, value=head,
        hidden=(f.integer("intermediate_size"),) * layers, vocab=f.integer("vocab_size"),
        context=context, eps=f.number("rms_norm_eps", 1e-6), rope=rope,
        windows=_hf_windows(f, row, layers),
        act=ACTIVATIONS[f.text("hidden_act", "silu", ACTIVATIONS)],
        tied=f.flag("tie_word_embeddings", False),
        qkv_bias=_bias(f, row.qkv_bias), output_bias=_bias(f, row.output_bias),
        mlp_bias=_bias(f, row.mlp_bias), qk_norm=row.qk_norm,
        bos=next(iter(f.ids("bos_token_id")), None), eos=f.ids("eos_token_id"),
        notes=f.rest(HF_HARMLESS, f"model_type {model}"),
    )  # fmt: skip
    return _checked(config, f)


def _bias(f: Fields, which: bool | str) -> bool:
    return f.flag(which, False) if isinstance(which, str) else which


def _hf_windows(f: Fields, row: HfType, layers: int) -> tuple[int, ...]:
    """Window of each layer, 0 where it sees everything."""
    if row.window == "none":
        return (0,) * layers
    stated = f.integer("sliding_window", None if f.has("sliding_window") else 4096)
    if row.window == "all":
        return (stated or 0,) * layers
    if not f.flag("use_sliding_window", False):
        stated = None
    first = f.integer("max_window_layers", 28, low=0)
    kinds = f.take("layer_types")
    if kinds is None:
        return tuple((stated or 0) if i >= first else 0 for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FileError(f"config.json: layer_types must be a list of {layers} names")
    valid = ("full_attention", "sliding_attention")
    for kind in kinds:
        if kind not in valid:
            message = f"config.json: layer type {str(kind)[:80]!r} is not supported; valid: "
            raise UnsupportedError(message + choices(valid))
    if stated is None and valid[1] in kinds:
        raise FileError("config.json: layer_types has sliding_attention but no sliding_window")
    return tuple((stated or 0) if kind == valid[1] else 0 for kind in kinds)


ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")
_ROPE_FIELDS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "truncate",
)  # fmt: skip


def _hf_rope(f: Fields, row: HfType, head: int, context: int) -> tuple[Rope, int]:
    """The rotation and the context it reaches. transformers 5 says rope_parameters for what used
    to be rope_scaling and rope_theta.
    """
    scaling, parameters = f.take("rope_scaling"), f.take("rope_parameters")
    stated = parameters or scaling or {}
    if not isinstance(stated, Mapping) or any(isinstance(v, Mapping) for v in stated.values()):
        raise UnsupportedError("config.json: rope_parameters must be one flat object of numbers")
    r = Fields("config.json: rope_parameters", stated)
    kind = r.text("rope_type", r.text("type", "default"))
    if kind not in ROPE_SCALINGS:
        message = f"RoPE scaling {kind[:80]!r} is not supported; valid: {choices(ROPE_SCALINGS)}"
        raise UnsupportedError(message)
    base = r.number("rope_theta", f.number("rope_theta", 10000.0))
    part = r.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0))
    if part != 1 and not row.partial:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor={part} is not an option of this model_type"
        )
    rope = Rope(int(head * min(part, 1.0)), base)
    original = r.integer("original_max_position_embeddings", context)
    original = f.integer("original_max_position_embeddings", original)
    r.rest(_ROPE_FIELDS, f"rope_type {kind}")
    if kind == "default":
        return rope, context
    factor = r.number("factor", context / original if kind == "yarn" else REQUIRED)
    rope = replace(rope, scaling=kind, factor=factor, original=original)
    if kind == "linear":
        return rope, int(context * factor)
    if kind == "llama3":
        low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
        if low >= high:
            raise FileError(f"config.json: low_freq_factor={low} is not below {high}, the high one")
        return replace(rope, low=low, high=high), context
    return _hf_yarn(r, rope), max(context, int(original * factor))


def _hf_yarn(r: Fields, rope: Rope) -> Rope:
    """`gain` as Peng et al. 2023 (YaRN, section 3.4) propose, unless the file states it."""
    slow, fast = r.number("beta_slow", 1.0), r.number("beta_fast", 32.0)
    part, whole = r.number("mscale", 0.0, low=0.0), r.number("mscale_all_dim", 0.0, low=0.0)
    gain = yarn_gain(rope.factor)
    if part and whole:
        gain = yarn_gain(rope.factor, part) / yarn_gain(rope.factor, whole)
    gain = r.number("attention_factor", gain)
    return replace(rope, low=slow, high=fast, truncate=r.flag("truncate", True), gain=gain)


def yarn_gain(factor: float, part: float = 1.0) -> float:
    """1 + 0.1 ln(factor): sharper attention makes up for stretched positions."""
    return 0.1 * part * math.log(factor) + 1.0 if factor > 1 else 1.0


def from_gguf(g: Fields, f: Fields, model: str, tensors: Collection[str]) -> DecoderConfig:
    """The configuration in the metadata of one of GGUF_TYPES; f holds the fields of the model."""
    row = GGUF_TYPES[model]
    layers = f.integer("block_count", high=MAX_LAYERS)
    width, heads = f.integer("embedding_length"), f.same("attention.head_count", layers, MAX_HEADS)
    key = head_width(f.integer("attention.key_length", None), width, heads)
    if f.flag("attention.causal", True) is not True:
        raise UnsupportedError(f"{model}.attention.causal is false; only causal models run")
    tokens = g.count("tokenizer.ggml.tokens")
    config = DecoderConfig(
        family=row.family, model=model, source="gguf", name=g.text("general.name", model),
        layers=layers, width=width, heads=heads,
        kv_heads=f.same("attention.head_count_kv", layers, MAX_HEADS, heads),
        key=key, value=f.integer("attention.value_length", key),
        hidden=f.each("feed_forward_length", layers),
        vocab=f.integer("vocab_size", tokens or REQUIRED), context=f.integer("context_length"),
        eps=f.number("attention.layer_norm_rms_epsilon"), rope=_gguf_rope(f, row, key),
        windows=_gguf_windows(f, layers), tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors, output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors, qk_norm=row.qk_norm,
        bos=next(iter(g.ids("tokenizer.ggml.bos_token_id")), None),
        eos=g.ids("tokenizer.ggml.eos_token_id"),
        notes=f.rest(_GGUF_HARMLESS, f"architecture {model}"),
    )  # fmt: skip
    if tokens not in (0, config.vocab):
        message = f"GGUF metadata: {tokens} tokens, but {model}.vocab_size is {config.vocab}"
        raise FileError(message)
    return _checked(config, f)


def _gguf_windows(f: Fields, layers: int) -> tuple[int, ...]:
    window = f.integer("attention.sliding_window", 0, low=0)
    which = f.flags("attention.sliding_window_pattern", layers)
    return tuple(window if windowed else 0 for windowed in which)


def _gguf_rope(f: Fields, row: GgufType, key: int) -> Rope:
    """llama3's scaling is not in the metadata: a tensor of factors holds it (assemble/rope.py)."""
    dims, base = f.integer("rope.dimension_count", key), f.number("rope.freq_base", 10000.0)
    factor = f.number("rope.scaling.factor", f.number("rope.scale_linear", 1.0))
    kind = f.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        message = f"RoPE scaling {kind[:80]!r} is not supported; valid: none, linear or yarn"
        raise UnsupportedError(message)
    original = f.integer("rope.scaling.original_context_length", f.integer("context_length"))
    rope = Rope(dims, base, row.pairs, gain=f.number("rope.scaling.attn_factor", 1.0))
    slow = f.number("rope.scaling.yarn_beta_slow", 1.0)
    fast = f.number("rope.scaling.yarn_beta_fast", 32.0)
    if kind == "none" or factor == 1:
        return rope
    rope = replace(rope, scaling=kind, factor=factor, original=original)
    if kind == "linear":
        return rope
    return replace(rope, low=slow, high=fast, gain=rope.gain * yarn_gain(factor))


def _checked(c: DecoderConfig, f: Fields) -> DecoderConfig:
    """What no single field shows."""
    checks = (
        (c.heads % c.kv_heads == 0, f"{c.heads} heads do not share {c.kv_heads} key/value heads"),
        (c.rope.dims % 2 == 0, f"{c.rope.dims} rotary dimensions are odd: they turn in pairs"),
        (0 < c.rope.dims <= c.key, f"{c.rope.dims} rotary dimensions in heads of {c.key}"),
        (c.context <= MOST, f"a context of {c.context} positions; valid: at most {MOST}"),
        (c.rope.base > 1, f"the frequency base of RoPE is {c.rope.base}; valid: above 1"),
    )
    for holds, message in checks:
        if not holds:
            raise FileError(f"{f.where}: {message}")
    return c
