"""Decoders: attention and feed-forward layers, one after the other, over one stream.

A new model type is a row of HF_TYPES and GGUF_TYPES (decoder_types.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

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
from lmclock.config.decoder_types import GGUF_TYPES, HF_TYPES, GgufType, HfType
from lmclock.config.experts import Experts, Sizes
from lmclock.config.rope import KINDS, gguf_rope, hf_rope, stated_rope
from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.fields import MOST, REQUIRED, Fields, plain


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """A decoder of attention and feed-forward layers; sizes in elements."""

    layers: int
    width: int  # of the residual stream
    heads: int
    kv_heads: int
    key: int  # width of one head's query and key
    value: int  # width of one head's value
    hidden: tuple[int, ...]  # feed-forward width of each layer
    eps: float
    rope: Rope | None  # None: positions are learned
    local_rope: Rope | None = None  # of layers with a window, where they rotate in their own way
    windows: tuple[int, ...]  # newest positions each layer sees; 0: all
    act: str = "silu"
    gated: bool = True  # the feed-forward multiplies act(gate x) by up x
    norm: str = "rms"  # or layer
    norm_offset: float = 0.0  # what the file leaves out of its norms' weights
    pre_norm: bool = True  # what attention and feed-forward read is normalised
    post_norm: bool = False  # what they give is normalised
    parallel: bool = False  # both read the layer's input
    tied: bool = False  # the output matrix is the embedding
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised on its own
    qk_norm_whole: bool = False  # q and k are normalised as a whole instead
    fused: str = "none"  # q, k and v in one tensor: stacked, or interleaved head by head
    transposed: bool = False  # matrices of the layers are stored (inputs, outputs)
    qk_scales: tuple[float, ...] = ()  # by layer; none or 0: 1 / sqrt(key)
    softcap: float = 0.0  # of attention scores; 0: none
    final_softcap: float = 0.0  # of logits
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add to the stream
    logits_scale: float = 1.0
    experts: Experts | None = None


ROUTER_HARMLESS = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
_GGUF_HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")


def from_hf(f: Fields, model: str, name: str) -> DecoderConfig:
    """The configuration in a config.json of one of HF_TYPES."""
    row = HF_TYPES[model]
    refuse_other_uses(f, (row.architecture,))
    layers = f.integer(row.name("num_hidden_layers"), high=MAX_LAYERS)
    heads = f.integer(row.name("num_attention_heads"), high=MAX_HEADS)
    width = f.integer(row.name("hidden_size"))
    context = f.integer(row.name("max_position_embeddings"), row.context)
    head = head_width(f.integer("head_dim", row.head), width, heads)
    hidden = f.integer(row.name("intermediate_size"), REQUIRED if row.rotary else 4 * width)
    rope, local, context = _hf_ropes(f, row, head, context)
    kv_heads = f.integer("num_key_value_heads", row.kv_heads or heads, high=MAX_HEADS)
    options: dict[str, Any] = {
        "family": row.family, "model": model, "source": "hf", "name": name, "layers": layers,
        "width": width, "heads": heads, "kv_heads": kv_heads, "key": head, "value": head,
        "hidden": (hidden,) * layers, "vocab": f.integer("vocab_size"), "context": context,
        "eps": f.number(row.name("rms_norm_eps"), row.eps), "rope": rope, "local_rope": local,
        "windows": _hf_windows(f, row, layers), "tied": f.flag("tie_word_embeddings", row.tied),
        "act": _activation(f, row), "qkv_bias": _bias(f, row, row.qkv_bias),
        "output_bias": _bias(f, row, row.output_bias), "mlp_bias": _bias(f, row, row.mlp_bias),
        "bos": next(iter(f.ids("bos_token_id")), None), "eos": f.ids("eos_token_id"),
        "embed_scale": width**0.5 if row.scaled else 1.0,
    }  # fmt: skip
    options |= row.fixed
    options |= row.more(f, _sizes(options))
    harmless = (*HF_HARMLESS, *ROUTER_HARMLESS, *row.harmless)
    options["notes"] = f.rest(harmless, f"model_type {model}")
    return _checked(DecoderConfig(**options), f)


def _sizes(options: dict[str, Any]) -> Sizes:
    o = options
    caps = {name: o[name] for name in ("softcap", "final_softcap") if name in o}
    return Sizes(o["layers"], o["width"], o["heads"], o["key"], o["hidden"][0], **caps)


def _activation(f: Fields, row: HfType) -> str:
    """The activation; the type's own where the field is missing, or read by `more`."""
    field = row.name("hidden_act")
    if not f.has(field) or f.take(field) is None:
        return row.act
    return ACTIVATIONS[f.text(field, valid=ACTIVATIONS)]


def _bias(f: Fields, row: HfType, which: bool | str) -> bool:
    return f.flag(which, row.biased) if isinstance(which, str) else which


def _hf_ropes(
    f: Fields, row: HfType, head: int, context: int
) -> tuple[Rope | None, Rope | None, int]:
    """(the rotation, that of layers with windows, the context)."""
    if not row.rotary:
        return None, None, context
    whole, windowed = stated_rope(f, bool(row.local))
    part = None if row.part is None else (row.name("partial_rotary_factor"), row.part)
    rope, reach = hf_rope(f, whole, head, context, (row.name("rope_theta"), row.theta), part)
    if windowed is None:
        return rope, None, reach
    local, _ = hf_rope(f, windowed, head, context, ("rope_local_base_freq", row.local))
    # Gemma 3 states the context its scaled positions reach.
    return rope, local, context


