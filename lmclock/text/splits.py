"""How a byte-level vocabulary cuts text into words before merging: one row per pre-tokeniser.

The rows are named as `tokenizer.ggml.pre` names them. A row is a chain of patterns: each stage cuts
every piece of the stage before into its matches and the text between them. What the patterns say is
fixed by the tokenisers the models were trained with; they are format constants, not choices.

No row normalises Unicode. Qwen2 and Command-R were trained behind NFC, which a GGUF file does not
record and its readers do not apply; a `tokenizer.json` says so itself and is obeyed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmclock.errors import UnsupportedError, choices

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, letter: str = r"\p{L}", mark: str = "") -> str:
    """Words of letters, runs of digits, punctuation with its line ends, spaces."""
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}"
        rf"| ?[^\s\p{{L}}{mark}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased(digits: str, ending: str) -> str:
    """Words cut where the case rises (`camelCase` is two)."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{ending}|{lead}{_UPPER}+{_LOWER}*{ending}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class Split:
    """One pre-tokeniser: its patterns, and what its models take for granted."""

    stages: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


_GPT2 = Split((GPT2,))
_DIGITS_ALONE = Split((r"\p{N}", GPT2))
_LLAMA3 = Split((_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_LLAMA3_MERGED = Split((_words(r"\p{N}{1,3}"),))
_QWEN2 = Split((_words(r"\p{N}"),))
_GPT4O = Split((_cased(r"\p{N}{1,3}", f"{_CONTRACTION}?"),))

SPLITS: dict[str, Split] = {
    # What a file without a name means: the reading given to files older than the name.
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "modern-bert", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_ALONE),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3_MERGED),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "qwen35": Split((_words(r"\p{N}", r"[\p{L}\p{M}]", r"\p{M}"),)),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "deepseek-v3": Split(
        (
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
        )
    ),
    "tekken": Split((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}


def split_named(name: str) -> Split:
    """The row of that name; UnsupportedError names the ones there are."""
    if name not in SPLITS:
        raise UnsupportedError(
            f"tokenizer.ggml.pre {name!r} is not a known pre-tokeniser; valid: {choices(SPLITS)}"
        )
    return SPLITS[name]
