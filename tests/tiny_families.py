"""A tiny random checkpoint of every Hugging Face model type that lmclock knows, as a folder.

    write("gpt2", folder)

A new family adds its rows to FIXTURES; tests/test_families.py fails where a type has none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from test_recurrent import Classifier, Generator, saved
from tiny_decoders import CASES, SIZES
from tiny_seq2seq import CONFIGS, random_classic, random_model
from torch import nn
from transformers import CamembertConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHARED = {"num_key_value_heads": 2}
ENCODER = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
           "num_attention_heads": 4, "max_position_embeddings": 40}  # fmt: skip
DISTIL = {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4,
          "max_position_embeddings": 40}  # fmt: skip
Write = Callable[[Path], None]


def by(kind: Callable[[Any], Any], config: Callable[[], Any]) -> Write:
    """A transformers model of random weights, saved by transformers."""

    def write(folder: Path) -> None:
        torch.manual_seed(3)
        kind(config()).eval().float().save_pretrained(folder)

    return write


def _generator(folder: Path) -> None:
    names = {"embedding": "encoder", "lstm": "rnn", "output": "decoder"}
    saved(folder, Generator(2, 12, 20, True, False), model_type="lstm", vocab_size=50,
          embedding_size=12, hidden_size=20, num_layers=2, module_names=names)  # fmt: skip


def _classifier(folder: Path) -> None:
    saved(folder, Classifier(2, True, "mean", torch.randn(50, 30)), model_type="lstm_classifier",
          vocab_size=50, embedding_size=30, hidden_size=17, num_layers=2, bidirectional=True,
          pooling="mean", num_labels=3)  # fmt: skip


def _net(folder: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    saved(folder, module, model_type="mlp", layer_sizes=[2, 3, 1])


def _decoders() -> dict[str, Write]:
    """The first case of every type that tiny_decoders.py has, and Llama's relatives."""
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**SIZES, **SHARED),
        "mistral": lambda: MistralConfig(**SIZES, **SHARED, sliding_window=5),
        "qwen2": lambda: Qwen2Config(**SIZES, **SHARED),
        "qwen3": lambda: Qwen3Config(**SIZES, **SHARED, head_dim=24),
    }
    for make in CASES.values():
        makers.setdefault(make().model_type, make)
    return {
        name: by(transformers.AutoModelForCausalLM.from_config, m) for name, m in makers.items()
    }


def _encoders() -> dict[str, Write]:
    configs: dict[str, tuple[str, Callable[[], Any]]] = {
        "bert": ("Bert", lambda: transformers.BertConfig(**ENCODER)),
        "roberta": ("Roberta", lambda: transformers.RobertaConfig(**ENCODER)),
        "xlm-roberta": ("XLMRoberta", lambda: transformers.XLMRobertaConfig(**ENCODER)),
        "camembert": ("Camembert", lambda: CamembertConfig(**ENCODER)),
        "distilbert": ("DistilBert", lambda: transformers.DistilBertConfig(**DISTIL)),
    }
    return {name: by(getattr(transformers, f"{prefix}ForSequenceClassification"), config)
            for name, (prefix, config) in configs.items()}  # fmt: skip


def _translator(case: str) -> Write:
    assert case in CONFIGS
    return lambda folder: random_model(case).save_pretrained(folder)


FIXTURES: dict[str, Write] = {
    **_decoders(),
    **_encoders(),
    **{case: _translator(case) for case in ("marian", "bart", "mbart", "t5", "mt5")},
    "transformer": lambda folder: random_classic("pre-norm").save(folder),
    "lstm": _generator,
    "lstm_classifier": _classifier,
    "mlp": _net,
}


def write(model_type: str, folder: Path) -> Path:
    """The folder, with a checkpoint of that type in it."""
    folder.mkdir(exist_ok=True)
    FIXTURES[model_type](folder)
    return folder
