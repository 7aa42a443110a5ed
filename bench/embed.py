"""Embedding beside other engines: 64 short texts, and one text of 256 tokens, through MiniLM.

    python -m bench.embed [--rounds 7] [--threads 2]

Every engine runs in a process of its own with the same number of threads, all in one interleaved
run, warm. lmclock is timed from outside, through `Model.embed`: tokeniser, scheduler, clock and
pooling are in its time. Of the others only the forward passes are, on token ids made before: no
tokeniser, no pooling. Texts are words drawn from wikitext-2, never the same again.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.common import (
    Job,
    Samples,
    Skipped,
    Worker,
    interleave,
    machine,
    publish,
    ratio,
    serve,
    start,
    table,
)
from bench.engines import timed
from lmclock import settings
from lmclock.files.pull import pull
from lmclock.text import from_folder

MODEL = "minilm"
BATCH = 32  # of the others, as sentence-transformers has it
PACKAGES = ("transformers", "torch", "onnxruntime", "numpy")
TOKENS = {"short": (8, 40), "long": (256, 256)}  # of a text, those around it included
COUNTS = {"short": 64, "long": 1}
PEER = "onnxruntime f32"
Made = tuple[Mapping[str, Any], Mapping[str, Job]]
Batch = Mapping[str, np.ndarray]


@dataclass
class Texts:
    """Draws texts of common words, each a single token, so that their lengths are known."""

    def __post_init__(self) -> None:
        tokenizer = from_folder(pull(MODEL))
        self.around = tokenizer.around
        vocabulary = [tokenizer.decode([at]).strip() for at in range(2000, 8000)]
        self.words = [w for w in vocabulary if w.isalpha() and len(tokenizer.spans(w)[0]) == 1]
        self.ids = {word: tokenizer.spans(word)[0][0] for word in self.words}
        self.random = np.random.default_rng(1)

    def draw(self, kind: str) -> list[list[str]]:
        """Texts as words: so many and so long as `kind` says."""
        low, high = TOKENS[kind]
        sizes = np.linspace(low, high, COUNTS[kind]).astype(int) - 2
        return [self.random.choice(self.words, size).tolist() for size in sizes]

    def batches(self, kind: str) -> list[Batch]:
        """The texts as sentence-transformers would feed them: the longest first, BATCH at a time,
        padded to the longest of the batch.
        """
        rows = [self.around([self.ids[w] for w in text]).ids for text in self.draw(kind)]
        rows.sort(key=len, reverse=True)
        return [_padded(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]


def _padded(rows: Sequence[Sequence[int]]) -> Batch:
    ids = np.zeros((len(rows), len(rows[0])), np.int64)
    mask = np.zeros_like(ids)
    for row, own, seen in zip(rows, ids, mask, strict=True):
        own[: len(row)] = row
        seen[: len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def lmclock_jobs(threads: int, weights: str | None = None) -> Made:
    """The whole engine through the Python API."""
    from lmclock.model import load

    texts, options = Texts(), {"weights": weights} if weights else {}
    model = load(MODEL, threads=threads, **options)  # type: ignore[arg-type]

    def job(kind: str) -> float:
        drawn = [" ".join(words) for words in texts.draw(kind)]
        return timed(lambda: model.embed(drawn))

    return {"weights": (weights or "f32").upper()}, {kind: partial(job, kind) for kind in TOKENS}


def torch_jobs(threads: int) -> Made:
    """transformers with the attention it chooses itself (SDPA)."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model, texts = transformers.AutoModel.from_pretrained(pull(MODEL)).eval(), Texts()

    def job(kind: str) -> float:
        batches = [{k: torch.from_numpy(v) for k, v in b.items()} for b in texts.batches(kind)]
        with torch.inference_mode():
            return timed(lambda: [model(**batch) for batch in batches])

    return {"weights": "F32"}, {kind: partial(job, kind) for kind in TOKENS}


def onnx_jobs(threads: int, int8: bool = False) -> Made:
    """onnxruntime on torch's export, fused by its own optimizer for BERT; or its dynamic int8."""
    import onnxruntime

    texts, folder = Texts(), tempfile.TemporaryDirectory()
    path = _exported(Path(folder.name))
    if int8:  # of the plain graph: its quantiser does not know all of the fused nodes
        from onnxruntime.quantization import quantize_dynamic

        whole, path = path, Path(folder.name) / "int8.onnx"
        quantize_dynamic(whole, path, extra_options={"DefaultTensorType": 1})  # float
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}

    def job(kind: str) -> float:
        batches = [{k: v for k, v in b.items() if k in wanted} for b in texts.batches(kind)]
        return timed(lambda: [session.run(None, batch) for batch in batches])

    job("short")
    folder.cleanup()
    return {"weights": "INT8" if int8 else "F32"}, {kind: partial(job, kind) for kind in TOKENS}


