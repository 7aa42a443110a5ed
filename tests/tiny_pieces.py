"""SentencePiece models for tests, trained by the library on a text made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

TEXTS = {
    "en": "the a house tree river walks runs sleeps old green small and under over weather today "
    "is nice man woman child sees gives book bread water , . ! ? 12 7 it's",
    "fr": "le la maison arbre rivière marche court dort vieux vert petite et sous sur temps "
    "aujourd'hui est beau homme femme enfant voit donne livre pain eau , . ! ? 12 ça",
}


def sentences(language: str, count: int = 400) -> list[str]:
    rng = np.random.default_rng(1)
    words = TEXTS[language].split()
    return [" ".join(rng.choice(words, rng.integers(3, 12))).capitalize() for _ in range(count)]


def train(path: Path, language: str, size: int = 120, **options: Any) -> None:
    """A model file at `path`, and the library's vocabulary beside it."""
    settings = {"normalization_rule_name": "nmt_nfkc", "character_coverage": 1.0,
                "hard_vocab_limit": False, "minloglevel": 2, "model_type": "unigram"}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(language)), model_prefix=str(path.with_suffix("")),
        vocab_size=size, **settings | options,
    )  # fmt: skip
    path.with_suffix(".model").rename(path)
    path.with_suffix(".vocab").unlink()


def marian_files(folder: Path, apart: bool = False) -> None:
    """source.spm, target.spm, vocab.json and what transformers wants beside them."""
    pieces: dict[str, list[str]] = {}
    for side, language in (("source", "en"), ("target", "fr")):
        train(folder / f"{side}.spm", language)
        spm = sentencepiece.SentencePieceProcessor(str(folder / f"{side}.spm"))
        pieces[side] = [spm.IdToPiece(n) for n in range(3, spm.GetPieceSize())]
    codes = [] if apart else [">>fr<<", ">>de<<"]
    sides = [pieces["source"], pieces["target"]] if apart else [pieces["source"] + pieces["target"]]
    names = ["vocab.json", "target_vocab.json"][: len(sides)]
    for name, side in zip(names, sides, strict=True):
        known = dict.fromkeys(["</s>", "<unk>", *codes, *side[: len(side) - 4], "<pad>"])
        (folder / name).write_text(json.dumps({piece: at for at, piece in enumerate(known)}))
    config = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "fr",
              "separate_vocabs": apart}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def t5_file(folder: Path) -> None:
    """spiece.model as T5 has it: padding 0, end 1, unknown 2."""
    train(folder / "spiece.model", "en", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
