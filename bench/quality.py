"""Perplexity and KL divergence of quantised runs against the dequantised fp32 model.

    python -m bench.quality [--windows 32] [--only Q4_0] [--resume] [--seconds 80]

wikitext-2 test in windows of 512 tokens, the second half of each scored, as llama-perplexity does.
One stage per block format: the packaged file, and those that llama.cpp's quantiser makes of it. The
reference is transformers in fp32 on weights dequantised from the same file; it is itself held to
lmclock's array machine. lmclock, in each of its modes, and llama.cpp see the same token ids, and
the difference of their divergences is taken token by token.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from bench.common import machine, table, transformers_model
from bench.models import PACKAGED, requantised
from bench.stages import FOLDER, Goal, Plan, Stage, Store, options
from lmclock.engine import Request
from lmclock.files.pull import pull
from lmclock.model import Model, load

WINDOW = 512
FIRST = WINDOW // 2  # positions before it are context only
CHECKED = 64  # tokens on which the reference is compared with the array machine
PACKAGES = ("llama-cpp-python", "transformers", "torch", "gguf")
FORMATS = (PACKAGED, "Q4_0", "Q5_0", "Q8_0", "Q4_K_M", "Q6_K")
Logits = Callable[[Sequence[int]], np.ndarray]  # ids -> (tokens, vocabulary)
MODES: dict[str, dict[str, object]] = {
    "lmclock": {},
    "lmclock invariant": {"invariant": True},
    "lmclock --precise": {"level": 1},
}
PEER = "llama.cpp"


@click.command(help=__doc__)
@options(rounds=1)
@click.option("--windows", type=click.IntRange(1), default=32, show_default=True)
def main(plan: Plan, windows: int) -> None:
    store = Store("quality")
    for kind in FORMATS[:1] if plan.quick else FORMATS:
        if plan.wants(kind) and not plan.late:
            measure(store, kind, 1 if plan.quick else windows, plan)
    found = {kind: scores for kind in FORMATS if (scores := read(kind)) and kind in store.stages}
    store.finish(plan, "Quality beside llama.cpp", parts(found, store), goals(found))


def measure(store: Store, kind: str, windows: int, plan: Plan) -> None:
    """Score windows of one file and keep what was found after each."""
    found = read(kind) if plan.resume else {}
    done = len(next(iter(found.values())).loss) // (WINDOW - FIRST - 1) if found else 0
    if done >= windows:
        return
    path = requantised(kind)
    with ExitStack() as models:
        runs: dict[str, Logits] = {}
        for name, mode in MODES.items():
            given = {"threads": plan.threads, "context": WINDOW, "picks": WINDOW, **mode}
            model = models.enter_context(load(str(path), **given))  # type: ignore[arg-type]
            runs[name] = lambda ids, model=model: logits(model, ids)  # type: ignore[misc]
            tokenizer = model.tokenizer
        notes = _add_llama(runs, path, plan.threads)
        text = gzip.decompress(Path(pull("wikitext2")).read_bytes()).decode()
        ids = tokenizer.encode(text)[: windows * WINDOW]
        reference = transformers_logits(path, plan.threads)
        check = check_reference(path, reference, ids[:CHECKED])
        for start in range(done * WINDOW, len(ids) - WINDOW + 1, WINDOW):
            if plan.late and found:
                break
            some = ids[start : start + WINDOW]
            base = Base.of(reference(some), some)
            new = {name: base.score(run(some)) for name, run in runs.items()}
            found = {n: Scores.joined([found[n], s] if n in found else [s]) for n, s in new.items()}
            write(kind, found)
            store.stages[kind] = Stage(
                [{"windows": start // WINDOW + 1}], {"llama.cpp": {"notes": [*notes]}},
                where=machine(plan.threads, PACKAGES), skipped=[f"{kind}: {check}"],
            )  # fmt: skip
            store.save()
            print(f"{kind}: window {start // WINDOW + 1} of {windows}", file=sys.stderr)


def write(kind: str, found: dict[str, Scores]) -> None:
    """Keep the scores of a file's runs in build/bench."""
    arrays = {f"{run}|{name}": getattr(scores, name)
              for run, scores in found.items() for name in Scores.__dataclass_fields__}  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    np.savez(FOLDER / f"quality-{kind}.npz", **arrays)


def read(kind: str) -> dict[str, Scores]:
    """What `write` kept; nothing where there is nothing."""
    path = FOLDER / f"quality-{kind}.npz"
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        runs = dict.fromkeys(name.split("|")[0] for name in arrays)
        names = tuple(Scores.__dataclass_fields__)
        return {run: Scores(*(arrays[f"{run}|{name}"] for name in names)) for run in runs}


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


