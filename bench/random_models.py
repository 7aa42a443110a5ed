"""Models of real sizes without real weights: GGUF files of random but valid blocks.

    python -m bench.random_models --list
    python -m bench.random_models 1b-q4_k_m        # write it, print its path
    python -m bench.random_models --remove         # delete all of them

Speed does not depend on what the numbers are, so shapes and formats are those of the real models
and the numbers are drawn. Formats mix by tensor as llama.cpp mixes them (Q4_K_M: Q6_K for the
output matrix and for half of `attn_v` and `ffn_down`). The tokeniser is a byte-level one whose
further entries are never produced. Files lie in the user's cache folder, are written as a stream,
and stay until `--remove`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.common import Skipped
from lmclock import settings
from lmclock.formats import FORMATS, SCALE_WORDS, Format

POOL = 8 << 20  # bytes that are drawn; tensors are cut from it, so that writing is not drawing
SPREAD = 0.02  # standard deviation of the weights, about that of trained ones
SPARE = 2 << 30  # bytes of disk that stay free


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; `tied`: the embedding is the output matrix."""

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    tied: bool
    base: float = 500_000.0


SHAPES = {
    "1b": Shape(128256, 2048, 8192, 16, 32, 8, 64, tied=True),  # Llama-3.2-1B
    "8b": Shape(128256, 4096, 14336, 32, 32, 8, 128, tied=False),  # Llama-3-8B
}
# The format of most matrices, and llama.cpp's file type number.
MIXES = {
    "q4_0": ("q4_0", 2), "q4_k_m": ("q4_k", 15), "q6_k": ("q6_k", 18), "q8_0": ("q8_0", 7),
    "bf16": ("bf16", 32),
}  # fmt: skip
MODELS = (*(f"1b-{mix}" for mix in MIXES), "8b-q4_k_m")


def folder() -> Path:
    """Where the files lie."""
    return settings.cache_folder() / "bench" / "random"


def ensure(name: str) -> Path:
    """The file of a model of MODELS, written if it is not there; Skipped if the disk is full."""
    path = folder() / f"{name}.gguf"
    if not path.exists():
        size, mix = name.split("-", 1)
        folder().mkdir(parents=True, exist_ok=True)
        need = sum(_bytes(fmt, shape) for _, fmt, shape in tensors(SHAPES[size], mix))
        if shutil.disk_usage(folder()).free < need + SPARE:
            raise Skipped(f"{folder()} has no room for {need / 1e9:.1f} GB")
        part = path.with_suffix(f".{os.getpid()}.part")
        write(part, SHAPES[size], mix, name)
        part.replace(path)
    return path


def tensors(shape: Shape, mix: str) -> Iterator[tuple[str, Format, tuple[int, ...]]]:
    """(name, format, (rows, width) or (width,)) of every tensor, in file order."""
    most = FORMATS[MIXES[mix][0]]
    # llama.cpp gives the output matrix more bits than the rest, tied or not.
    best = FORMATS["q6_k"] if mix in ("q4_0", "q4_k_m") else most
    plain = FORMATS["f32"]
    d, kv = shape.width, shape.kv_heads * shape.head
    yield "token_embd", best if shape.tied else most, (shape.vocabulary, d)
    for n in range(shape.layers):
        more = best if mix == "q4_k_m" and more_bits(n, shape.layers) else most
        yield from (
            (f"blk.{n}.{name}", fmt, size)
            for name, fmt, size in (
                ("attn_norm", plain, (d,)),
                ("attn_q", most, (shape.heads * shape.head, d)),
                ("attn_k", most, (kv, d)),
                ("attn_v", more, (kv, d)),
                ("attn_output", most, (d, shape.heads * shape.head)),
                ("ffn_norm", plain, (d,)),
                ("ffn_gate", most, (shape.hidden, d)),
                ("ffn_up", most, (shape.hidden, d)),
                ("ffn_down", more, (d, shape.hidden)),
            )
        )
    yield "output_norm", plain, (d,)
    if not shape.tied:
        yield "output", best, (shape.vocabulary, d)


