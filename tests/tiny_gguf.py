"""A whole model in one small GGUF file: two layers of random f32 weights, a byte-level tokeniser
with chat tokens, a context of 256 positions. For tests of everything from file to command line.
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_bytes as raw
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, FFN, HEADS, LAYERS, CONTEXT = 32, 64, 2, 2, 256
MERGES = ("h e", "l l", "Ġ t")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PIECES = (*sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES), *SPECIALS)
END = len(PIECES) - 1  # <|im_end|>


def write(path: Path, name: str = "tiny", context: int = CONTEXT) -> Path:
    """Write the model and return its path; the same bytes each time."""
    tensors = _tensors(np.random.default_rng(0))
    entries, data = [], b""
    for key, values in tensors.items():
        entries.append(raw.entry(f"{key}.weight", values.shape[::-1], 0, len(data)))
        data += values.tobytes()  # sizes are multiples of 32 bytes, so are the offsets
    path.write_bytes(raw.build(_keys(name, context), tuple(entries), data))
    return path


def _tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(PIECES), WIDTH)}
    for layer in range(LAYERS):
        names = {
            "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,),
            "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in names.items()}
    shapes["output_norm"] = (WIDTH,)
    found = {key: rng.standard_normal(shape) / shape[-1] ** 0.5 for key, shape in shapes.items()}
    for key, values in found.items():
        if values.ndim == 1:
            values += 1
        if key == "token_embd":
            values[END] = 0  # a logit of nought: replies end now and then, but not at once
    return {key: values.astype("<f4") for key, values in found.items()}


def _keys(name: str, context: int) -> tuple[bytes, ...]:
    numbers = {
        "context_length": context, "embedding_length": WIDTH, "block_count": LAYERS,
        "feed_forward_length": FFN, "attention.head_count": HEADS, "attention.head_count_kv": 1,
        "rope.dimension_count": WIDTH // HEADS,
    }  # fmt: skip
    kinds = [3 if piece in SPECIALS else 1 for piece in PIECES]
    return (
        _text("general.architecture", "llama"),
        _text("general.name", name),
        *(_number(f"llama.{key}", value) for key, value in numbers.items()),
        raw.key("llama.attention.layer_norm_rms_epsilon", raw.F32, struct.pack("<f", 1e-5)),
        _text("tokenizer.ggml.model", "gpt2"),
        _text("tokenizer.ggml.pre", "gpt-2"),
        _texts("tokenizer.ggml.tokens", PIECES),
        _texts("tokenizer.ggml.merges", MERGES),
        raw.key(
            "tokenizer.ggml.token_type",
            raw.ARRAY,
            struct.pack(f"<IQ{len(kinds)}i", raw.I32, len(kinds), *kinds),
        ),
        _number("tokenizer.ggml.eos_token_id", END),
    )


def _text(key: str, value: str) -> bytes:
    return raw.key(key, raw.STRING, raw.text(value))


def _texts(key: str, values: tuple[str, ...]) -> bytes:
    packed = b"".join(map(raw.text, values))
    return raw.key(key, raw.ARRAY, struct.pack("<IQ", raw.STRING, len(values)) + packed)


def _number(key: str, value: int) -> bytes:
    return raw.key(key, raw.U32, struct.pack("<I", value))
