"""The GGUF reader: what it gives for sound files, what it says about damaged or hostile ones."""

from __future__ import annotations

import gc
import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmclock.errors import FileError
from lmclock.files import GGUF, open_weights
from lmclock.files.gguf import OTHER_TYPES, Strings
from lmclock.formats import BY_CODE, FORMATS
from lmclock.packing import pack
from tests.gguf_bytes import (
    ARCH,
    ARRAY,
    I32,
    SMALL,
    STRING,
    U8,
    array_of,
    build,
    entry,
    key,
    open_bytes,
    tensors,
    text,
)


def test_small_file(tmp_path: Path) -> None:
    with open_bytes(tmp_path, SMALL) as weights:
        assert weights.metadata["general.architecture"] == "llama"
        assert weights.metadata["n"] == 7 and weights.alignment == 32
        assert weights.metadata["flags"].tolist() == [True, False]
        words = weights.metadata["w"]
        assert isinstance(words, Strings) and len(words) == 3
        assert words.tolist() == list(words) == ["a", "", "é" * 200]
        assert words[-1] == "é" * 200 and words[:2] == ["a", ""] and "a" in words
        with pytest.raises(IndexError):
            words[3]
        first, second = weights.tensors.values()
        assert (first.name, first.shape, first.format.name) == ("a.weight", (2, 4), "f32")
        assert (first.rows, first.width) == (2, 4)
        assert first.unpack().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert second.unpack().tolist() == list(range(32))
        assert not first.data.flags.writeable


def test_views_outlive_the_reader(tmp_path: Path) -> None:
    weights = open_bytes(tmp_path, SMALL)
    words, tensor = weights.metadata["w"], weights.tensors["a.weight"]
    weights.close()
    gc.collect()
    assert words.tolist()[0] == "a" and tensor.unpack()[1, 3] == 7 and not weights.tensors


def test_every_value_type_and_format_as_the_gguf_package_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    scalars: dict[str, tuple[str, Any]] = {
        "uint8": ("u8", 255),
        "int8": ("i8", -128),
        "uint16": ("u16", 65535),
        "int16": ("i16", -32768),
        "uint32": ("u32", 2**32 - 1),
        "int32": ("i32", -(2**31)),
        "float32": ("f32", 0.5),
        "bool": ("b", True),
        "string": ("s", "snow ☃"),
        "uint64": ("u64", 2**64 - 1),
        "int64": ("i64", -(2**63)),
        "float64": ("f64", 0.1),
    }
    for kind, (name, value) in scalars.items():
        getattr(writer, f"add_{kind}")(name, value)
    arrays: dict[str, list[Any]] = {"ai": [1, 2, 300], "af": [0.5, 2.0], "as": ["x", "", "yz"]}
    for name, values in arrays.items():
        writer.add_array(name, values)
    writer.add_array("nested", [[1, 2], [3]])
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    for fmt in FORMATS.values():
        raw = np.zeros((3, fmt.row_bytes(256)), np.uint8) if "k" in fmt.name else pack(fmt, x)
        writer.add_tensor(fmt.name, raw, raw_dtype=gguf.GGMLQuantizationType(fmt.code))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_weights(path) as weights:
        for name, value in scalars.values():
            assert weights.metadata[name] == value and type(weights.metadata[name]) is type(value)
        for name, values in arrays.items():
            assert weights.metadata[name].tolist() == values
        assert [inner.tolist() for inner in weights.metadata["nested"]] == [[1, 2], [3]]
        assert list(weights.tensors) == list(FORMATS)
        for name, tensor in weights.tensors.items():
            assert tensor.format.name == name and tensor.shape == (3, 256)
            assert np.abs(tensor.unpack() - (0 if "k" in name else x)).max() < 0.5


def test_type_names_agree_with_the_gguf_package() -> None:
    for kind in gguf.GGMLQuantizationType:
        if int(kind) in BY_CODE:
            assert BY_CODE[int(kind)].name == kind.name.lower()
        else:
            assert OTHER_TYPES[int(kind)] == kind.name, int(kind)


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    words = open_bytes(
        tmp_path, build((array_of(STRING, 2, text("ok") + text(b"\xff\xfe")),))
    ).metadata["k"]
    assert words[0] == "ok"
    for read in (words.tolist, lambda: words[1]):
        with pytest.raises(FileError, match="string 1 of k is not UTF-8"):
            read()