def more_bits(layer: int, layers: int) -> bool:
    """Layers in which Q4_K_M stores `attn_v` and `ffn_down` as Q6_K: the first and last eighth, and
    every third between (llama.cpp's use_more_bits).
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def blocks(fmt: Format, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` valid blocks of numbers near 0 with a deviation of about SPREAD: (count, bytes)."""
    if fmt.block == 1:
        values = rng.normal(scale=SPREAD, size=count).astype(np.float32)
        if fmt.name == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.view(np.uint8).reshape(count, fmt.bytes)
    raw = rng.integers(0, 256, (count, fmt.bytes), np.uint8)
    if fmt.name == "q6_k":
        raw[:, 192:208] &= 31  # signed scales: small ones, lest d be too small for an f16
    # d, and the minimum's scale where there is one, such that the mean is 0.
    scales = {"q4_0": (SPREAD / 4.6,), "q8_0": (SPREAD / 74,), "q6_k": (SPREAD / 330,),
              "q4_k": (SPREAD / 170, 7.5 * SPREAD / 170)}[fmt.name]  # fmt: skip
    words = raw.view("<f2")
    for word, scale in zip(SCALE_WORDS[fmt.name], scales, strict=True):
        words[:, word] = scale
    return raw


def write(path: Path, shape: Shape, mix: str, name: str) -> None:
    """The whole file, a tensor at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _metadata(writer, shape, mix, name)
    listed = list(tensors(shape, mix))
    for key, fmt, size in listed:
        kind = gguf.GGMLQuantizationType(fmt.code)
        writer.add_tensor_info(f"{key}.weight", size, np.dtype("f4"), _bytes(fmt, size), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    pools = {fmt: blocks(fmt, POOL // fmt.bytes, rng) for _, fmt, _ in listed if fmt.name != "f32"}
    for _, fmt, size in listed:
        if fmt.name == "f32":  # a norm
            writer.write_tensor_data(np.ones(size, np.float32))
            continue
        count, pool = _bytes(fmt, size) // fmt.bytes, pools[fmt]
        data = np.empty((count, fmt.bytes), np.uint8)
        for first in range(0, count, len(pool) // 2):
            some = data[first : first + len(pool) // 2]
            start = int(rng.integers(len(pool) - len(some)))
            some[:] = pool[start : start + len(some)]
        writer.write_tensor_data(data)
    writer.close()


def _bytes(fmt: Format, size: tuple[int, ...]) -> int:
    return int(np.prod(size[:-1])) * fmt.row_bytes(size[-1])


def _metadata(writer: Any, shape: Shape, mix: str, name: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    w: Any = writer
    numbers = {
        "block_count": shape.layers, "context_length": 8192, "embedding_length": shape.width,
        "feed_forward_length": shape.hidden, "head_count": shape.heads,
        "head_count_kv": shape.kv_heads, "rope_dimension_count": shape.head,
        "vocab_size": shape.vocabulary, "file_type": MIXES[mix][1], "eos_token_id": 257,
        "bos_token_id": 258,
    }  # fmt: skip
    for key, value in numbers.items():
        getattr(w, f"add_{key}")(value)
    w.add_name(f"random {name}")
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(shape.base)
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, "he", "<|end|>", "<|begin|>"]
    kinds = [1] * (len(alphabet) + 1) + [3] * 2  # normal, control, unused
    kinds += [5] * (shape.vocabulary - len(kinds))
    pieces += [f"<unused {n}>" for n in range(shape.vocabulary - len(pieces))]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe")
    w.add_token_list(pieces)
    w.add_token_types(kinds)
    w.add_token_merges(["h e"])


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(MODELS))
@click.option("--list", "listing", is_flag=True, help="Print the names and whether they are there.")
@click.option("--remove", is_flag=True, help="Delete the files.")
def main(names: tuple[str, ...], listing: bool, remove: bool) -> None:
    if remove:
        shutil.rmtree(folder(), ignore_errors=True)
    for name in names:
        click.echo(ensure(name))
    if listing:
        for name in MODELS:
            path = folder() / f"{name}.gguf"
            size = f"{path.stat().st_size / 1e9:.2f} GB" if path.exists() else "not there"
            click.echo(f"{name:12} {size}")


if __name__ == "__main__":
    main()
