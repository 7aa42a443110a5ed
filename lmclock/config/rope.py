"""Rotary positions as config.json and GGUF metadata describe them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmclock.config.common import Rope
from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.fields import REQUIRED, Fields

ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")
KINDS = ("full_attention", "sliding_attention")  # of layers, which may rotate differently
_ROPE_FIELDS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "truncate",
)  # fmt: skip


def stated_rope(f: Fields, local: bool) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """The objects that say how layers rotate: all of them, or those that see everything and then
    those with windows. transformers 5 says rope_parameters for what used to be rope_scaling,
    rope_theta and, in Gemma 3, rope_local_base_freq.
    """
    scaling, parameters = f.take("rope_scaling"), f.take("rope_parameters")
    stated = parameters or scaling or {}
    if local and isinstance(stated, Mapping) and set(stated) & set(KINDS):
        if not set(stated) <= set(KINDS):
            raise UnsupportedError(
                f"config.json: rope_parameters are of {choices(stated)}; valid: {choices(KINDS)}"
            )
        whole, windowed = (stated.get(kind) or {} for kind in KINDS)
        if isinstance(whole, Mapping) and isinstance(windowed, Mapping):
            return whole, windowed
    if not isinstance(stated, Mapping) or any(isinstance(v, Mapping) for v in stated.values()):
        raise UnsupportedError("config.json: rope_parameters must be one flat object of numbers")
    return stated, {} if local else None


def hf_rope(
    f: Fields,
    stated: Mapping[str, Any],
    head: int,
    context: int,
    theta: tuple[str, float] = ("rope_theta", 10000.0),
    part: tuple[str, float] | None = None,
) -> tuple[Rope, int]:
    """The rotation and the context it reaches. `theta`: the field that gives the base where
    `stated` does not, and its default; `part`: the same of the rotated share of a head, None where
    the model type has no such option.
    """
    r = Fields("config.json: rope_parameters", stated)
    kind = r.text("rope_type", r.text("type", "default"))
    if kind not in ROPE_SCALINGS:
        message = f"RoPE scaling {kind[:80]!r} is not supported; valid: {choices(ROPE_SCALINGS)}"
        raise UnsupportedError(message)
    base = r.number("rope_theta", f.number(*theta))
    share = r.number("partial_rotary_factor", f.number(*(part or ("partial_rotary_factor", 1.0))))
    if share != 1 and part is None:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor={share} is not an option of this model_type"
        )
    rope = Rope(int(head * min(share, 1.0)), base)
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


def gguf_rope(f: Fields, pairs: str, key: int) -> Rope:
    """llama3's scaling is not in the metadata: a tensor of factors holds it (assemble/rope.py)."""
    dims, base = f.integer("rope.dimension_count", key), f.number("rope.freq_base", 10000.0)
    factor = f.number("rope.scaling.factor", f.number("rope.scale_linear", 1.0))
    kind = f.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        message = f"RoPE scaling {kind[:80]!r} is not supported; valid: none, linear or yarn"
        raise UnsupportedError(message)
    original = f.integer("rope.scaling.original_context_length", f.integer("context_length"))
    rope = Rope(dims, base, pairs, gain=f.number("rope.scaling.attn_factor", 1.0))
    slow = f.number("rope.scaling.yarn_beta_slow", 1.0)
    fast = f.number("rope.scaling.yarn_beta_fast", 32.0)
    if kind == "none" or factor == 1:
        return rope
    rope = replace(rope, scaling=kind, factor=factor, original=original)
    if kind == "linear":
        return rope
    return replace(rope, low=slow, high=fast, gain=rope.gain * yarn_gain(factor))
