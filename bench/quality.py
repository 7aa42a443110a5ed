"""Perplexity and KL divergence of the quantised run against the dequantised fp32 model.

    python -m bench.quality [--windows 33]

wikitext-2 test in windows of 512 tokens, the second half of each scored, as llama-perplexity does.
The reference is transformers in fp32 on weights dequantised from the same file; it is itself held
to lmclock's array machine. lmclock and llama.cpp see the same token ids, and the difference of
their divergences is taken token by token.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from bench.common import MODEL, machine, publish, table, transformers_model
from lmclock import settings
from lmclock.engine import Request
from lmclock.files.pull import pull
from lmclock.model import Model, load

WINDOW = 512
FIRST = WINDOW // 2  # positions before it are context only
CHECKED = 64  # tokens on which the reference is compared with the array machine
PACKAGES = ("llama-cpp-python", "transformers", "torch", "gguf")
Logits = Callable[[Sequence[int]], np.ndarray]  # ids -> (tokens, vocabulary)
NAMES = {"-O2": "lmclock -O2", "--precise": "lmclock --precise", "llama.cpp": "llama.cpp"}


@click.command(help=__doc__)
@click.option("--windows", type=click.IntRange(1), default=33, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=settings.threads)
@click.option("--dry", is_flag=True, help="Print only.")
def main(windows: int, threads: int, dry: bool) -> None:
    with (
        load(MODEL, threads=threads, context=WINDOW, picks=WINDOW) as default,
        load(MODEL, threads=threads, context=WINDOW, picks=WINDOW, level=1) as precise,
    ):
        reference = transformers_logits(threads)
        runs: dict[str, Logits] = {
            NAMES["-O2"]: lambda ids: logits(default, ids),
            NAMES["--precise"]: lambda ids: logits(precise, ids),
        }
        notes = _add_llama(runs, threads)
        text = gzip.decompress(Path(pull("wikitext2")).read_bytes()).decode()
        ids = default.tokenizer.encode(text)[: windows * WINDOW]
        check = check_reference(reference, ids[:CHECKED])
        scores: dict[str, list[Scores]] = {name: [] for name in runs}
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            some = ids[start : start + WINDOW]
            base = Base.of(reference(some), some)
            for name, run in runs.items():
                scores[name].append(base.score(run(some)))
            print(f"window {start // WINDOW + 1} of {windows}", file=sys.stderr)
    found = {name: Scores.joined(parts) for name, parts in scores.items()}
    publish("quality", report(found, check, notes, threads), dry)


def logits(model: Model, ids: Sequence[int]) -> np.ndarray:
    """(tokens, vocabulary) through the engine."""
    rows: list[np.ndarray] = []
    name = model.engine.facts.logits
    assert name
    want = {name: lambda first, values: rows.append(values.copy())}
    model.engine.add(Request(ids, max_new_tokens=0, pick_all=True, want=want))
    for event in model.engine.run():
        assert event.finish != "error", event.message
    return np.concatenate(rows)


def transformers_logits(threads: int) -> Logits:
    """The reference: transformers in fp32."""
    import torch

    model = transformers_model(threads, "float32")

    def run(ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
        return found

    return run


def check_reference(reference: Logits, ids: Sequence[int]) -> str:
    """How far transformers and the array machine, both fp32 on the same weights, are apart."""
    with load(MODEL, machine="array", level=0, cache="f32", context=CHECKED, picks=CHECKED) as own:
        difference = np.abs(logits(own, ids) - reference(ids)).max()
    return (
        f"Reference checked: on the first {len(ids)} tokens its logits and those of lmclock's "
        f"array machine (-O0, cache f32) differ by at most {difference:.1e}."
    )


def _add_llama(runs: dict[str, Logits], threads: int) -> list[str]:
    """Add llama.cpp to the runs, or say why not; notes on it."""
    try:
        from bench.llama import Llama
    except ModuleNotFoundError as error:
        return [f"llama.cpp was skipped: {error.name} is not installed."]
    llama = Llama(str(pull(MODEL)), threads, flash=True, context=WINDOW, batch=WINDOW)
    runs[NAMES["llama.cpp"]] = llama.logits
    return llama.notes


@dataclass(frozen=True)
class Scores:
    """Per scored token: KL divergence from the reference, negative log-likelihood here and there,
    probability of the text's token less the reference's, and whether the most likely one agrees.
    """

    divergence: np.ndarray
    loss: np.ndarray
    base_loss: np.ndarray
    shift: np.ndarray
    agrees: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        names = Scores.__dataclass_fields__
        return Scores(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


@dataclass(frozen=True)
class Base:
    """The reference's logits (scored, vocabulary) of one window, what makes probabilities of them,
    and the next tokens.
    """

    logits: np.ndarray
    total: np.ndarray
    chances: np.ndarray
    targets: np.ndarray

    @staticmethod
    def of(logits: np.ndarray, ids: Sequence[int]) -> Base:
        kept = logits[FIRST:-1]
        chances, total = softmax(kept)
        return Base(kept, total, chances, np.array(ids[FIRST + 1 :]))

    def score(self, logits: np.ndarray) -> Scores:
        """Scores of another run of the same window."""
        kept = logits[FIRST:-1]
        total, rows = softmax(kept)[1], np.arange(len(kept))
        own, base = kept[rows, self.targets] - total, self.logits[rows, self.targets] - self.total
        # sum p (log p - log q); the logarithms are near ten in size, their differences are not
        apart = np.einsum("rv,rv->r", self.chances, self.logits - kept, dtype=np.float64)
        return Scores(
            divergence=apart - self.total + total,
            loss=-own,
            base_loss=-base,
            shift=np.exp(own) - np.exp(base),
            agrees=kept.argmax(axis=1) == self.logits.argmax(axis=1),
        )


def softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities (rows, vocabulary), logarithm of the sum of exponentials (rows,) float64)."""
    most = logits.max(axis=1, keepdims=True)
    powers = np.exp(logits - most)
    sums = powers.sum(axis=1, dtype=np.float64)
    powers /= sums[:, None].astype(np.float32)
    return powers, np.log(sums) + most[:, 0]


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """(mean, its standard error), tokens taken as independent."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def report(found: dict[str, Scores], check: str, notes: list[str], threads: int) -> str:
    """The section of the document."""
    rows = []
    for name, s in found.items():
        mean, error = mean_error(s.divergence)
        change, uncertain = mean_error(s.loss - s.base_loss)
        high, higher = np.quantile(s.divergence, [0.99, 0.999])
        rows.append([
            name, f"{math.exp(s.loss.mean()):.3f}", f"{change:+.5f} ± {uncertain:.5f}",
            f"{mean:.6f} ± {error:.6f}", f"{np.median(s.divergence):.6f}", f"{high:.4f}",
            f"{higher:.4f}", f"{s.divergence.max():.3f}", f"{100 * s.agrees.mean():.2f} %",
            f"{100 * math.sqrt((s.shift**2).mean()):.3f} %",
        ])  # fmt: skip
    any_run = next(iter(found.values()))
    scored = len(any_run.loss)
    head = ["run", "perplexity", "ln ratio to fp32", "mean KL", "median", "99 %", "99.9 %",
            "highest", "same top token", "RMS change of p"]  # fmt: skip
    return "\n\n".join(filter(None, [
        f"## Quality beside llama.cpp\n\n{machine(threads, PACKAGES)}",
        METHOD.format(scored=scored, perplexity=math.exp(any_run.base_loss.mean())),
        check, table(head, rows), *_differences(found),
        "\n".join(f"- {note}" for note in notes),
    ]))  # fmt: skip


def _differences(found: dict[str, Scores]) -> list[str]:
    """lmclock's divergence less llama.cpp's, paired by token and, more cautiously, by window."""
    if NAMES["llama.cpp"] not in found:
        return []
    peer = found[NAMES["llama.cpp"]].divergence
    rows = []
    for name in (NAMES["-O2"], NAMES["--precise"]):
        difference = found[name].divergence - peer
        mean, error = mean_error(difference)
        windows = difference.reshape(-1, WINDOW - FIRST - 1).mean(axis=1)
        by_window = f"{mean / mean_error(windows)[1]:+.1f}" if len(windows) > 1 else ""
        verdict = "no worse" if mean <= 2 * error else "worse"
        rows.append([name, f"{mean:+.6f}", f"{error:.6f}", f"{mean / error:+.1f}", by_window,
                     verdict])  # fmt: skip
    head = ["mean KL less llama.cpp's", "difference", "standard error", "in standard errors",
            "the same by windows", "at 2 standard errors"]  # fmt: skip
    return [table(head, rows)]


METHOD = """SmolLM2-135M-Instruct, the packaged Q4_1 file, on wikitext-2 test (raw): windows of \
512 tokens, of which the second half is scored, {scored} tokens in all. KL divergence is that of \
the reference's distribution from the run's, in nats a token. The reference (perplexity \
{perplexity:.3f}) is transformers in fp32 on weights dequantised from the same file. lmclock \
keeps keys and values in f16, at -O2 (activations rounded to int8 per 32) and --precise \
(activations in f32); llama.cpp as it comes: keys and values in f16, flash attention, n_ubatch = \
512."""


if __name__ == "__main__":
    main()
