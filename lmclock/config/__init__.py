"""`ModelConfig`: what a model is, in lmclock's own words, from either format's description of it.

    from_hf(json.load(file), name)           the config.json of a Hugging Face folder
    from_gguf(metadata, tensor_names)        the metadata of a GGUF file

Only this folder knows the field names of others. It takes plain mappings, never opens a file, and
believes nothing: a missing, mistyped or impossible value is a FileError that names it, and an
option this build lacks is an UnsupportedError. A field nobody asked for is refused when it may
change the arithmetic, and otherwise listed once in `notes`. HF_TYPES and GGUF_TYPES name the file
that translates a model type; it holds the options of the type in tables of the same names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from lmclock.config.common import ModelConfig, Rope
from lmclock.errors import UnsupportedError, choices
from lmclock.fields import Fields

__all__ = ["GGUF_TYPES", "HF_TYPES", "ModelConfig", "Rope", "from_gguf", "from_hf"]

HF_TYPES = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma",
         "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "gpt2", "gpt_bigcode", "gpt_neox"),
        "decoder",
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "distilbert"), "encoder"),
    **dict.fromkeys(("lstm", "lstm_classifier"), "recurrent"),
    "mlp": "mlp",
    **dict.fromkeys(("marian", "bart", "mbart", "transformer"), "seq2seq"),
    **dict.fromkeys(("t5", "mt5"), "t5"),
}  # fmt: skip
GGUF_TYPES = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3",
         "olmo2", "granite", "gpt2", "starcoder", "gptneox"),
        "decoder",
    ),
    "bert": "encoder",
}  # fmt: skip


def from_hf(
    data: Mapping[str, Any], name: str = "", read: Callable[[str], Any] | None = None
) -> ModelConfig:
    """The configuration in a Hugging Face config.json, parsed; `read(name)` gives the JSON of a
    file beside it, or None. A translator's `beside(config, read)` says what those files change.
    """
    f = Fields("config.json", data)
    if f.take("auto_map") is not None:
        raise UnsupportedError("config.json has auto_map: remote code is never run by lmclock")
    model = f.text("model_type")
    if model not in HF_TYPES:
        message = f"model_type {model[:80]!r} is not supported; valid: {choices(HF_TYPES)}"
        raise UnsupportedError(message)
    translator = _translator(HF_TYPES[model])
    config: ModelConfig = translator.from_hf(f, model, name)
    if read is not None and hasattr(translator, "beside"):
        config = replace(config, **translator.beside(config, read))
    return config


def from_gguf(metadata: Mapping[str, Any], tensors: Collection[str] = ()) -> ModelConfig:
    """The configuration in GGUF metadata. `tensors` are the names in the file: GGUF states optional
    parts (biases, an output matrix of its own) by their presence only.
    """
    g = Fields("GGUF metadata", metadata)
    model = g.text("general.architecture")
    if model not in GGUF_TYPES:
        message = f"architecture {model[:80]!r} is not supported; valid: {choices(GGUF_TYPES)}"
        raise UnsupportedError(message)
    f = Fields("GGUF metadata", metadata, f"{model}.")
    config: ModelConfig = _translator(GGUF_TYPES[model]).from_gguf(g, f, model, tensors)
    return config


def _translator(name: str) -> Any:
    return importlib.import_module(f"lmclock.config.{name}")
