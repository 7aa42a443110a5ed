"""The safetensors reader, held to the library's, and the folders and indexes around the files."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lmclock.files.safetensors
from lmclock.errors import FileError, LmclockError, UnsupportedError
from lmclock.files import Safetensors, open_weights
from lmclock.files.safetensors import DTYPES


def build(
    header: str | bytes | dict[str, Any], data: bytes = b"", size: int | None = None
) -> bytes:
    """A safetensors file; `size` overrides the length of the header."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SMALL = build(
    {
        "__metadata__": {"format": "pt", 'quote " \\ é': "☃"},
        "b": tensor(0, 8, [2, 2], "BF16"),
        "a.weight": tensor(8, 32, [2, 3]),
        "empty": tensor(32, 32, [0, 5]),
        "scalar": tensor(32, 36, []),
    },
    bytes([0, 0x3F, 0x80, 0x3F, 0, 0x40, 0, 0xC0]) + np.arange(7, dtype="<f4").tobytes(),
)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], Safetensors]:
    def write_and_open(raw: bytes) -> Safetensors:
        path = tmp_path / "x.safetensors"
        path.write_bytes(raw)
        return Safetensors.open(path)

    return write_and_open


def test_small_file(opened: Callable[[bytes], Safetensors]) -> None:
    with opened(SMALL) as weights:
        assert weights.metadata == {"format": "pt", 'quote " \\ é': "☃"}
        assert list(weights.tensors) == ["b", "a.weight", "empty", "scalar"]
        assert weights.tensors["b"].unpack().tolist() == [[0.5, 1], [2, -2]]
        assert weights.tensors["a.weight"].unpack().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert weights.tensors["empty"].unpack().shape == (0, 5)
        assert weights.tensors["scalar"].unpack() == 6 and weights.tensors["scalar"].shape == ()
        assert not weights.tensors["a.weight"].data.flags.writeable


def test_every_dtype_the_library_writes(tmp_path: Path) -> None:
    types = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16"
    types += " uint32 uint64 float8_e4m3fn float8_e5m2 float8_e8m0fnu"
    written = {name: torch.ones(2, 4).to(getattr(torch, name)) for name in types.split()}
    save_file(written, tmp_path / "x.safetensors", {"k": "v"})
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert set(weights.tensors) == set(written) and weights.metadata == {"k": "v"}
        for name, found in weights.tensors.items():
            assert found.shape == (2, 4) and found.data.size == 8 * written[name].itemsize
            if name in ("float32", "float16", "bfloat16"):
                assert (found.unpack() == 1).all()
            else:
                with pytest.raises(UnsupportedError, match=r"not supported; valid: f32, f16"):
                    found.unpack()


def test_truncation_at_every_byte(opened: Callable[[bytes], Safetensors]) -> None:
    for size in range(len(SMALL)):
        with pytest.raises(FileError):
            opened(SMALL[:size])


def one(text: str) -> bytes:
    """A header whose one tensor `t` has the fields `text`, over 4 bytes of data."""
    return build('{"t":{' + text + "}}", bytes(4))


