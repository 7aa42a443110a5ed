"""Looks for files that make the readers do anything but open them or raise an LmclockError.

    python -m tools.fuzz_files                     a minute
    python -m tools.fuzz_files --seconds 3600 --corpus build/fuzz
    python -m tools.fuzz_files --file crash-...    one file again

With atheris installed, inputs are led by coverage and `--corpus` grows; without it they are random
changes to the seeds, which find much less, and the first line of output says so. Besides an
exception of another kind, a file that takes more than a second, or the process more than 1 GB, is a
finding: it is written to the folder where the command runs, and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SLOW = 1.0  # seconds for one file
LONGEST = 4096  # bytes of an input
MEMORY = 1 << 10  # megabytes


def check(raw: bytes, folder: Path) -> None:
    """Open, decode and close a file of these bytes; raises whatever should not have been raised."""
    from lmclock.errors import LmclockError
    from lmclock.files import open_weights

    path = folder / "model.safetensors.index.json"
    path.write_bytes(raw)
    begin = time.perf_counter()
    try:
        with open_weights(path) as weights:
            for value in weights.metadata.values():
                list(value) if hasattr(value, "__iter__") else value
            for tensor in weights.tensors.values():
                tensor.unpack()
    except LmclockError as error:
        assert str(error).isprintable(), f"a message with control characters: {error}"
    seconds = time.perf_counter() - begin
    assert seconds < SLOW, f"{len(raw)} bytes took {seconds:.1f} s"


def seeds() -> Iterator[bytes]:
    """A small sound file of each kind, with every type of metadata and several formats."""
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    keys = [text(b"general.alignment") + struct.pack("<II", 4, 32)]
    keys += [text(b"s") + struct.pack("<I", 8) + text("é".encode())]
    for kind, size in enumerate((1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)):
        if size:
            keys.append(text(b"k%d" % kind) + struct.pack("<I", kind) + bytes(size))
            keys.append(text(b"a%d" % kind) + struct.pack("<IIQ", 9, kind, 2) + bytes(2 * size))
    keys.append(text(b"w") + struct.pack("<IIQ", 9, 8, 2) + text(b"ab") + text(b"x" * 300))
    keys.append(text(b"n") + struct.pack("<IIQIQ", 9, 9, 1, 0, 1) + b"\0")
    rows = [("a", 2, 0, 128), ("b", 1, 8, 34), ("c", 1, 12, 144), ("d", 1, 14, 210)]
    entries, data = b"", b""
    for name, height, code, size in rows:
        data += bytes(-len(data) % 32)
        width = {0: 16, 8: 32}.get(code, 256)
        entries += text(name.encode()) + struct.pack("<IQQIQ", 2, width, height, code, len(data))
        data += bytes(size)
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(keys)) + b"".join(keys) + entries
    yield raw + bytes(-len(raw) % 32) + data
    header = {
        "__metadata__": {"format": "pt", 'a "quote"': "\\ é"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
    }
    coded = json.dumps(header).encode()
    yield struct.pack("<Q", len(coded)) + coded + bytes(20)
    yield json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b"}}).encode()


def mutations(random_source: random.Random) -> Iterator[bytes]:
    """Seeds with a few bytes changed, cut out, repeated or set to an extreme number, for ever."""
    known = list(seeds())
    extremes = [struct.pack("<Q", number) for number in (0, 1, 2**31, 2**40, 2**62, 2**64 - 1)]
    while True:
        raw = bytearray(random_source.choice(known))
        for _ in range(random_source.randint(1, 4)):
            at = random_source.randrange(len(raw) + 1)
            end = at + random_source.randint(0, 16)
            some = bytes(random_source.choices(range(256), k=random_source.randint(1, 4)))
            pieces = (b"", some, bytes(raw[at:end]) * 2, random_source.choice(extremes))
            raw[at:end] = random_source.choice(pieces)
        yield bytes(raw[:LONGEST])


def fuzz_randomly(seconds: float, folder: Path) -> None:
    print("atheris is not installed: random changes, not led by coverage")
    begin, seed = time.monotonic(), time.time_ns()
    for number, raw in enumerate(mutations(random.Random(seed))):
        try:
            check(raw, folder)
        except BaseException:
            Path("crash-random").write_bytes(raw)
            print(f"input {number} of seed {seed} is in crash-random")
            raise
        if time.monotonic() - begin > seconds:
            print(f"{number + 1} files in {seconds:.0f} s, nothing found")
            return


def fuzz_by_coverage(seconds: float, corpus: Path, folder: Path) -> None:
    """Does not return: libFuzzer ends the process, with code 0 when it found nothing."""
    import atheris

    # Finders that are objects are an editable install's, whose loader leaves nothing instrumented.
    sys.meta_path = [finder for finder in sys.meta_path if isinstance(finder, type)]
    with atheris.instrument_imports(include=["lmclock"]):
        import lmclock.files.gguf
    loader = type(lmclock.files.gguf.__loader__).__name__
    assert loader == "AtherisSourceFileLoader", f"not instrumented, but loaded by {loader}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, raw in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(raw)
    options = [f"-max_total_time={seconds:.0f}", f"-max_len={LONGEST}", f"-rss_limit_mb={MEMORY}"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda raw: check(raw, folder))
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to look")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="inputs to keep")
    parser.add_argument("--file", type=Path, help="check this file and stop")
    chosen = parser.parse_args()
    memory = "/dev/shm"  # a file system without a disk: some ten times more inputs a second
    with tempfile.TemporaryDirectory(dir=memory if Path(memory).is_dir() else None) as name:
        if chosen.file:
            check(chosen.file.read_bytes(), Path(name))
            return
        try:
            fuzz_by_coverage(chosen.seconds, chosen.corpus, Path(name))
        except ModuleNotFoundError as error:
            if error.name != "atheris":
                raise
            fuzz_randomly(chosen.seconds, Path(name))


if __name__ == "__main__":
    main()
