"""Encoders of bidirectional attention: BERT, MiniLM, RoBERTa, XLM-RoBERTa, DistilBERT.

A new model type is a row of HF_TYPES. The architecture that a config.json names chooses the head;
files of sentence-transformers beside it say how rows become one embedding (config/sentence.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lmclock.config.common import (
    ACTIVATIONS,
    HF_HARMLESS,
    MAX_HEADS,
    MAX_LAYERS,
    ModelConfig,
    refuse_other_uses,
)
from lmclock.config.sentence import POOLINGS, Sentence, from_folder
from lmclock.errors import FileError, OptionError, UnsupportedError, choices
from lmclock.fields import REQUIRED, Fields

MAX_LABELS = 1 << 16
HEADS = ("embed", "masked", "sequence", "next", "token", "answer")
# What a sequence head does to the first row before its classifier: "" nothing.
BEFORE = ("", "tanh", "relu")
NEXT = ("next", "random")  # classes of head `next`: the second text follows the first, or not
# How class logits become scores, by problem_type.
SCORES = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """An encoder of post-norm attention and feed-forward layers; sizes in elements."""

    layers: int
    width: int
    heads: int
    hidden: int  # feed-forward width
    eps: float
    types: int  # token types; 0: none
    offset: int = 0  # the position table's row of the first token
    act: str = "gelu"
    tied: bool = True  # the masked head's output matrix is the embedding
    head: str = "embed"  # one of HEADS
    before: str = ""  # one of BEFORE
    labels: tuple[str, ...] = ()
    scores: str = "softmax"  # or sigmoid, none
    sentence: Sentence = field(default_factory=Sentence)


@dataclass(frozen=True)
class HfType:
    """What a `model_type` fixes. `fields` are its names of width, heads, layers, feed-forward width
    and activation; `offset` counts rows of the position table after the padding token's.
    """

    family: str
    prefix: str  # of its architectures' names
    fields: tuple[str, str, str, str, str]
    before: str  # of its sequence head
    types: bool = True
    offset: int | None = None
    eps: bool = True  # the file says it


_BERT = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
         "hidden_act")  # fmt: skip
HF_TYPES = {
    "bert": HfType("bert", "Bert", _BERT, "tanh"),
    "roberta": HfType("bert", "Roberta", _BERT, "tanh", offset=1),
    "xlm-roberta": HfType("bert", "XLMRoberta", _BERT, "tanh", offset=1),
    "camembert": HfType("bert", "Camembert", _BERT, "tanh", offset=1),
    "distilbert": HfType("bert", "DistilBert",
                         ("dim", "n_heads", "n_layers", "hidden_dim", "activation"),
                         "relu", types=False, eps=False),
}  # fmt: skip
# Endings of an architecture's name -> the head.
ARCHITECTURES = {
    "Model": "embed",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForSequenceClassification": "sequence",
    "ForNextSentencePrediction": "next",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "answer",
}
_HARMLESS = (
    *HF_HARMLESS, "attention_probs_dropout_prob", "classifier_dropout", "directionality",
    "dropout", "gradient_checkpointing", "hidden_dropout_prob", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds",
)  # fmt: skip


@dataclass(frozen=True)
class GgufType:
    """What a `general.architecture` fixes."""

    family: str


GGUF_TYPES = {"bert": GgufType("bert")}
# Values of `pooling_type`; rank is a classifier of pairs.
GGUF_POOLING = {0: ("mean",), 1: ("mean",), 2: ("cls",), 3: ("last",), 4: ("cls",)}
GGUF_RANK = 4


def from_hf(f: Fields, model: str, name: str) -> EncoderConfig:
    """The configuration in a config.json of one of HF_TYPES."""
    row = HF_TYPES[model]
    names = tuple(row.prefix + ending for ending in ARCHITECTURES)
    architecture = refuse_other_uses(f, names, causal=False)
    ending = architecture.removeprefix(row.prefix)
    if f.flag("is_decoder", False) or f.flag("add_cross_attention", False):
        raise UnsupportedError(f"config.json: a {model} with is_decoder is not supported")
    if f.text("position_embedding_type", "absolute") != "absolute":
        found = f.text("position_embedding_type")[:80]
        raise UnsupportedError(
            f"config.json: position_embedding_type {found!r} is not supported; valid: absolute"
        )
    width, heads, layers, hidden, act = row.fields
    positions = f.integer("max_position_embeddings", 512)
    padding = f.integer("pad_token_id", 1 if row.offset else 0, low=0)
    offset = 0 if row.offset is None else padding + row.offset
    head = ARCHITECTURES[ending]
    labels = _labels(f, head)
    config = EncoderConfig(
        family=row.family, model=model, source="hf", name=name,
        layers=f.integer(layers, high=MAX_LAYERS), width=f.integer(width),
        heads=f.integer(heads, high=MAX_HEADS), hidden=f.integer(hidden),
        vocab=f.integer("vocab_size"), context=positions - offset,
        eps=f.number("layer_norm_eps", 1e-12) if row.eps else 1e-12,
        types=f.integer("type_vocab_size", 2) if row.types else 0, offset=offset,
        act=ACTIVATIONS[f.text(act, "gelu", ACTIVATIONS)],
        tied=f.flag("tie_word_embeddings", True), head=head,
        before=row.before,
        labels=labels, scores=_scores(f, labels),
        notes=f.rest((*_HARMLESS, "bos_token_id", "eos_token_id"), f"model_type {model}"),
    )  # fmt: skip
    return _checked(config, f)


def beside(config: EncoderConfig, read: Any) -> dict[str, Any]:
    """Changes of the configuration that other files of the folder ask for; `read(name)` gives a
    file's JSON, None where there is none.
    """
    return {"sentence": from_folder(read)} if config.head == "embed" else {}


def with_sentence(config: ModelConfig, pooling: str | None, normalise: bool | None) -> ModelConfig:
    """The configuration with a pooling that its files leave open; OptionError where they do not, or
    where the model makes no embeddings.
    """
    if pooling is None and normalise is None:
        return config
    if not isinstance(config, EncoderConfig) or config.head != "embed":
        raise OptionError(
            f"pooling and normalize are for embeddings, which {config.name} has none of"
        )
    said = config.sentence
    if pooling not in (None, *POOLINGS):
        raise OptionError(f"pooling={pooling!r} is unknown; valid: {choices(POOLINGS)}")
    if said.said and (pooling, normalise) != (None, None):
        how = f"{'+'.join(said.pooling)}, {'' if said.normalise else 'not '}normalised"
        raise OptionError(f"the files of {config.name} say how its rows are pooled: {how}")
    chosen = said.pooling if pooling is None else (pooling,)
    return replace(config, sentence=replace(said, pooling=chosen, normalise=bool(normalise)))


def _labels(f: Fields, head: str) -> tuple[str, ...]:
    """Names of classes, in the order of their numbers."""
    found, count = f.take("id2label"), f.integer("num_labels", 2, high=MAX_LABELS)
    if head == "next":
        return NEXT
    if head not in ("sequence", "token"):
        return ()
    if found is None:
        return tuple(f"LABEL_{at}" for at in range(count))
    if not isinstance(found, Mapping) or not 0 < len(found) <= MAX_LABELS:
        raise FileError("config.json: id2label must be an object of class names")
    names = {str(key): value for key, value in found.items()}
    if set(names) != {str(at) for at in range(len(names))}:
        message = f"config.json: id2label does not number {len(names)} classes from 0"
        raise FileError(message)
    return tuple(str(names[str(at)]) for at in range(len(names)))


def _scores(f: Fields, labels: tuple[str, ...]) -> str:
    stated = f.take("problem_type")
    if stated is not None:
        return SCORES[f.text("problem_type", valid=SCORES)]
    return "sigmoid" if len(labels) == 1 else "softmax"


def from_gguf(g: Fields, f: Fields, model: str, tensors: Collection[str]) -> EncoderConfig:
    """The configuration in GGUF metadata of architecture bert."""
    if f.flag("attention.causal", False):
        raise UnsupportedError(f"{model}.attention.causal is true; only bidirectional models run")
    tokens = g.count("tokenizer.ggml.tokens")
    stated = f.integer("pooling_type", None, low=0)
    pooling = GGUF_POOLING.get(stated or 0)
    if pooling is None:
        known = choices(map(str, GGUF_POOLING))
        raise UnsupportedError(f"{model}.pooling_type {stated} is not supported; valid: {known}")
    types = "token_types.weight" in tensors
    config = EncoderConfig(
        family=GGUF_TYPES[model].family, model=model, source="gguf",
        name=g.text("general.name", model),
        layers=f.integer("block_count", high=MAX_LAYERS), width=f.integer("embedding_length"),
        heads=f.integer("attention.head_count", high=MAX_HEADS),
        hidden=f.integer("feed_forward_length"), vocab=f.integer("vocab_size", tokens or REQUIRED),
        context=f.integer("context_length"), eps=f.number("attention.layer_norm_epsilon"),
        types=g.integer("tokenizer.ggml.token_type_count", 1) if types else 0,
        head="sequence" if stated == GGUF_RANK else "embed",
        before="tanh", labels=("score",) if stated == GGUF_RANK else (), scores="sigmoid",
        sentence=Sentence(pooling, said=bool(stated)),
        notes=f.rest(("attention.head_count_kv",), f"architecture {model}"),
    )  # fmt: skip
    return _checked(config, f)


def _checked(c: EncoderConfig, f: Fields) -> EncoderConfig:
    """What no single field shows."""
    if c.width % c.heads:
        raise FileError(f"{f.where}: width {c.width} does not split into {c.heads} heads")
    if c.context < 1:
        rows = c.context + c.offset
        raise FileError(f"{f.where}: {rows} rows of positions, of which {c.offset} hold no text")
    return c