SHAPE, OFFSETS, DTYPE = '"shape":[1]', '"data_offsets":[0,4]', '"dtype":"F32"'
GOOD = f"{DTYPE},{SHAPE},{OFFSETS}"
DEEP = 100_000
PAIR = {"a": tensor(0, 4, [1]), "b": tensor(4, 8, [1])}

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "has 7 bytes, too few"),
    "header over 100 MB": (build("{}", size=100_000_001), "header of 100000001 bytes; valid"),
    "header of 2^63": (build("{}", size=1 << 63), "header of 9223372036854775808 bytes"),
    "header past the end": (build("{}", size=3), "header of 3 bytes; valid: at most .* 2 are left"),
    "header of 0": (build(b""), "expected '{'"),
    "not JSON": (build("hello"), "expected '{'"),
    "a list": (build("[1]"), "expected '{'"),
    "cut JSON": (build('{"a":'), "expected '{'"),
    "deep JSON": (build('{"a":' * DEEP + "}" * DEEP), "unknown field 'a'"),
    "deep lists": (build("[" * DEEP), "expected '{'"),
    "deep shape": (one(f'{DTYPE},"shape":{"[" * DEEP}'), "the shape of t, a list"),
    "leading zero": (one(f'{DTYPE},"shape":[01],{OFFSETS}'), "the shape of t, a list of at most"),
    "negative": (one(f'{DTYPE},"shape":[-1],{OFFSETS}'), "whole numbers"),
    "fraction": (one(f'{DTYPE},"shape":[1.0],{OFFSETS}'), "whole numbers"),
    "exponent": (one(f'{DTYPE},"shape":[1e0],{OFFSETS}'), "whole numbers"),
    "NaN": (one(f'{DTYPE},"shape":[NaN],{OFFSETS}'), "whole numbers"),
    "many digits": (one(f'{DTYPE},"shape":[{"9" * 5000}],{OFFSETS}'), "whole numbers"),
    "17 dimensions": (one(f'{DTYPE},"shape":[{"1," * 16}1],{OFFSETS}'), "at most 16"),
    "shape missing": (one(f"{DTYPE},{OFFSETS}"), "tensor t lacks shape"),
    "dtype missing": (one(f"{SHAPE},{OFFSETS}"), "tensor t lacks dtype"),
    "offsets missing": (one(f"{DTYPE},{SHAPE}"), "tensor t lacks data_offsets"),
    "three offsets": (one(f'{DTYPE},{SHAPE},"data_offsets":[0,4,4]'), "3 data_offsets, not 2"),
    "no offsets": (one(f'{DTYPE},{SHAPE},"data_offsets":[]'), "0 data_offsets, not 2"),
    "offsets swapped": (one(f'{DTYPE},{SHAPE},"data_offsets":[4,0]'), "the sizes differ"),
    "offsets of 2^64": (
        one(f'{DTYPE},{SHAPE},"data_offsets":[{1 << 64},{(1 << 64) + 4}]'),
        "leaves a hole",
    ),
    "shape overflows": (one(f'{DTYPE},"shape":[{1 << 62},4],{OFFSETS}'), "the sizes differ"),
    "shape too large": (one(f'{DTYPE},"shape":[2],{OFFSETS}'), "the sizes differ"),
    "unknown dtype": (one(f'"dtype":"F33",{SHAPE},{OFFSETS}'), "has dtype 'F33'; valid: F32, F16"),
    "dtype number": (one(f'"dtype":1,{SHAPE},{OFFSETS}'), "the dtype of t in double quotes"),
    "half a block": (one(f'"dtype":"F4","shape":[3],{OFFSETS}'), "the sizes differ"),
    "unknown field": (one(f'{GOOD},"x":1'), "unknown field 'x'; valid: dtype, shape or"),
    "field twice": (one(f"{GOOD},{SHAPE}"), "tensor t has shape twice"),
    "field twice, escaped": (one(GOOD + r',"sh\u0061pe":[1]'), "tensor t has shape twice"),
    "trailing comma": (one(f"{GOOD},"), "field of tensor t in double quotes"),
    "duplicate tensor": (
        build('{"t":{' + GOOD + '},"t":{' + GOOD + "}}", bytes(4)),
        "two tensors are called 't'",
    ),
    "after the brace": (build("{}x"), "goes on after its closing brace"),
    "two headers": (build("{}{}"), "goes on after its closing brace"),
    "metadata twice": (
        build('{"__metadata__":{},"__metadata__":{}}'),
        "__metadata__ appears twice",
    ),
    "metadata key twice": (build('{"__metadata__":{"a":"","a":""}}'), "'a' appears twice"),
    "metadata number": (build('{"__metadata__":{"a":1}}'), "metadata key 'a' in double quotes"),
    "metadata object": (build('{"__metadata__":{"a":{}}}'), "metadata key 'a' in double quotes"),
    "metadata list": (build('{"__metadata__":[]}'), "expected '{'"),
    "newline in name": (build('{"a\nb":{' + GOOD + "}}", bytes(4)), "a tensor name in double"),
    "escaped NUL": (build(r'{"a\u0000b":{' + GOOD + "}}", bytes(4)), "unprintable character"),
    "path in name": (build('{"../x":{' + GOOD + "}}", bytes(4)), "path step"),
    "name of 1025": (build('{"' + "n" * 1025 + '":{' + GOOD + "}}", bytes(4)), "longer than 1024"),
    "empty name": (build('{"":{' + GOOD + "}}", bytes(4)), "name of 0 bytes"),
    "lone surrogate": (build(r'{"\ud800":{' + GOOD + "}}", bytes(4)), "is not UTF-8"),
    "bad escape": (build(r'{"\x41":{' + GOOD + "}}", bytes(4)), "in double quotes"),
    "not UTF-8": (build(b'{"\xff":{' + GOOD.encode() + b"}}", bytes(4)), "is not UTF-8"),
    "trailing byte": (build(PAIR, bytes(9)), "take 8 bytes of data, the file has 9"),
    "zip behind": (build(PAIR, bytes(8) + b"PK\3\4" + bytes(50)), "the file has 62"),
    "data cut": (build(PAIR, bytes(7)), "take 8 bytes of data, the file has 7"),
    "hole": (build(PAIR | {"b": tensor(5, 9, [1])}, bytes(9)), "b at 5 leaves a hole, at 4"),
    "overlap": (build(PAIR | {"b": tensor(3, 7, [1])}, bytes(8)), "b at 3 overlaps .*, at 4"),
    "same place": (build(PAIR | {"b": tensor(0, 4, [1])}, bytes(8)), "b at 0 overlaps"),
    "zip": (b"PK\3\4" + bytes(100), "`lmclock convert FOLDER`"),
    "pickle": (b"\x80\2}q\0." + bytes(100), "which can run code"),
    "index without map": (b'{"metadata":{}}', "lacks weight_map"),
    "index of nothing": (b'{"weight_map":{}}', "lacks weight_map"),
    "index list": (b' {"weight_map":["a"]}', "lacks weight_map"),
    "index twice": (b'{"weight_map":{"a":"x","a":"y"}}', "a key appears twice"),
    "index deep": (b'{"weight_map":' + b'{"a":' * DEEP, "not a valid index"),
    "index cut": (b'{"weight_map":{"a":', "not a valid index"),
    "index not UTF-8": (b'{"weight_map":{"\xff":"a"}}', "not a valid index"),
    "shard number": (b'{"weight_map":{"a":1}}', "in '1'; valid: a plain file name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(FileError, match=message) as caught:
        Safetensors.open(path)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1 and peak < 20e6
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(FileError):
        open_weights(path)


# What the library took when this was written, or may take: JSON's last of two keys, names of any
# kind, fields it does not know.
LIBRARY_TAKES = ("field", "unknown field", "duplicate", "metadata", "name", "path", "escaped", "17")


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_here_is_refused_without_need(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name][0])
    if not name.startswith(LIBRARY_TAKES) and name != "empty name":
        with pytest.raises((safetensors.SafetensorError, OSError)):
            safetensors.safe_open(path, "np")