def _exported(folder: Path) -> Path:
    """MiniLM as ONNX with fused attention, LayerNorm and GELU."""
    import torch
    import transformers
    from onnxruntime.transformers import optimizer

    logging.disable(logging.WARNING)
    model = transformers.AutoModel.from_pretrained(pull(MODEL), attn_implementation="eager")
    model.requires_grad_(False)

    class Rows(torch.nn.Module):
        def forward(self, *given: Any) -> Any:
            return model(**dict(zip(NAMES, given, strict=True))).last_hidden_state

    ids = torch.ones(2, 7, dtype=torch.long)
    axes = {name: {0: "texts", 1: "tokens"} for name in (*NAMES, "rows")}
    plain, fused = folder / "plain.onnx", folder / "fused.onnx"
    try:
        torch.onnx.export(
            Rows().eval(), (ids, ids, ids * 0), plain, dynamo=False, opset_version=17,
            input_names=list(NAMES), output_names=["rows"], dynamic_axes=axes,
        )  # fmt: skip
    except (TypeError, RuntimeError) as error:
        raise Skipped(f"torch.onnx.export failed: {str(error).splitlines()[0]}") from None
    made = optimizer.optimize_model(
        str(plain), model_type="bert", num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size,
    )  # fmt: skip
    made.save_model_to_file(str(fused))
    return fused


NAMES = ("input_ids", "attention_mask", "token_type_ids")
PEERS: dict[str, Callable[[int], Made]] = {
    "lmclock f32": lmclock_jobs,
    "lmclock q8_0": partial(lmclock_jobs, weights="q8_0"),
    "transformers f32": torch_jobs,
    "onnxruntime f32": onnx_jobs,
    "onnxruntime int8": partial(onnx_jobs, int8=True),
}


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=settings.threads)
@click.option("--only", multiple=True, type=click.Choice(list(PEERS)), help="Peers to measure.")
@click.option("--dry", is_flag=True, help="Print only.")
@click.option("--worker", hidden=True)
def main(rounds: int, threads: int, only: tuple[str, ...], dry: bool, worker: str | None) -> None:
    if worker:
        serve(lambda: PEERS[worker](threads))
        return
    workers, skipped = start("bench.embed", only or PEERS, threads=threads)
    samples = interleave(
        {(name, job): partial(one.ask, job) for name, one in workers.items() for job in one.jobs},
        rounds,
    )
    for one in workers.values():
        one.close()
    publish("embed", report(workers, samples, skipped, threads), dry)


def report(
    workers: Mapping[str, Worker], samples: Samples, skipped: list[str], threads: int
) -> str:
    """The section of the document."""
    texts = Texts()
    count = {kind: sum(len(text) + 2 for text in texts.draw(kind)) for kind in TOKENS}
    rows = []
    for name in workers:
        cells = [name]
        for kind in TOKENS:
            times = samples[name, kind]
            median = statistics.median(times)
            beside = f"{ratio(samples[PEER, kind], times):.2f}" if PEER in workers else ""
            best = f"{1000 * median:.1f} ({1000 * min(times):.1f})"
            cells += [best, f"{count[kind] / median:,.0f}", beside]
        rows.append(cells)
    head = ["engine"]
    for kind in TOKENS:
        what = f"{COUNTS[kind]} texts" if COUNTS[kind] > 1 else "a text"
        head += [f"{what}, {count[kind]} tokens: ms", "tok/s", f"x {PEER}"]
    rounds = len(next(iter(samples.values())))
    return "\n\n".join([
        f"## Embedding texts beside other engines\n\n{machine(threads, PACKAGES)}",
        METHOD.format(rounds=rounds, batch=BATCH),
        table(head, rows),
        "\n".join(f"- {note}" for note in skipped),
    ]).rstrip()  # fmt: skip


METHOD = """all-MiniLM-L6-v2, the packaged file; medians of {rounds} interleaved rounds, the \
fastest in brackets. lmclock runs through its Python API, with tokeniser, scheduler, clock and \
pooling in its time. Of the others only the forward passes are timed, in batches of {batch} texts \
of similar length, padded; onnxruntime runs torch's export, fused by its own optimizer for BERT, \
and the same quantised dynamically to int8. lmclock q8_0: weights rounded to q8_0 when they are \
loaded, activations to int8 per 32 elements."""


if __name__ == "__main__":
    main()
