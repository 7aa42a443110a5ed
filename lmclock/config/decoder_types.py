"""The decoders there are: one row for each model type of Hugging Face and each GGUF architecture.

A row says what its type fixes (`fixed`: fields of DecoderConfig), what it lets a file say, and
under which names. `more` reads the options that only some types have: it gets the fields of the
file and the sizes known so far, and returns further fields of DecoderConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmclock.config.experts import Sizes, gguf_experts, mixtral_experts, qwen_experts
from lmclock.errors import UnsupportedError
from lmclock.fields import Fields

Options = dict[str, Any]


def _gpt2(f: Fields, s: Sizes) -> Options:
    """Cross-attention has no place in a decoder; what `reorder_and_upcast_attn` changes is the
    rounding of half precision only.
    """
    if f.flag("add_cross_attention", False):
        raise UnsupportedError("config.json: add_cross_attention=true is not supported")
    scale = s.key**-0.5 if f.flag("scale_attn_weights", True) else 1.0
    by_layer = f.flag("scale_attn_by_inverse_layer_idx", False)
    scales = tuple(scale / (i + 1) if by_layer else scale for i in range(s.layers))
    return {} if scales == (s.key**-0.5,) * s.layers else {"qk_scales": scales}


def _bigcode(f: Fields, s: Sizes) -> Options:
    f.flag("attention_softmax_in_fp32", True)
    f.flag("scale_attention_softmax_in_fp32", True)
    if not f.flag("multi_query", True):
        return {"fused": "interleaved"} | _gpt2(f, s)
    return {"kv_heads": 1} | _gpt2(f, s)


def _neox(f: Fields, s: Sizes) -> Options:
    return {"parallel": f.flag("use_parallel_residual", True)}


def _gemma(f: Fields, s: Sizes) -> Options:
    """`gelu` in Gemma's first files means its tanh form (transformers' GemmaConfig)."""
    f.take("hidden_activation")
    return {"act": "gelu_tanh"} if f.take("hidden_act") == "gelu" else {}


def _gemma2(f: Fields, s: Sizes) -> Options:
    return {
        "qk_scales": (f.number("query_pre_attn_scalar", 256) ** -0.5,) * s.layers,
        "softcap": _cap(f, "attn_logit_softcapping", s.softcap),
        "final_softcap": _cap(f, "final_logit_softcapping", s.final_softcap),
    }


def _cap(f: Fields, name: str, default: float) -> float:
    """A null switches the cap off, where a missing field means the default."""
    return f.number(name, 0.0 if f.has(name) else default, low=0.0)


def _granite(f: Fields, s: Sizes) -> Options:
    return {
        "qk_scales": (f.number("attention_multiplier", 1.0),) * s.layers,
        "embed_scale": f.number("embedding_multiplier", 1.0),
        "residual_scale": f.number("residual_multiplier", 1.0),
        "logits_scale": 1 / f.number("logits_scaling", 1.0),
    }


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes. A bias is True, False or the field that says."""

    family: str
    architecture: str
    context: int
    kv_heads: int | None = None  # None: as many as query heads
    head: int | None = None  # None: width / heads
    eps: float = 1e-6
    act: str = "silu"
    tied: bool = False
    window: str = "none"  # all: one for all layers; layers: qwen's; mixed: gemma's
    period: int = 0  # mixed: every period-th layer sees everything
    sliding: int = 4096
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    biased: bool = False  # what a missing field of a bias means
    rotary: bool = True  # else positions are learned
    theta: float = 10000.0
    part: float | None = None  # rotated share of a head; None: no option
    scaled: bool = False  # embeddings are, by sqrt(width)
    local: float = 0.0  # base of layers with windows; 0: they rotate as the others
    names: Mapping[str, str] = field(default_factory=dict)  # of fields, where they differ
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Fields, Sizes], Options] = lambda f, s: {}
    harmless: tuple[str, ...] = ()

    def name(self, key: str) -> str:
        return self.names.get(key, key)


