"""Small vocabularies trained in the tests: the library's tokeniser, GGUF metadata, a folder."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

LINES = (
    "The quick brown fox jumps over the lazy dog, and it's 12345 times faster than I'd thought!",
    "def encode(text: str) -> list[int]:\n    return [byte for byte in text.encode()]  # don't",
    "camelCase HTTPServer XMLParser $100 + 7% = <b>bold</b>; a_b ~ x^2 | `code`",
    "naïve café Ünïcödé straße Ελληνικά русский язык עברית العربية ไทย हिन्दी",
    "中文分词测试，今天天气很好。日本語のテキスト、カタカナ。한국어 문장입니다.",
    "emoji 👩‍👩‍👧 🇫🇷 ❤️ 😀😀, zero\u200dwidth, soft\u00adhyphen, tab\tand\r\nlines\n\n\n  end  ",
    "12 345 6789 ٣٤٥ ½ ² Ⅷ 1.5e-10 0xFF 2024-01-01",
    "I'M YOU'RE we've they'll he'd 'quoted' ''",
)
SPECIALS = ("<|end|>", "<|im_start|>", "<s>", "[X]")
WHOLE = ("<think>", "  \n")  # tokens found whole in any text, as `<think>` of Qwen3

# fmt: off
# Text that pre-tokenisers disagree about, and anything else Unicode has.
FRAGMENTS = (
    *("'s", "'RE", " ", "  ", "\n", "\r\n", "\t", "a", "Z", "é", "e\u0301", "中", "の", "한", "ا"),
    *("1", "12345", "½", "٣", "!", "$", "^", "`", "_", "word", "Word", " word", "。", "ß", "ǅ"),
    *("👩\u200d👩\u200d👧", "❤\ufe0f", "🇫🇷", "\u200d", "\u00a0", "\u3000", "\x00", "\x1c", "\x85"),
    *("\u2028", "\ufeff"),
)
# fmt: on
TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=30).map("".join),
)
SPELLING = st.lists(
    st.one_of(
        st.sampled_from(
            (*SPECIALS, *WHOLE, "<|", "|>", "<", "end", "im_start", "s>", " ", "\n", "x")
        ),
        st.text(max_size=3),
    ),
    max_size=12,
).map("".join)


def split_words(pattern: str) -> Any:
    """The pipeline of most `tokenizer.json`: one pattern, then bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_byte_level(pipeline: Any, ignore_merges: bool = False, size: int = 500) -> Tokenizer:
    """A byte-level BPE tokeniser over LINES with SPECIALS and WHOLE added."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pipeline
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=[SPECIALS[0]],
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in WHOLE])
    return tokenizer


# Pipelines as the models' own tokenizer.json have them, written out: the table under test must give
# the same words by whatever patterns it has.
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chain(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps])


def cut(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PIPELINES: dict[str, Any] = {
    "gpt-2": GPT2,
    "smollm": chain(pre_tokenizers.Digits(individual_digits=True), GPT2),
    "llama-bpe": split_words(LLAMA3),
    "dbrx": split_words(LLAMA3),
    "qwen2": split_words(LLAMA3.replace("{1,3}", "")),
    "qwen35": split_words(QWEN35),
    "tekken": split_words(TEKKEN),
    "gpt-4o": split_words(GPT4O),
    "falcon": chain(
        pre_tokenizers.Punctuation("contiguous"),
        GPT2,
        pre_tokenizers.Digits(individual_digits=False),
        cut("[0-9][0-9][0-9]"),
    ),
    "deepseek-v3": chain(
        cut(r"\p{N}{1,3}"),
        cut(r"[一-龥\u3040-ゟ゠-ヿ]+"),
        cut(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        BYTES,
    ),
}


IGNORES_MERGES = ("llama-bpe", "tekken")


@functools.cache
def trained(pre: str) -> Tokenizer:
    return train_byte_level(PIPELINES[pre], ignore_merges=pre in IGNORES_MERGES)


def hide(text: str) -> str:
    """The text without spelled special tokens, which the reference would take for real."""
    for name in (*SPECIALS, "</s>"):
        text = text.replace(name, "")
    return hide(text) if any(name in text for name in SPECIALS) else text


def add_start(tokenizer: Tokenizer, start: str = "<s>") -> None:
    """Put `start` before every text, as Llama-3 does."""
    number = tokenizer.token_to_id(start)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, number)]
    )


def gguf_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What a converter writes about a byte-level tokeniser."""
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [tokenizer.id_to_token(at) for at in range(tokenizer.get_vocab_size())]
    kinds = {**dict.fromkeys(SPECIALS, 3), **dict.fromkeys(WHOLE, 4)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [kinds.get(piece, 1) for piece in pieces],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<s>"),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<|end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_metadata(prefix: bool, fallback: bool = True) -> tuple[Any, dict[str, Any]]:
    """(a trained SentencePiece BPE processor, the GGUF metadata a converter makes of it)."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        model_type="bpe",
        vocab_size=600 if fallback else 300,
        byte_fallback=fallback,
        character_coverage=0.98 if fallback else 1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(model.get_piece_size())
    kinds = (
        (model.is_unknown, 2),
        (model.is_control, 3),
        (model.is_unused, 5),
        (model.is_byte, 6),
    )
    return model, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(at) for at in ids],
        "tokenizer.ggml.scores": [model.get_score(at) for at in ids],
        "tokenizer.ggml.token_type": [
            next((kind for test, kind in kinds if test(at)), 1) for at in ids
        ],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def save_folder(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """`tokenizer.json` and `tokenizer_config.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