def test_header_of_100_mb_stays_cheap(opened: Callable[[bytes], Safetensors]) -> None:
    raw = build('{"__metadata__":{"a":"' + "x" * (100_000_000 - 22))
    tracemalloc.start()
    with pytest.raises(FileError, match="expected the value of metadata key 'a' in double quotes"):
        opened(raw)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_limit_on_tensors(
    opened: Callable[[bytes], Safetensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmclock.files.safetensors, "MAX_TENSORS", 3)
    assert len(opened(build({name: tensor(0, 0, [0]) for name in "abc"})).tensors) == 3
    with pytest.raises(FileError, match="more than 3 tensors"):
        opened(build({name: tensor(0, 0, [0]) for name in "abcd"}))


names = st.text(min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and not set(name) & set(" /\\") and name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=4)


@given(
    wanted=st.dictionaries(names, shapes, max_size=6), notes=st.dictionaries(st.text(), st.text())
)
@settings(max_examples=60)
def test_whatever_the_library_writes_is_read(
    wanted: dict[str, list[int]], notes: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in wanted.items()}
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in arrays.items()}, path, notes or None)
    with Safetensors.open(path) as weights:
        assert weights.metadata == notes
        assert set(weights.tensors) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(weights.tensors[name].unpack(), array)


@given(data=st.data())
@settings(max_examples=150, deadline=1000)
def test_flipped_bytes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A changed file opens, with the tensors the library finds in it, or is refused."""
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'"{}[],:\\0123 '))
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(raw)
    try:
        with open_weights(path) as weights:
            with safetensors.safe_open(path, "np") as theirs:
                assert set(theirs.keys()) == set(weights.tensors)
            for found in weights.tensors.values():
                found.unpack()
    except LmclockError as error:
        assert len(str(error)) < 1000


@pytest.mark.parametrize("bits", [0x7F800000, 0xFFC00001])
def test_values_that_are_not_finite(bits: int, opened: Callable[[bytes], Safetensors]) -> None:
    data = struct.pack("<4I", 0, 0, bits, 0)
    weights = opened(build({"t": tensor(0, 16, [2, 2])}, data))
    with pytest.raises(FileError, match="tensor t holds a value that is not finite in row 1"):
        weights.tensors["t"].unpack()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two shards and their index, as a hub's download would be."""
    folder = tmp_path / "models--org--x" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(build({name: tensor(0, 4, [1])}, bytes(4)))
    write_index(folder, {"a": "a.safetensors", "b": "b.safetensors"})
    return folder


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    index = {"metadata": {"total_size": 8}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_index_and_folder(folder: Path) -> None:
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_weights(path) as weights:
            assert set(weights.tensors) == {"a", "b"}


ELSEWHERE = ["../../etc/passwd", "../a.safetensors", "/etc/passwd", "/etc/x.safetensors"]
ELSEWHERE += ["sub/a.safetensors", "..safetensors", "a.bin", "a.safetensors\0", "", "index.json"]


@pytest.mark.parametrize("shard", ELSEWHERE)
def test_index_that_names_another_place(shard: str, folder: Path) -> None:
    write_index(folder, {"a": "a.safetensors", "b": shard})
    with pytest.raises(FileError, match="valid: a plain file name that ends in"):
        open_weights(folder)


def test_index_with_a_missing_tensor_or_shard_or_a_tensor_twice(folder: Path) -> None:
    write_index(folder, {"a": "a.safetensors", "c": "b.safetensors"})
    with pytest.raises(FileError, match=r"b.safetensors lacks tensor c, which model.safetensors"):
        open_weights(folder)
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    write_index(folder, {"a": "a.safetensors", "b": "b.safetensors"})
    with pytest.raises(FileError, match="two tensors are called 'a'"):
        open_weights(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileError, match=r"names 'b.safetensors', which cannot be read"):
        open_weights(folder)


def test_shards_that_are_links(folder: Path, tmp_path: Path) -> None:
    shard = folder / "b.safetensors"
    raw = shard.read_bytes()
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "5678").write_bytes(raw)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(raw)
    (folder / "other.safetensors").write_bytes(raw)
    for target, message in (
        (Path("../../blobs/5678"), None),
        (folder / "other.safetensors", None),
        (outside, "a link that leads out of its folder"),
        (Path("/dev/zero"), "a link that leads out of its folder"),
        (shard, "cannot be read"),  # a link to itself
    ):
        shard.unlink()
        shard.symlink_to(target)
        if message is None:
            assert set(open_weights(folder).tensors) == {"a", "b"}
        else:
            with pytest.raises(FileError, match=message):
                open_weights(folder)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(FileError, match="is a FIFO, not a regular file"):
        open_weights(folder)


