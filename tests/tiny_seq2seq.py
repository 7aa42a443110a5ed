"""Tiny random encoder-decoders as transformers, or torch.nn.Transformer, makes and saves them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import BartConfig, MarianConfig, MBartConfig, MT5Config, T5Config

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "max_position_embeddings": 64,
}  # fmt: skip
T5_SIZES = {
    "vocab_size": VOCAB, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}  # fmt: skip
PAD = VOCAB - 1


def _marian(**options: Any) -> Any:
    ends = {"pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": 0,
            "forced_eos_token_id": 0}  # fmt: skip
    return MarianConfig(**SIZES | ends | {"activation_function": "swish"} | options)


CONFIGS: dict[str, Callable[[], Any]] = {
    "marian": lambda: _marian(scale_embedding=True),
    "marian-uneven": lambda: _marian(encoder_layers=3, decoder_layers=1, encoder_ffn_dim=64,
                                     decoder_attention_heads=2, activation_function="relu"),
    "marian-two-vocabularies": lambda: _marian(
        share_encoder_decoder_embeddings=False, decoder_vocab_size=80, pad_token_id=79,
        decoder_start_token_id=79,
    ),
    "bart": lambda: BartConfig(**SIZES, forced_bos_token_id=0),
    "bart-scaled": lambda: BartConfig(**SIZES | {"scale_embedding": True, "decoder_layers": 3}),
    "mbart": lambda: MBartConfig(**SIZES, decoder_start_token_id=2),
    "t5": lambda: T5Config(**T5_SIZES),
    "t5-gated": lambda: T5Config(**T5_SIZES, feed_forward_proj="gated-gelu", num_decoder_layers=1,
                                 tie_word_embeddings=False),
    "t5-silu": lambda: T5Config(**T5_SIZES, feed_forward_proj="gated-silu"),
    "mt5": lambda: MT5Config(**T5_SIZES),
}  # fmt: skip
KINDS = {"marian": "MarianMTModel", "bart": "BartForConditionalGeneration",
         "mbart": "MBartForConditionalGeneration", "t5": "T5ForConditionalGeneration",
         "mt5": "MT5ForConditionalGeneration"}  # fmt: skip


def random_model(case: str, seed: int = 3) -> Any:
    """The model of a case, with weights that keep activations and logits near one."""
    torch.manual_seed(seed)
    config = CONFIGS[case]()
    config._attn_implementation = "eager"
    model = getattr(transformers, KINDS[config.model_type])(config).eval().float()
    fill(model)
    return model


def fill(model: Any) -> None:
    """Weights that keep activations and logits near one."""
    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" in name and config.model_type == "marian":
                continue  # sines and cosines
            _draw(name, weight)
        if getattr(config, "scale_decoder_outputs", False):
            model.shared.weight.mul_(config.d_model**0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(0.3 * torch.randn_like(model.final_logits_bias))


def _draw(name: str, weight: torch.Tensor) -> None:
    noise = torch.randn_like(weight)
    if "relative" in name:
        weight.copy_(noise)
    elif weight.ndim == 2:
        # T5 does not divide q.k by the root of the head's width: its projections are smaller.
        weight.copy_(noise * (0.6 if "Attention" in name else 1) / weight.shape[1] ** 0.5)
    else:
        weight.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))


def teacher_forced(model: Any, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """(target tokens, vocab): logits of one sentence by itself."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]))
        return found.logits[0].numpy()


class Classic(torch.nn.Module):
    """Sequence-to-sequence over torch.nn.Transformer, as its users write it."""

    def __init__(
        self, vocab: int = VOCAB, source_vocab: int | None = None, positions: str = "sinusoidal",
        tied: bool = True, output_bias: bool = False, length: int = 64, scale: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"d_model": 64, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2,
                 "dim_feedforward": 96, "dropout": 0.0, "batch_first": True}  # fmt: skip
        options = sizes | options
        width = options["d_model"]
        self.scale = math.sqrt(width) if scale else 1.0
        self.transformer = torch.nn.Transformer(**options)
        if source_vocab is None:
            self.embedding = torch.nn.Embedding(vocab, width)
        else:
            self.source_embedding = torch.nn.Embedding(source_vocab, width)
            self.target_embedding = torch.nn.Embedding(vocab, width)
        if positions == "learned":
            self.source_positions = torch.nn.Embedding(length, width)
            self.target_positions = torch.nn.Embedding(length, width)
        if not tied or output_bias:
            self.output = torch.nn.Linear(width, vocab, bias=output_bias)
        self.tied, self.learned, self.width = tied, positions == "learned", width
        activation = options.get("activation", "relu")
        self.described = {
            "model_type": "transformer", "vocab_size": vocab, "source_vocab_size": source_vocab,
            "shared_embeddings": source_vocab is None, "tie_word_embeddings": tied,
            "positions": positions, "max_position_embeddings": length, "output_bias": output_bias,
            "scale_embedding": scale, "activation": activation, "eos_token_id": 2,
            "decoder_start_token_id": 1, "pad_token_id": 0,
            **{name: options[name] for name in options
               if name not in ("dropout", "batch_first", "activation")},
        }  # fmt: skip

    def _embedded(self, ids: torch.Tensor, side: str) -> torch.Tensor:
        table = getattr(self, "embedding", None) or getattr(self, f"{side}_embedding")
        x = table(ids) * self.scale
        at = torch.arange(ids.shape[1])
        if self.learned:
            return x + getattr(self, f"{side}_positions")(at)
        angle = at[:, None] / 10000.0 ** (torch.arange(0, self.width, 2) / self.width)
        return x + torch.stack([angle.sin(), angle.cos()], dim=2).reshape(len(at), self.width)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x = self.transformer(
            self._embedded(source, "source"), self._embedded(target, "target"), tgt_mask=mask
        )
        if not self.tied:
            return self.output(x)
        table = getattr(self, "embedding", None) or self.target_embedding
        y = x @ table.weight.T
        return y + self.output.bias if hasattr(self, "output") else y

    def save(self, folder: Path) -> None:
        """The folder format of model_type `transformer` (docs/families.md)."""
        tensors = {n: t.contiguous() for n, t in self.state_dict().items()
                   if not (self.tied and n == "output.weight")}  # fmt: skip
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.described))


CLASSICS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm": {"norm_first": True, "activation": "gelu"},
    "learned": {"positions": "learned", "layer_norm_eps": 1e-3},
    "two-vocabularies": {"source_vocab": 50, "tied": False, "output_bias": True, "scale": False},
    "own-output": {"tied": True, "output_bias": True, "num_decoder_layers": 3},
    "no-biases": {"bias": False, "nhead": 2},
}


def random_classic(case: str) -> Classic:
    """The torch.nn.Transformer of a case, with weights that keep logits near one."""
    torch.manual_seed(5)
    model = Classic(**CLASSICS[case]).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _draw(name, weight)
            if "embedding" in name and model.scale != 1:
                weight.div_(2)
    return model