@given(values=st.lists(st.text(max_size=300), max_size=20))
@settings(max_examples=50)
def test_strings_of_any_length(values: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "strings.gguf"
    body = b"".join(text(value) for value in values)
    path.write_bytes(build((array_of(STRING, len(values), body), ARCH)))
    with GGUF.open(path) as weights:
        assert weights.metadata["k"].tolist() == values
        assert weights.metadata["general.architecture"] == "llama"


def test_nan_and_infinite_scales(tmp_path: Path) -> None:
    block = pack(FORMATS["q8_0"], np.ones((3, 64), np.float32)).reshape(-1, 34)
    for value in (np.nan, np.inf):
        damaged = block.copy()
        damaged.view("<f2")[3, 0] = value
        weights = open_bytes(tmp_path, tensors(entry("t", (64, 3), 8), data=damaged.tobytes()))
        for read in (weights.tensors["t"].check, weights.tensors["t"].unpack):
            with pytest.raises(FileError, match=r"tensor t holds a value .* not finite in row 1"):
                read()


def test_zero_and_subnormal_scales(tmp_path: Path) -> None:
    block = pack(FORMATS["q8_0"], np.ones((2, 32), np.float32))
    block.view("<f2")[:, 0] = (0.0, 2.0**-24)
    weights = open_bytes(tmp_path, tensors(entry("t", (32, 2), 8), data=block.tobytes()))
    assert weights.tensors["t"].unpack()[:, 0].tolist() == [0.0, 127 * 2.0**-24]


def shard(number: int, count: int, name: str, total: int | None = None) -> bytes:
    keys = [key("split.no", 2, struct.pack("<H", number))]
    keys += [key("split.count", 2, struct.pack("<H", count))]
    if total is not None:
        keys += [key("split.tensors.count", I32, struct.pack("<i", total))]
    if number == 0:
        keys += [ARCH]
    value = np.full(8, number, "<f4").tobytes()
    return build(tuple(keys), (entry(name, (8,)),), value)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"m-{k + 1:05d}-of-00003.gguf" for k in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(shard(number, 3, f"t{number}", 3))
    return paths


def test_any_shard_and_the_folder_open_the_whole_set(shards: list[Path]) -> None:
    for path in [*shards, shards[0].parent]:
        with open_weights(path) as weights:
            assert weights.metadata["general.architecture"] == "llama"
            assert weights.metadata["split.no"] == 0
            assert [t.unpack()[0] for t in weights.tensors.values()] == [0, 1, 2]
            weights.still_whole()


def test_damaged_sets_of_shards(shards: list[Path], tmp_path: Path) -> None:
    def refused(message: str, path: Path = shards[0]) -> None:
        with pytest.raises(FileError, match=message):
            GGUF.open(path)

    shards[1].write_bytes(shard(1, 3, "t0"))
    refused("two tensors are called 't0'")
    shards[1].write_bytes(shard(2, 3, "t1"))
    refused("split.no is 2, where the name says 1")
    shards[1].write_bytes(shard(1, 4, "t1"))
    refused("split.count is 4, where the name says 3")
    shards[1].write_bytes(build((), (), b""))
    refused("split.count is None")
    shards[1].write_bytes(shard(1, 3, "t1"))
    shards[0].write_bytes(shard(0, 3, "t0", 7))
    refused("split.tensors.count is 7, where the shards hold 3")
    shards[1].unlink()
    refused(r"cannot read .*00002-of-00003.gguf': No such file")
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(shards[0].read_bytes())
    refused("split.count is 3, but the name does not end like", alone)
    alone.write_bytes(build((key("split.count", STRING, text("x")),)))
    refused("split.count is x, but", alone)
    alone.write_bytes(build((key("split.count", ARRAY, struct.pack("<IQ", U8, 0)),)))
    refused(r"split.count is .*, but", alone)


def test_a_file_that_shrinks_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(SMALL)
    with GGUF.open(path) as weights:
        weights.still_whole()
        os.truncate(path, 100)
        with pytest.raises(FileError, match=f"shrank from {len(SMALL)} to 100 bytes"):
            weights.still_whole()


def test_the_real_model(smollm2: Path) -> None:
    begin = time.perf_counter()
    weights = open_weights(smollm2)
    seconds = time.perf_counter() - begin
    with weights:
        assert seconds < 0.5  # 10 to 25 ms; the wide margin is for a busy machine
        assert weights.metadata["llama.block_count"] == 30
        tokens = weights.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == 49152 and tokens[:3] == [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
        ]
        formats = [tensor.format.name for tensor in weights.tensors.values()]
        assert {name: formats.count(name) for name in formats} == {
            "q8_0": 1,
            "q4_1": 210,
            "f32": 61,
        }
        assert weights.tensors["token_embd.weight"].shape == (49152, 576)
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
        assert set(theirs) == set(weights.tensors)
        for name in ("blk.3.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
            expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
            np.testing.assert_array_equal(weights.tensors[name].unpack(), expected)
            weights.tensors[name].check()