LAYER_NORM: Options = {"norm": "layer", "gated": False}
GPT2_NAMES = {
    "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
}  # fmt: skip
GPT2_HARMLESS = ("attn_pdrop", "n_ctx", "reorder_and_upcast_attn")
NEOX_NAMES = {
    "rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}  # fmt: skip
GEMMA: Options = {"norm_offset": 1.0}
GEMMA2 = GEMMA | {"post_norm": True}
GEMMA3 = GEMMA2 | {"qk_norm": True}
_BIASES: Options = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
_ATTENTION_BIAS: Options = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}

HF_TYPES = {
    "llama": HfType("llama", "LlamaForCausalLM", 2048, **_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "mistral": HfType("llama", "MistralForCausalLM", 131072, kv_heads=8, window="all"),
    "mixtral": HfType("llama", "MixtralForCausalLM", 131072, kv_heads=8, eps=1e-5, window="all",
                      theta=1e6, more=mixtral_experts),
    "qwen2": HfType("llama", "Qwen2ForCausalLM", 32768, window="layers", qkv_bias=True),
    "qwen3": HfType("llama", "Qwen3ForCausalLM", 32768, head=128, window="layers",
                    **_ATTENTION_BIAS, fixed={"qk_norm": True}),
    "qwen2_moe": HfType("llama", "Qwen2MoeForCausalLM", 32768, kv_heads=16, window="layers",
                        qkv_bias="qkv_bias", biased=True, more=qwen_experts),
    "qwen3_moe": HfType("llama", "Qwen3MoeForCausalLM", 32768, kv_heads=4, window="layers",
                        **_ATTENTION_BIAS, fixed={"qk_norm": True}, more=qwen_experts),
    "gemma": HfType("llama", "GemmaForCausalLM", 8192, kv_heads=16, head=256, act="gelu_tanh",
                    tied=True, scaled=True, **_ATTENTION_BIAS, fixed=GEMMA, more=_gemma),
    "gemma2": HfType("llama", "Gemma2ForCausalLM", 8192, kv_heads=4, head=256, act="gelu_tanh",
                     tied=True, scaled=True, window="mixed", period=2,
                     **_ATTENTION_BIAS,
                     names={"hidden_act": "hidden_activation"}, harmless=("hidden_act",),
                     fixed=GEMMA2 | {"softcap": 50.0, "final_softcap": 30.0}, more=_gemma2),
    "gemma3_text": HfType("llama", "Gemma3ForCausalLM", 131072, kv_heads=4, head=256,
                          act="gelu_tanh", tied=True, scaled=True, window="mixed", period=6,
                          theta=1e6, local=10000.0, **_ATTENTION_BIAS, fixed=GEMMA3, more=_gemma2,
                          names={"hidden_act": "hidden_activation"}, harmless=("hidden_act",)),
    "phi3": HfType("llama", "Phi3ForCausalLM", 4096, eps=1e-5, window="all", part=1.0,
                   fixed={"fused": "stacked"}),
    "olmo2": HfType("llama", "Olmo2ForCausalLM", 2048, eps=1e-5, **_ATTENTION_BIAS,
                    fixed={"pre_norm": False, "post_norm": True, "qk_norm": True,
                           "qk_norm_whole": True}),
    "granite": HfType("llama", "GraniteForCausalLM", 2048, **_ATTENTION_BIAS,
                      mlp_bias="mlp_bias", more=_granite),
    "gpt2": HfType("gpt", "GPT2LMHeadModel", 1024, eps=1e-5, act="gelu_tanh", tied=True,
                   rotary=False, **_BIASES, names=GPT2_NAMES, harmless=GPT2_HARMLESS,
                   fixed=LAYER_NORM | {"fused": "stacked", "transposed": True}, more=_gpt2),
    "gpt_bigcode": HfType("gpt", "GPTBigCodeForCausalLM", 1024, eps=1e-5, act="gelu_tanh",
                          tied=True, rotary=False, **_BIASES, names=GPT2_NAMES,
                          harmless=(*GPT2_HARMLESS, "attention_softmax_in_fp32",
                                    "scale_attention_softmax_in_fp32"),
                          fixed=LAYER_NORM | {"fused": "stacked"}, more=_bigcode),
    "gpt_neox": HfType("gpt", "GPTNeoXForCausalLM", 2048, eps=1e-5, act="gelu", part=0.25,
                       **_ATTENTION_BIAS, mlp_bias=True, biased=True, names=NEOX_NAMES,
                       fixed=LAYER_NORM | {"fused": "interleaved"}, more=_neox),
}  # fmt: skip


def _gguf_gemma2(f: Fields, s: Sizes, tensors: Collection[str]) -> Options:
    """The scale of queries is not in the metadata: 1 / sqrt(head width), but in the 27B models,
    which their numbers of layers tell, 1 / sqrt(width / heads).
    """
    scale = (s.width // s.heads) ** -0.5 if s.layers in (46, 62) else 0.0
    return {
        "qk_scales": (scale,) * s.layers,
        "softcap": _cap(f, "attn_logit_softcapping", s.softcap),
        "final_softcap": _cap(f, "final_logit_softcapping", s.final_softcap),
    }


def _gguf_granite(f: Fields, s: Sizes, tensors: Collection[str]) -> Options:
    return {
        "qk_scales": (f.number("attention.scale", 0.0, low=0.0),) * s.layers,
        "embed_scale": f.number("embedding_scale", 1.0),
        "residual_scale": f.number("residual_scale", 1.0),
        "logits_scale": 1 / f.number("logit_scale", 1.0),
    }


def _gguf_neox(f: Fields, s: Sizes, tensors: Collection[str]) -> Options:
    return {"parallel": f.flag("use_parallel_residual", True)}


@dataclass(frozen=True)
class GgufType:
    """What a `general.architecture` fixes; `pairs` is the order its converter leaves q and k in."""

    family: str
    pairs: str = "halves"
    rotary: bool = True
    period: int = 1  # of windows: every period-th layer sees everything; 1: all see the window
    local: float = 0.0
    scaled: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[Fields, Sizes, Collection[str]], Options] = gguf_experts


_GELU = LAYER_NORM | {"fused": "stacked"}
_GEMMA_GGUF: Options = {"act": "gelu_tanh"}

GGUF_TYPES = {
    "llama": GgufType("llama", "adjacent"),
    "qwen2": GgufType("llama"),
    "qwen3": GgufType("llama", fixed={"qk_norm": True}),
    "qwen2moe": GgufType("llama"),
    "qwen3moe": GgufType("llama", fixed={"qk_norm": True}),
    "gemma": GgufType("llama", scaled=True, fixed=_GEMMA_GGUF),
    "gemma2": GgufType("llama", period=2, scaled=True, more=_gguf_gemma2,
                       fixed=_GEMMA_GGUF | {"post_norm": True, "softcap": 50.0,
                                            "final_softcap": 30.0}),
    "gemma3": GgufType("llama", period=6, local=10000.0, scaled=True, more=_gguf_gemma2,
                       fixed=_GEMMA_GGUF | {"post_norm": True, "qk_norm": True}),
    "phi3": GgufType("llama", fixed={"fused": "stacked"}),
    "olmo2": GgufType("llama", fixed=HF_TYPES["olmo2"].fixed),
    "granite": GgufType("llama", "adjacent", more=_gguf_granite),
    "gpt2": GgufType("gpt", rotary=False, fixed=_GELU | {"act": "gelu_tanh"}),
    "starcoder": GgufType("gpt", rotary=False, fixed=_GELU | {"act": "gelu_tanh"}),
    "gptneox": GgufType("gpt", fixed=_GELU | {"act": "gelu"}, more=_gguf_neox),
}  # fmt: skip