def test_which_file_of_a_folder_is_opened(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(FileError, match=message):
            open_weights(tmp_path)

    refused("holds no .safetensors and no .gguf file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\2}.")
    refused(
        r"pytorch_model.bin is or may be a pickle, which can run code .*lmclock convert FOLDER`"
    )
    for ending in ("pt", "pth", "ckpt"):
        path = tmp_path / f"x.{ending}"
        path.write_bytes(b"anything")
        with pytest.raises(FileError, match=rf"x.{ending} is or may be a pickle"):
            open_weights(path)
    one_name, other = tmp_path / "adapter.safetensors", tmp_path / "z.safetensors"
    one_name.write_bytes(SMALL)
    assert "b" in open_weights(tmp_path).tensors
    other.write_bytes(SMALL)
    refused(r"several models; give one by name: adapter.safetensors or z.safetensors")
    (tmp_path / "model.safetensors").write_bytes(build({"m": tensor(0, 0, [0])}))
    assert set(open_weights(tmp_path).tensors) == {"m"}


def test_the_ending_of_the_name_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(SMALL)
    assert isinstance(open_weights(path), Safetensors)
    path.write_bytes(b"hello world, hello world")
    with pytest.raises(FileError, match=r"weights.gguf is neither a GGUF nor a safetensors file"):
        open_weights(path)


def test_dtype_sizes_agree_with_torch() -> None:
    known = {"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "BOOL": "bool"}
    for name, kind in known.items():
        assert DTYPES[name].bytes == getattr(torch, kind).itemsize
