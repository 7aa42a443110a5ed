"""LSTMs as `torch.nn` computes them: the language model (`lstm`) and the classifier
(`lstm_classifier`). The field names are lmclock's own, because no other library writes such a
config.json; docs/families.md lists them.

The tensors keep the names a torch module's state dict gives them. `module_names` says what the
module calls its nn.Embedding, nn.LSTM and last nn.Linear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmclock.config.common import MAX_LAYERS, ModelConfig, refuse_other_uses
from lmclock.config.encoder import SCORES
from lmclock.config.sentence import Sentence
from lmclock.errors import FileError, choices
from lmclock.fields import Fields, shown

POOLINGS = ("last", "mean", "max", "last_row")
MOST_LABELS = 1 << 16
HARMLESS = (
    "_name_or_path", "batch_first", "dropout", "dtype", "label2id", "max_length", "pad_token_id",
    "torch_dtype", "transformers_version",
)  # fmt: skip
_MODULE = re.compile(r"\w+(\.\w+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class LstmConfig(ModelConfig):
    """Layers of LSTM between an embedding and a linear layer; sizes in elements.

    `pooling` is empty for a language model, which has a row of logits for every token. A classifier
    makes one row of a text: of `last`, the state in which each direction ends (torch's h_n);
    `last_row`, the output at the last token; `mean` or `max` over all tokens.
    """

    layers: int
    embedding: int
    hidden: int
    bidirectional: bool = False
    bias: bool = True  # of the LSTM
    output_bias: bool = True
    tied: bool = False  # the output matrix is the embedding
    pooling: str = ""
    labels: tuple[str, ...] = ()
    # What encode/ asks of any model that classifies texts (config/encoder.py).
    head: str = ""  # sequence, of a classifier
    scores: str = "softmax"
    types: int = 0
    sentence: Sentence = field(default_factory=Sentence)
    modules: tuple[str, str, str] = ("embedding", "lstm", "output")


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes."""

    family: str
    architecture: str
    classifies: bool = False


HF_TYPES = {
    "lstm": HfType("lstm", "LstmForCausalLM"),
    "lstm_classifier": HfType("lstm", "LstmForSequenceClassification", classifies=True),
}


def from_hf(f: Fields, model: str, name: str) -> LstmConfig:
    """The configuration in a config.json of one of HF_TYPES."""
    row = HF_TYPES[model]
    refuse_other_uses(f, (row.architecture,))
    hidden = f.integer("hidden_size")
    config = LstmConfig(
        family=row.family, model=model, source="hf", name=name, vocab=f.integer("vocab_size"),
        context=f.integer("max_position_embeddings", 0, low=0),
        layers=f.integer("num_layers", 1, high=MAX_LAYERS),
        embedding=f.integer("embedding_size", hidden), hidden=hidden,
        bias=f.flag("bias", True), output_bias=f.flag("output_bias", True),
        tied=False if row.classifies else f.flag("tie_word_embeddings", False),
        bos=next(iter(f.ids("bos_token_id")), None), eos=f.ids("eos_token_id"),
        modules=_modules(f), **(_head(f) if row.classifies else {}),
        notes=f.rest(HARMLESS, f"model_type {model}"),
    )  # fmt: skip
    if config.tied and config.embedding != hidden:
        raise FileError(
            f"config.json: tie_word_embeddings needs an embedding_size of {hidden}, the "
            f"hidden_size; it is {config.embedding}"
        )
    return config


def _head(f: Fields) -> dict[str, Any]:
    """What only a classifier may say."""
    return {
        "head": "sequence",
        "scores": scores_of(f, "single_label_classification"),
        "bidirectional": f.flag("bidirectional", False),
        "pooling": f.text("pooling", "last", POOLINGS),
        "labels": labels_of(f),
    }


def scores_of(f: Fields, default: str) -> str:
    """What makes scores of logits: softmax, a sigmoid for each where labels do not exclude each
    other, nothing for a regression.
    """
    return SCORES[f.text("problem_type", default, SCORES)]


def labels_of(f: Fields) -> tuple[str, ...]:
    """The names of `id2label`, in order of their numbers; LABEL_0 ... where only `num_labels` or
    nothing (which means two) is stated.
    """
    count, stated = f.integer("num_labels", None, high=MOST_LABELS), f.take("id2label")
    if stated is None:
        return tuple(f"LABEL_{n}" for n in range(count or 2))
    if not isinstance(stated, Mapping) or not 0 < len(stated) <= MOST_LABELS:
        raise f.wrong("id2label", stated, 'an object of number and name, such as {"0": "bad"}')
    labels = []
    for number in range(len(stated)):
        label = stated.get(str(number))
        if not isinstance(label, str):
            raise FileError(
                f"{f.where}: id2label holds {len(stated)} names, but that of number {number} is "
                f"{shown(label)!r}; valid: a name for each of 0 to {len(stated) - 1}"
            )
        labels.append(shown(label))
    if count not in (None, len(labels)):
        raise f.wrong("num_labels", count, f"{len(labels)}, the names in id2label")
    return tuple(labels)


def _modules(f: Fields) -> tuple[str, str, str]:
    """What the torch module calls its embedding, LSTM and output layer."""
    names = dict(zip(("embedding", "lstm", "output"), LstmConfig.modules, strict=True))
    stated = f.take("module_names", {})
    if not isinstance(stated, Mapping) or not stated.keys() <= names.keys():
        raise f.wrong("module_names", stated, f"an object with {choices(names)}")
    names |= {key: check_module(f, name) for key, name in stated.items()}
    return names["embedding"], names["lstm"], names["output"]


def check_module(f: Fields, name: object) -> str:
    """A module's name in a state dict, such as `net.0`."""
    if not isinstance(name, str) or not _MODULE.fullmatch(name):
        raise f.wrong("module_names", name, "names of letters, digits, _ and dots")
    return name
