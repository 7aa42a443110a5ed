"""The feed-forward net (`mlp`): linear layers with an activation after each but the last, which may
have one of its own. The field names are lmclock's; docs/families.md lists them.

The tensors keep the names of a torch module's state dict. Without `module_names` they are those of
nn.Sequential(Linear, activation, Linear, ...): 0, 2, 4 ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmclock.config.common import MAX_LAYERS, ModelConfig, refuse_other_uses
from lmclock.config.recurrent import HARMLESS, check_module, labels_of, scores_of
from lmclock.errors import FileError, choices
from lmclock.fields import MOST, Fields

# Names of config.json -> kinds of `act`; none: nothing is applied.
ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "silu": "silu", "tanh": "tanh",
    "sigmoid": "sigmoid", "none": "none",
}  # fmt: skip


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes."""

    family: str
    architecture: str


HF_TYPES = {"mlp": HfType("mlp", "Mlp")}


@dataclass(frozen=True, kw_only=True)
class MlpConfig(ModelConfig):
    """Layer n takes `sizes[n]` numbers to `sizes[n + 1]`, then applies `acts[n]`; `vocab` is 0,
    since the input is a row of numbers.
    """

    sizes: tuple[int, ...]
    acts: tuple[str, ...]
    bias: bool
    scores: str  # softmax, sigmoid or none: what makes scores of the outputs
    labels: tuple[str, ...]
    modules: tuple[str, ...]


def from_hf(f: Fields, model: str, name: str) -> MlpConfig:
    """The configuration in a config.json of model type mlp."""
    row = HF_TYPES[model]
    refuse_other_uses(f, (row.architecture,))
    sizes = f.take("layer_sizes")
    if not isinstance(sizes, list) or not 2 <= len(sizes) <= MAX_LAYERS + 1:
        raise f.wrong(
            "layer_sizes", sizes, "a list of widths, the input's first, such as [2, 3, 1]"
        )
    layers = len(sizes) - 1
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MOST:
            raise f.wrong("layer_sizes", size, f"integers from 1 to {MOST}")
    hidden = _each(f, "hidden_act", layers - 1, "relu")
    last = f.text("output_act", "none", ACTIVATIONS)
    named = f.has("id2label") or f.has("num_labels")
    labels = labels_of(f) if named else tuple(f"OUTPUT_{n}" for n in range(sizes[-1]))
    scores = scores_of(f, "single_label_classification" if named else "regression")
    if len(labels) != sizes[-1]:
        raise FileError(
            f"{f.where}: {len(labels)} labels, but layer_sizes ends with {sizes[-1]} outputs"
        )
    return MlpConfig(
        family=row.family, model=model, source="hf", name=name, vocab=0, context=0,
        sizes=tuple(sizes), acts=tuple(ACTIVATIONS[act] for act in (*hidden, last)),
        bias=f.flag("bias", True), scores=scores, labels=labels, modules=_modules(f, layers),
        notes=f.rest(HARMLESS, f"model_type {model}"),
    )  # fmt: skip


def _each(f: Fields, key: str, count: int, default: str) -> list[str]:
    """An activation for each of `count` layers, stated once or in a list."""
    stated = f.take(key, default)
    acts: list[Any] = stated if isinstance(stated, list) else [stated] * count
    if len(acts) != count:
        raise f.wrong(key, stated, f"one name, or {count} of them")
    for act in acts:
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise f.wrong(key, act, choices(ACTIVATIONS))
    return acts


def _modules(f: Fields, layers: int) -> tuple[str, ...]:
    """What the torch module calls each linear layer."""
    stated = f.take("module_names", [str(2 * n) for n in range(layers)])
    if isinstance(stated, Mapping) or not isinstance(stated, list) or len(stated) != layers:
        raise f.wrong("module_names", stated, f"a list of {layers} names")
    names = tuple(check_module(f, name) for name in stated)
    if len(set(names)) != layers:
        raise f.wrong("module_names", stated, "a name of its own for each layer")
    return names