def _hf_windows(f: Fields, row: HfType, layers: int) -> tuple[int, ...]:
    """Window of each layer, 0 where it sees everything."""
    if row.window == "none":
        return (0,) * layers
    stated = f.integer("sliding_window", 0 if f.has("sliding_window") else row.sliding, low=0)
    if row.window == "all":
        return (stated,) * layers
    if row.window == "mixed":
        period = f.integer("sliding_window_pattern", row.period)
        period = f.integer("_sliding_window_pattern", period)
        usual = [KINDS[bool((i + 1) % period)] for i in range(layers)]
    else:
        stated = stated if f.flag("use_sliding_window", False) else 0
        first = f.integer("max_window_layers", 28, low=0)
        usual = [KINDS[bool(stated) and i >= first] for i in range(layers)]
    kinds = f.take("layer_types", usual)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FileError(f"config.json: layer_types must be a list of {layers} names")
    for kind in kinds:
        if kind not in KINDS:
            message = f"config.json: layer type {str(kind)[:80]!r} is not supported; valid: "
            raise UnsupportedError(message + choices(KINDS))
    if not stated and KINDS[1] in kinds:
        raise FileError("config.json: layer_types has sliding_attention but no sliding_window")
    return tuple(stated if kind == KINDS[1] else 0 for kind in kinds)


def from_gguf(g: Fields, f: Fields, model: str, tensors: Collection[str]) -> DecoderConfig:
    """The configuration in the metadata of one of GGUF_TYPES; f holds the fields of the model."""
    row = GGUF_TYPES[model]
    layers = f.integer("block_count", high=MAX_LAYERS)
    width, heads = f.integer("embedding_length"), f.same("attention.head_count", layers, MAX_HEADS)
    key = head_width(f.integer("attention.key_length", None), width, heads)
    if f.flag("attention.causal", True) is not True:
        raise UnsupportedError(f"{model}.attention.causal is false; only causal models run")
    tokens = g.count("tokenizer.ggml.tokens")
    rope = gguf_rope(f, row.pairs, key) if row.rotary else None
    eps = "attention.layer_norm_epsilon" if row.fixed.get("norm") == "layer" else None
    qkv = "blk.0.attn_qkv.bias" if row.fixed.get("fused") else "blk.0.attn_q.bias"
    options: dict[str, Any] = {
        "family": row.family, "model": model, "source": "gguf",
        "name": g.text("general.name", model), "layers": layers, "width": width, "heads": heads,
        "kv_heads": f.same("attention.head_count_kv", layers, MAX_HEADS, heads),
        "key": key, "value": f.integer("attention.value_length", key),
        "hidden": f.each("feed_forward_length", layers),
        "vocab": f.integer("vocab_size", tokens or REQUIRED),
        "context": f.integer("context_length"),
        "eps": f.number(eps or "attention.layer_norm_rms_epsilon"), "rope": rope,
        "local_rope": _gguf_local(f, row, rope), "windows": _gguf_windows(f, row, layers),
        "tied": "output.weight" not in tensors, "qkv_bias": qkv in tensors,
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos": next(iter(g.ids("tokenizer.ggml.bos_token_id")), None),
        "eos": g.ids("tokenizer.ggml.eos_token_id"),
        "embed_scale": width**0.5 if row.scaled else 1.0,
    }  # fmt: skip
    options |= row.fixed
    options |= row.more(f, _sizes(options), tensors)
    options["notes"] = f.rest(_GGUF_HARMLESS, f"architecture {model}")
    if tokens not in (0, options["vocab"]):
        stated = f"{model}.vocab_size is {options['vocab']}"
        raise FileError(f"GGUF metadata: {tokens} tokens, but {stated}")
    return _checked(DecoderConfig(**options), f)


def _gguf_local(f: Fields, row: GgufType, rope: Rope | None) -> Rope | None:
    """Layers with windows see too little to need stretched positions."""
    if not row.local or rope is None:
        return None
    base = f.number("rope.freq_base_swa", row.local)
    return replace(rope, base=base, scaling="none", factor=1.0, original=0, gain=1.0)


def _gguf_windows(f: Fields, row: GgufType, layers: int) -> tuple[int, ...]:
    """The file states which layers have a window as flags, as a period, or not at all."""
    window = f.integer("attention.sliding_window", 0, low=0)
    pattern = plain(f.take("attention.sliding_window_pattern", row.period))
    if isinstance(pattern, list):
        which = f.flags("attention.sliding_window_pattern", layers)
    else:
        period = f.integer("attention.sliding_window_pattern", row.period)
        which = tuple(period == 1 or (i + 1) % period != 0 for i in range(layers))
    return tuple(window if windowed else 0 for windowed in which)


def _checked(c: DecoderConfig, f: Fields) -> DecoderConfig:
    """What no single field shows."""
    ropes = [rope for rope in (c.rope, c.local_rope) if rope is not None]
    checks = [
        (c.heads % c.kv_heads == 0, f"{c.heads} heads do not share {c.kv_heads} key/value heads"),
        (c.context <= MOST, f"a context of {c.context} positions; valid: at most {MOST}"),
        (c.residual_scale == 1 or not (c.output_bias or c.mlp_bias),
         f"residual_multiplier={c.residual_scale} of products with biases is not supported"),
        (not c.experts or any(c.experts.sparse), "experts, but no layer that has them"),
        (not c.experts or not c.mlp_bias, "experts with biases are not supported"),
    ]  # fmt: skip
    for rope in ropes:
        checks += [
            (rope.dims % 2 == 0, f"{rope.dims} rotary dimensions are odd: they turn in pairs"),
            (0 < rope.dims <= c.key, f"{rope.dims} rotary dimensions in heads of {c.key}"),
            (rope.base > 1, f"the frequency base of RoPE is {rope.base}; valid: above 1"),
        ]
    for holds, message in checks:
        if not holds:
            raise FileError(f"{f.where}: {message}")
    return c
