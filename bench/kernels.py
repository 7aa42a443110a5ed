"""The matmul kernels alone, each format beside what the processor can do.

    python -m bench.kernels [--path amx] [--threads 2] [--rounds 7] [--formats q4_1,q8_0]

Per format: packing; one row against weights in memory (GB/s, and of a read stream over as many
bytes); many rows (GOPS, and of the peak of dot products). Each round measures ceiling and kernel
after one another, so that a slow moment of the machine meets both; the median over rounds is
printed. Thread starts, Python and the rounding of activations are in no figure. Prints a table and
writes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import numpy as np

from lmclock import _native
from lmclock.formats import FORMATS, SCALE_WORDS, Format

MEMORY = 64 << 20  # bytes of packed weights that one row meets: past every private cache
WIDTH = 1536
OUTPUTS = 768  # many rows: weights that stay in the second-level cache
ROWS = (4, 16, 64, 512)


def random_weights(fmt: Format, outputs: int, width: int) -> np.ndarray:
    """Valid bytes of (outputs, width) with scales near 0.01, as one row of uint8."""
    rng = np.random.default_rng(fmt.code)
    if fmt.block == 1:
        values = rng.normal(scale=0.01, size=outputs * width).astype(np.float32)
        if fmt.name == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if fmt.name == "f16" else np.float32).view(np.uint8)
    raw = rng.integers(0, 256, outputs * fmt.row_bytes(width), np.uint8)
    for word in SCALE_WORDS[fmt.name]:
        raw.reshape(-1, fmt.bytes).view("<f2")[:, word] = 0.01
    return raw


def arithmetic(fmt: Format) -> tuple[str, str]:
    """How activations of this format's products are rounded, and the peak that applies."""
    if fmt.name == "bf16":
        return "bf16", "bf16"
    return ("none", "f32") if fmt.block == 1 else ("q8_32", "int8")


def paired(
    ceiling: Callable[[], float], kernel: Callable[[], float], rounds: int
) -> tuple[float, float]:
    """Median rate of the kernel, and median of its ratio to the ceiling of the same round."""
    pairs = [(ceiling(), kernel()) for _ in range(rounds)]
    return median(k for _, k in pairs), median(k / c for c, k in pairs)


def row(fmt: Format, path: str, threads: int, rounds: int) -> list[str]:
    """One line of the table."""
    act, kind = arithmetic(fmt)
    outputs = int(MEMORY / fmt.row_bytes(WIDTH)) // 32 * 32
    raw = random_weights(fmt, outputs, WIDTH)
    weights = _native.pack(fmt.code, outputs, WIDTH, raw, path=path, threads=threads)
    packing = min(_native.time_pack(fmt.code, outputs, WIDTH, raw, threads, 3, path))
    one = np.random.default_rng(0).normal(size=(1, WIDTH)).astype(np.float32)
    plain = np.ones(weights.nbytes, np.uint8)
    speed, share = paired(
        lambda: plain.nbytes / min(_native.time_stream(plain, threads, 3, path)) / 1e9,
        lambda: weights.nbytes / min(_native.time_linear(weights, one, act, threads, 3)) / 1e9,
        rounds,
    )
    cells = [fmt.name, weights.layout, f"{raw.nbytes / packing / 1e9:.1f}"]
    cells += [f"{speed:.1f}", f"{100 * share:.0f} %"]
    raw = random_weights(fmt, OUTPUTS, WIDTH)
    few = _native.pack(fmt.code, OUTPUTS, WIDTH, raw, path=path)
    for rows in ROWS:
        x = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype(np.float32)
        operations = 2.0 * rows * OUTPUTS * WIDTH
        speed, share = paired(
            lambda: max(_native.time_peak(kind, 64, threads, 5, path)) / 1e9,
            lambda x=x, n=operations: (  # type: ignore[misc]
                n / min(_native.time_linear(few, x, act, threads, 5)) / 1e9
            ),
            rounds,
        )
        cells.append(f"{speed:.0f} ({100 * share:.0f} %)")
    return cells


def main() -> None:
    paths = _native.simd_paths()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", choices=paths, default=paths[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", default=",".join(FORMATS))
    args = parser.parse_args()
    print(f"{args.path}, {args.threads} threads; peaks of all threads, median of {args.rounds}:")
    for name in dict.fromkeys((args.path, "avx512" if "avx512" in paths else args.path)):
        peaks = {
            kind: median(_native.time_peak(kind, 64, args.threads, args.rounds, name)) / 1e9
            for kind in ("int8", "bf16", "f32")
        }
        print(f"  {name}: " + ", ".join(f"{kind} {rate:.0f} GOPS" for kind, rate in peaks.items()))
    columns = ["format", "layout", "pack GB/s", "1 row GB/s", "of stream"]
    columns += [f"{rows} rows GOPS (of peak)" for rows in ROWS]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name in args.formats.split(","):
        cells = row(FORMATS[name], args.path, args.threads, args.rounds)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
