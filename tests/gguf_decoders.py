"""Hugging Face folders of decoders written as GGUF, as llama.cpp's converters do it: names by the
gguf package's own map, and the permutations and sums each architecture's files have.

    write_gguf(folder, path, quant="q8_0")      # the folder's matrices are rounded likewise
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

ARCHITECTURES = {
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
    "gpt_neox": "gptneox", "gpt_bigcode": "starcoder",
}  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def write_gguf(folder: Path, path: Path, quant: str = "f32", **changes: Any) -> None:
    """The folder's model as GGUF. With a quantised format its matrices, whose rows can be rounded
    again to the same numbers, are replaced by what the file holds. `changes`: metadata that differs
    (None: left out).
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if quant != "f32":
        tensors = {name: _rounded(config, name, x, quant) for name, x in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = config["model_type"]
    arch = ARCHITECTURES.get(model, model)
    writer = gguf.GGUFWriter(path, arch)
    keys = _sizes(config) | MORE.get(model, lambda c: {})(config) | changes
    for key, value in keys.items():
        _add(writer, f"{arch}.{key}", value)
    # Dense layers of models with experts have the names of other models' layers.
    numbers = [next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == a)
               for a in (arch, "llama")]  # fmt: skip
    maps = [gguf.get_tensor_name_map(number, keys["block_count"]) for number in numbers]
    for name, x in _merged(tensors).items():
        found = _converted(config, arch, name, x)
        found_names = (m.get_name(name, try_suffixes=(".weight", ".bias")) for m in maps)
        target = next(filter(None, found_names))
        if found.ndim > 1 and quant != "f32" and _is_rounded(name, found):
            kind = gguf.GGMLQuantizationType[quant.upper()]
            writer.add_tensor(target, gguf.quants.quantize(found, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, found)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):  # fmt: skip
        write()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _first(c: dict[str, Any], *names: str) -> Any:
    return next((c[name] for name in names if c.get(name) is not None), None)


def _sizes(c: dict[str, Any]) -> dict[str, Any]:
    """What every converter writes."""
    width, heads = _first(c, "hidden_size", "n_embd"), _first(c, "num_attention_heads", "n_head")
    layer_norm = _first(c, "layer_norm_epsilon", "layer_norm_eps")
    eps = "layer_norm_epsilon" if layer_norm else "layer_norm_rms_epsilon"
    sizes = {
        "block_count": _first(c, "num_hidden_layers", "n_layer"), "vocab_size": c["vocab_size"],
        "context_length": _first(c, "max_position_embeddings", "n_positions"),
        "embedding_length": width, "attention.head_count": heads,
        "feed_forward_length": _first(c, "intermediate_size", "n_inner") or 4 * width,
        f"attention.{eps}": layer_norm or c.get("rms_norm_eps"),
    }  # fmt: skip
    if "num_key_value_heads" in c:
        sizes["attention.head_count_kv"] = c["num_key_value_heads"]
    if c.get("head_dim"):
        sizes |= {"attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"]}
    rope = c.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if rope:
        sizes["rope.freq_base"] = float(rope["rope_theta"])
        head = c.get("head_dim") or width // heads
        sizes["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    if rope.get("rope_type") == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if c.get("sliding_window"):
        sizes["attention.sliding_window"] = c["sliding_window"]
    return sizes


def _caps(c: dict[str, Any]) -> dict[str, Any]:
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    return {name: c[name] for name in names if c.get(name)}


def _moe(c: dict[str, Any]) -> dict[str, Any]:
    found = {
        "expert_count": _first(c, "num_experts", "num_local_experts"),
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
    }
    return {key: value for key, value in found.items() if value}


MORE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "mixtral": _moe,
    "qwen2_moe": _moe,
    "qwen3_moe": _moe,
    "gemma2": _caps,
    "gemma3_text": _caps,
    "gpt_neox": lambda c: {"use_parallel_residual": c["use_parallel_residual"]},
    "gpt_bigcode": lambda c: {"attention.head_count_kv": 1},
    "granite": lambda c: {
        "attention.scale": c["attention_multiplier"], "logit_scale": c["logits_scaling"],
        "embedding_scale": c["embedding_multiplier"], "residual_scale": c["residual_multiplier"],
    },
}  # fmt: skip


def _merged(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of a layer in one tensor, under a name the gguf package knows."""
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, x in tensors.items():
        match = _EXPERT.fullmatch(name)
        if not match:
            found[name] = x
            continue
        stem, number, which = match.groups()
        if which in ("w1", "w2", "w3"):
            stem = stem.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
        experts.setdefault(f"{stem}.{which}.weight", {})[int(number)] = x
    for name, each in experts.items():
        found[name] = np.stack([each[number] for number in sorted(each)])
    return found


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in llama's GGUF order: dimension j beside dimension j + half."""
    halves = w.reshape(heads, 2, -1, *w.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w.shape)


def _is_conv1d(c: dict[str, Any], name: str) -> bool:
    stems = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return c["model_type"] == "gpt2" and name.endswith(stems)


def _converted(c: dict[str, Any], arch: str, name: str, x: np.ndarray) -> np.ndarray:
    """A tensor as its architecture's converter leaves it."""
    if _is_conv1d(c, name):
        return np.ascontiguousarray(x.T)
    if arch in ("llama", "granite") and (which := name.split(".")[-2]) in ("q_proj", "k_proj"):
        key = "num_attention_heads" if which == "q_proj" else "num_key_value_heads"
        return interleave(x, c[key])
    if arch == "gptneox" and ".query_key_value." in name:
        heads = x.reshape(c["num_attention_heads"], 3, -1, *x.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(x.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return x + np.float32(1)
    return x[0] if name.endswith("shared_expert_gate.weight") else x


def _is_rounded(name: str, x: np.ndarray) -> bool:
    """Converters keep routers and tables of positions in f32."""
    router = name.endswith(("mlp.gate.weight", "moe.gate.weight", "expert_gate.weight"))
    return x.shape[-1] % 32 == 0 and not router and "wpe" not in name


def _rounded(c: dict[str, Any], name: str, x: np.ndarray, quant: str) -> np.ndarray:
    """The numbers that rounding to `quant` leaves of a matrix, in the file's own order."""
    turned = x.T if _is_conv1d(c, name) else x
    if x.ndim < 2 or not _is_rounded(name, turned):
        return x
    kind = gguf.GGMLQuantizationType[quant.upper()]
    packed = gguf.quants.quantize(np.ascontiguousarray(turned), kind)
    found = gguf.quants.dequantize(packed, kind)
    return np.ascontiguousarray(found.T if _is_conv1d(c, name) else found)