def transformers_logits(path: Path, threads: int) -> Logits:
    """The reference: transformers in fp32."""
    import torch

    model = transformers_model(threads, "float32", path)

    def run(ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
        return found

    return run


def check_reference(path: Path, reference: Logits, ids: Sequence[int]) -> str:
    """How far transformers and the array machine, both fp32 on the same weights, are apart."""
    given = {"machine": "array", "level": 0, "cache": "f32", "context": CHECKED, "picks": CHECKED}
    with load(str(path), **given) as own:  # type: ignore[arg-type]
        difference = np.abs(logits(own, ids) - reference(ids)).max()
    return (
        f"on the first {len(ids)} tokens the reference's logits and those of lmclock's array "
        f"machine (-O0, cache f32) differ by at most {difference:.1e}"
    )


def _add_llama(runs: dict[str, Logits], path: Path, threads: int) -> list[str]:
    """Add llama.cpp to the runs, or say why not; notes on it."""
    try:
        from bench.llama import Llama
    except ModuleNotFoundError as error:
        return [f"llama.cpp was skipped: {error.name} is not installed."]
    llama = Llama(str(path), threads, flash=True, context=WINDOW, batch=WINDOW)
    runs[PEER] = llama.logits
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


def paired(scores: dict[str, Scores], run: str) -> tuple[float, float] | None:
    """(mean, standard error) of a run's divergence less llama.cpp's, token by token."""
    if PEER not in scores or run not in scores:
        return None
    return mean_error(scores[run].divergence - scores[PEER].divergence)


def goals(found: dict[str, dict[str, Scores]]) -> list[Goal]:
    """Line 8: differences in standard errors, per format and mode."""
    rows = []
    for kind in FORMATS:
        for mode in MODES:
            both = paired(found.get(kind, {}), mode)
            value = both[0] / both[1] if both else None
            rows.append(Goal(f"{kind}, {mode}: KL less llama.cpp's, in standard errors",
                             value, 2.0, "se", most=True))  # fmt: skip
    tokens = len(found[PACKAGED][PEER].loss) if PEER in found.get(PACKAGED, {}) else None
    rows.append(Goal("tokens scored of the packaged file", tokens, 8000, "tokens"))
    return rows


def parts(found: dict[str, dict[str, Scores]], store: Store) -> Iterator[str]:
    """The text of the section."""
    yield METHOD
    for kind, scores in found.items():
        some = next(iter(scores.values()))
        yield (
            f"{kind}{' (the packaged file)' if kind == PACKAGED else ''}: {len(some.loss)} tokens "
            f"scored; perplexity of the reference {math.exp(some.base_loss.mean()):.3f}."
        )
        yield table(HEAD, [_row(name, s) for name, s in scores.items()])
        yield from _differences(scores)


HEAD = ["run", "perplexity", "ln ratio to fp32", "mean KL", "median", "99 %", "99.9 %", "highest",
        "same top token", "RMS change of p"]  # fmt: skip


def _row(name: str, s: Scores) -> list[str]:
    mean, error = mean_error(s.divergence)
    change, uncertain = mean_error(s.loss - s.base_loss)
    high, higher = np.quantile(s.divergence, [0.99, 0.999])
    return [
        name, f"{math.exp(s.loss.mean()):.3f}", f"{change:+.5f} ± {uncertain:.5f}",
        f"{mean:.6f} ± {error:.6f}", f"{np.median(s.divergence):.6f}", f"{high:.4f}",
        f"{higher:.4f}", f"{s.divergence.max():.3f}", f"{100 * s.agrees.mean():.2f} %",
        f"{100 * math.sqrt((s.shift**2).mean()):.3f} %",
    ]  # fmt: skip


def _differences(scores: dict[str, Scores]) -> Iterator[str]:
    """lmclock's divergence less llama.cpp's, paired by token and, more cautiously, by window."""
    rows = []
    for name in MODES:
        both = paired(scores, name)
        if not both:
            continue
        mean, error = both
        difference = scores[name].divergence - scores[PEER].divergence
        windows = difference.reshape(-1, WINDOW - FIRST - 1).mean(axis=1)
        by_window = f"{mean / mean_error(windows)[1]:+.1f}" if len(windows) > 1 else ""
        verdict = "no worse" if mean <= 2 * error else "worse"
        rows.append([name, f"{mean:+.6f}", f"{error:.6f}", f"{mean / error:+.1f}", by_window,
                     verdict])  # fmt: skip
    head = ["mean KL less llama.cpp's", "difference", "standard error", "in standard errors",
            "the same by windows", "at 2 standard errors"]  # fmt: skip
    if rows:
        yield table(head, rows)


METHOD = """SmolLM2-135M-Instruct on wikitext-2 test (raw): windows of 512 tokens, of which the \
second half is scored; of the packaged file and of those that llama.cpp's quantiser made of it. \
KL divergence is that of the reference's distribution from the run's, in nats a token. \
The reference is transformers in fp32 on weights dequantised from the same file. \
lmclock keeps keys and values in f16: as it comes (activations rounded to int8 per 32), in \
invariant mode, and --precise (activations in f32); llama.cpp as it comes: keys and values in f16, \
flash attention, n_ubatch = 512."""


if __name__ == "__main__":
    main()
