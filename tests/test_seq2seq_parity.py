"""Tiny random encoder-decoders against transformers and torch.nn.Transformer in fp32: encoder and
teacher-forced decoder in one cycle, and the decoder from its caches row by row, two sentences of
different lengths in each batch.

Logits are near one, so that 1e-4 means something; the controls show that a wrong bucket, offset or
scale is far outside of it.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmclock import _native
from lmclock.assemble import Assembled, assemble
from lmclock.errors import FileError, UnsupportedError
from lmclock.passes import optimise
from tests.helpers import Runner, arithmetic_error, stored
from tests.tiny_seq2seq import (
    CLASSICS,
    CONFIGS,
    random_classic,
    random_model,
    teacher_forced,
)

TOLERANCE = 1e-4
PATHS = _native.simd_paths()
MACHINES = [("array", {}), ("array", {"namespace": "torch"}),
            *(("native", {"threads": 2, "path": path}) for path in PATHS)]  # fmt: skip
NAMES = ["numpy", "torch", *PATHS]
Pair = tuple[list[int], list[int]]


def sentences(source_vocab: int, vocab: int) -> dict[str, Pair]:
    """Source and target ids by name: long enough for far buckets, and to cross pages."""
    rng = np.random.default_rng(7)
    lengths = {"a": (37, 23), "b": (5, 11)}
    return {
        name: (rng.integers(0, source_vocab, s).tolist(), rng.integers(0, vocab, t).tolist())
        for name, (s, t) in lengths.items()
    }


@functools.cache
def checkpoint(case: str) -> tuple[Assembled, dict[str, Pair], dict[str, np.ndarray]]:
    """What a case assembles to, sentences of it, and their logits by the reference."""
    folder = Path(tempfile.mkdtemp())
    if case in CLASSICS:
        classic = random_classic(case)
        classic.save(folder)
        ours = assemble(folder, cache="f32")
        pairs = sentences(ours.config.source_vocab, ours.config.vocab)
        with torch.no_grad():
            want = {n: classic(torch.tensor([s]), torch.tensor([t]))[0].numpy()
                    for n, (s, t) in pairs.items()}  # fmt: skip
        return ours, pairs, want
    model = random_model(case)
    model.save_pretrained(folder)
    ours = assemble(folder, cache="f32")
    pairs = sentences(VOCABULARIES.get(case, ours.config.vocab), ours.config.vocab)
    return ours, pairs, {n: teacher_forced(model, *pair) for n, pair in pairs.items()}


VOCABULARIES = {"marian-two-vocabularies": 96}


def forced(model: Assembled, pairs: dict[str, Pair], machine: str, **options: Any) -> Any:
    """Logits of all target rows, encoder and decoder in one cycle."""
    runner = Runner(model.program, model.weights, machine, **options)
    work, source = ({n: p[k] for n, p in pairs.items()} for k in (1, 0))
    return runner.cycle(work, source, pick="all")


def cached(model: Assembled, pairs: dict[str, Pair], machine: str, **options: Any) -> Any:
    """The same from caches: three rows with the encoder, then one by one; a shorter target ends."""
    runner = Runner(model.program, model.weights, machine, **options)
    first = runner.cycle({n: t[:3] for n, (_, t) in pairs.items()},
                         {n: s for n, (s, _) in pairs.items()}, pick="all")  # fmt: skip
    rows = {name: [got] for name, got in first.items()}
    for at in range(3, max(len(t) for _, t in pairs.values())):
        work = {n: t[at : at + 1] for n, (_, t) in pairs.items() if at < len(t)}
        for name, got in runner.cycle(work).items():
            rows[name].append(got)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def worst(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(got[name] - want[name]).max()) for name in want)


@pytest.mark.parametrize(("machine", "options"), MACHINES, ids=NAMES)
@pytest.mark.parametrize("case", [*CONFIGS, *CLASSICS])
def test_parity(case: str, machine: str, options: dict[str, Any]) -> None:
    ours, pairs, want = checkpoint(case)
    assert 0.4 < np.concatenate([*want.values()]).std() < 6
    for run in (forced, cached):
        found = worst(run(ours, pairs, machine, **options), want)
        assert found <= TOLERANCE, f"{run.__name__}: {found}"


# --- quantised weights: the native machine against the array one, which runs the same rounding


FORMATS = ("q8_0", "q4_0", "q4_1", "q5_0")


def quantised(model: Assembled, form: str, level: int) -> Assembled:
    """The model with its matrices in a block format; level 2 rounds activations."""
    weights, declared = {}, []
    for w in model.program.weights:
        matrix = w.shape[0] > 1 and "rel_b" not in w.name and "position" not in w.name
        fmt = form if matrix else "f32"
        weights[w.name] = stored(w.name, model.weights[w.name].unpack(), fmt)
        declared.append(replace(w, format=fmt))
    plain = replace(model.program, weights=tuple(declared))
    program = optimise(plain, level, invariant=True)
    return replace(model, program=program, weights=weights)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ["marian", "t5-gated"])
def test_quantised(case: str, form: str) -> None:
    """Exact activations to 1e-4 of the dequantised weights; rounded ones to what the few that fall
    on the other side of a step (the two machines sum in different orders) make of it.
    """
    ours, pairs, exact = checkpoint(case)
    for level, tolerance in ((1, TOLERANCE), (2, None)):
        model = quantised(ours, form, level)
        rounds = {i["act"] for s in model.program.sections for i in s.instructions
                  if "act" in i.row.attrs}  # fmt: skip
        assert ("q8_32" in rounds) == (level == 2)
        want = forced(model, pairs, "array")
        assert worst(want, exact) > 10 * TOLERANCE, "rounding has done nothing"
        for path in PATHS:
            got = forced(model, pairs, "native", threads=2, path=path)
            if tolerance:
                assert worst(got, want) <= tolerance, f"{path}: {worst(got, want)}"
            for name in want:
                assert arithmetic_error(got[name], want[name]) < 5e-4, path


# --- what the tolerance would catch, and what is refused


@pytest.mark.parametrize(
    ("case", "op", "attr"),
    [("t5", "attend", "rel_bias"), ("bart", "embed", "offset"), ("marian", "embed", "scale"),
     ("t5", "linear", "scale"), ("t5", "attend", "qk_scale")],
)  # fmt: skip
def test_a_forgotten_attribute_is_far_off(case: str, op: str, attr: str) -> None:
    ours, pairs, want = checkpoint(case)
    sections = tuple(
        replace(s, instructions=tuple(
            replace(i, attrs=tuple(a for a in i.attrs if a[0] != attr)) if i.op == op else i
            for i in s.instructions
        ))
        for s in ours.program.sections
    )  # fmt: skip
    wrong = replace(ours, program=ours.program.with_sections(sections))
    assert worst(forced(wrong, pairs, "array"), want) > 100 * TOLERANCE


def changed(case: str, folder: Path, change: dict[str, Any]) -> None:
    model = random_model(case)
    for key, value in change.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("bart", {"normalize_before": True}, "normalize_before is 'True'; valid: false"),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings"),
        ("marian", {"alibi_bias_max": 8}, "alibi_bias_max=8 may change the arithmetic"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj is 'gated-mish'; valid"),
        ("t5", {"relative_attention_num_buckets": 6}, "6 buckets do not share distances"),
    ],
)
def test_options_that_are_refused(
    case: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changed(case, tmp_path, {})
    edit(tmp_path, change)
    with pytest.raises((FileError, UnsupportedError), match=message):
        assemble(tmp_path)


def edit(folder: Path, change: dict[str, Any]) -> None:
    """Change fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_old_files_state_what_is_now_implied(tmp_path: Path) -> None:
    changed("marian", tmp_path, {})
    old = {"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": False,
           "static_position_embeddings": True, "add_bias_logits": False, "max_length": 512,
           "num_beams": 6, "bad_words_ids": [[95]], "gradient_checkpointing": False}  # fmt: skip
    edit(tmp_path, old)
    assert assemble(tmp_path).notes == ()


def test_a_file_without_the_tensors_of_a_layer(tmp_path: Path) -> None:
    changed("t5", tmp_path, {})
    edit(tmp_path, {"num_decoder_layers": 3})
    with pytest.raises(FileError, match=r"lacks tensor decoder\.block\.2"):
        assemble(tmp_path)


def test_sentences_do_not_touch_each_other() -> None:
    """A row's bits are the same alone and beside another sentence."""
    for case in ("marian", "t5"):
        ours, pairs, _ = checkpoint(case)
        together = forced(ours, pairs, "native", threads=2)
        for name, pair in pairs.items():
            alone: Sequence[Any] = forced(ours, {name: pair}, "native", threads=1)[name]
            np.testing.assert_array_equal(alone, together[name])
