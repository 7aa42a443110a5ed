"""Mixtures of experts as config.json and GGUF metadata describe them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lmclock.errors import FileError, UnsupportedError
from lmclock.fields import REQUIRED, Fields

MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Experts:
    """The feed-forward of layers where `sparse` is true: the best `top` of `count` experts, each
    `hidden` wide, and one of width `shared` that every row takes (0: none).
    """

    count: int
    top: int
    hidden: int
    sparse: tuple[bool, ...]
    renorm: bool = True  # the chosen experts' probabilities sum to one
    shared: int = 0


@dataclass(frozen=True)
class Sizes:
    """What is known of a decoder when the options of its type are read."""

    layers: int
    width: int
    heads: int
    key: int
    hidden: int  # feed-forward width of the first layer
    softcap: float = 0.0  # what the type takes for granted
    final_softcap: float = 0.0


def mixtral_experts(f: Fields, s: Sizes) -> dict[str, Any]:
    count, top = _counts(f, "num_local_experts", 8, 2)
    return {"experts": Experts(count, top, s.hidden, (True,) * s.layers)}


def qwen_experts(f: Fields, s: Sizes) -> dict[str, Any]:
    """Every decoder_sparse_step-th layer has experts, but those in mlp_only_layers."""
    name = "num_local_experts" if f.has("num_local_experts") else "num_experts"
    count, top = _counts(f, name)
    step, dense = f.integer("decoder_sparse_step", 1), f.take("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise f.wrong("mlp_only_layers", dense, "a list of layer numbers")
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(s.layers))
    return {
        "experts": Experts(
            count, top, f.integer("moe_intermediate_size"), sparse,
            renorm=f.flag("norm_topk_prob", False),
            shared=f.integer("shared_expert_intermediate_size", 0, low=0),
        )
    }  # fmt: skip


def _counts(f: Fields, count: str, many: Any = REQUIRED, few: Any = REQUIRED) -> tuple[int, int]:
    """(experts, those a row takes); FileError where they do not fit each other."""
    number: int = f.integer(count, many, high=MAX_EXPERTS)
    top: int = f.integer("num_experts_per_tok", few)
    if top > number:
        raise FileError(f"{f.where}: num_experts_per_tok={top} of {number} experts")
    return number, top


# A file may state what its architecture fixes anyway: 1 is softmax over all experts.
_SOFTMAX = 1
_RENORM = {"llama.": True, "qwen2moe.": False, "qwen3moe.": True}


def gguf_experts(f: Fields, s: Sizes, tensors: Collection[str]) -> dict[str, Any]:
    """GGUF states which layers have experts by their tensors only."""
    count = f.integer("expert_count", 0, low=0, high=MAX_EXPERTS)
    if not count:
        return {}
    if f.prefix not in _RENORM:
        raise UnsupportedError(f"{f.where}: {f.prefix}expert_count={count} is not supported")
    top = f.integer("expert_used_count")
    if top > count:
        raise FileError(f"{f.where}: {f.prefix}expert_used_count={top} of {count} experts")
    gating = f.integer("expert_gating_func", _SOFTMAX, low=0)
    if gating not in (0, _SOFTMAX):
        raise UnsupportedError(
            f"{f.where}: {f.prefix}expert_gating_func={gating} is not supported; valid: 1, softmax"
        )
    own = f.prefix != "llama."
    hidden = f.integer("expert_feed_forward_length", s.hidden // top if own else s.hidden)
    shared = any(name.endswith("ffn_gate_inp_shexp.weight") for name in tensors)
    sparse = tuple(f"blk.{i}.ffn_gate_inp.weight" in tensors for i in range(s.layers))
    return {
        "experts": Experts(
            count, top, hidden, sparse,
            renorm=f.flag("expert_weights_norm", _RENORM[f.prefix]),
            shared=f.integer("expert_shared_feed_forward_length", s.hidden) if shared else 0,
        )
    }  # fmt: skip
