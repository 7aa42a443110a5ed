"""Translation end to end: text in, text out, as transformers gives it with the same files; the
verb, the Python API, long texts, and what stat, trace, disasm and diff say of such models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import MarianMTModel, MarianTokenizer, T5ForConditionalGeneration, T5Tokenizer

import lmclock
from lmclock.cli import group
from lmclock.config import from_hf
from lmclock.errors import FileError, LmclockError, OptionError, UnsupportedError
from lmclock.translate import _sentences
from tests.tiny_pieces import marian_files, sentences, t5_file
from tests.tiny_seq2seq import CONFIGS, fill

TEXTS = sentences("en", 3)


def folder_of(folder: Path, family: str) -> Path:
    """A model and its tokeniser's files, as transformers saves them."""
    if family == "marian":
        marian_files(folder)
        tokeniser = MarianTokenizer.from_pretrained(folder)
        size, pad = len(tokeniser.encoder), tokeniser.pad_token_id
        config = CONFIGS["marian"]()
        config.update({"vocab_size": size, "decoder_vocab_size": size, "pad_token_id": pad,
                       "decoder_start_token_id": pad})  # fmt: skip
        model = MarianMTModel(config)
        generation = {"num_beams": 4, "max_length": 24, "bad_words_ids": [[pad]],
                      "decoder_start_token_id": pad, "pad_token_id": pad,
                      "forced_eos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    else:
        t5_file(folder)
        size = len(T5Tokenizer.from_pretrained(folder))
        config = CONFIGS["t5-gated"]()
        config.vocab_size, config.num_decoder_layers = size, 2
        model = T5ForConditionalGeneration(config)
        generation = {"num_beams": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 2,
                      "decoder_start_token_id": 0, "pad_token_id": 0,
                      "eos_token_id": 1}  # fmt: skip
    torch.manual_seed(4)
    fill(model)
    model.eval().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: folder_of(tmp_path_factory.mktemp(name), name) for name in ("marian", "t5")}


def theirs(folder: Path, family: str, texts: list[str], **options: Any) -> list[tuple[str, float]]:
    kinds = {"marian": (MarianMTModel, MarianTokenizer),
             "t5": (T5ForConditionalGeneration, T5Tokenizer)}  # fmt: skip
    model, tokeniser = (kind.from_pretrained(folder) for kind in kinds[family])
    batch = tokeniser(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**batch, return_dict_in_generate=True, output_scores=True, **options)
    found = tokeniser.batch_decode(out.sequences, skip_special_tokens=True)
    scores = getattr(out, "sequences_scores", torch.zeros(len(found)))
    return list(zip(found, scores.tolist(), strict=True))


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_texts_as_transformers_translates_them(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]
    with lmclock.load(str(folder), cache="f32", level=1, threads=2) as model:
        found = model.translate(TEXTS)
        for one, (text, score) in zip(found, theirs(folder, family, TEXTS), strict=True):
            assert one.text.strip() == text and abs(one.score - score) < 1e-4
        found = model.translate(TEXTS, num_beams=3, results=2, length_penalty=0.5, max_new_tokens=9)
        options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
        want = theirs(folder, family, TEXTS, max_new_tokens=9, **options)
        got = [pair for one in found for pair in one.alternatives]
        for (a, b), (text, score) in zip(got, want, strict=True):
            assert a.strip() == text and abs(b - score) < 1e-4
        # An ordinary reply is the greedy one.
        plain = theirs(folder, family, TEXTS[:1], num_beams=1, max_new_tokens=9,
                       no_repeat_ngram_size=0, bad_words_ids=None,
                       forced_eos_token_id=None)[0][0]  # fmt: skip
        reply = model.generate(TEXTS[0], max_new_tokens=9)
        assert reply.text.strip() == plain
        kinds = [cycle.kind for cycle in reply.cycles]
        assert kinds[:3] == ["encode", "prefill", "decode"] and set(kinds[2:]) == {"decode"}


def test_prefixes_and_their_languages(folders: dict[str, Path]) -> None:
    with lmclock.load(str(folders["marian"]), level=1) as model:
        ids = model.translator.parts("The house", ">>fr<<")[0][0]
        assert ids[0] == model.tokenizer.token_id(">>fr<<")
        assert ids == model.tokenizer.encode(">>fr<<The house")
    with lmclock.load(str(folders["t5"]), level=1) as model:
        (plain,), (told,) = (
            model.translate(["the house"]),
            model.translate(["the house"], prefix="see: "),
        )
        assert told.source_tokens > plain.source_tokens


def test_long_texts_are_cut_where_sentences_end_and_joined(folders: dict[str, Path]) -> None:
    with lmclock.load(str(folders["marian"]), level=1) as model:
        translator = model.translator
        assert translator.longest == 64
        text = " ".join(sentences("en", 30))
        parts = translator.parts(text)
        assert len(parts) > 4 and all(len(ids) <= 64 for ids, _ in parts)
        # Nothing is lost and nothing comes twice.
        shown = "".join(model.tokenizer.decode(ids) + gap for ids, gap in parts)
        assert shown.split() == model.tokenizer.decode(model.tokenizer.encode(text)).split()
        (one,) = model.translate([text], max_new_tokens=6)
        assert one.segments == len(parts) and one.source_tokens == sum(len(i) for i, _ in parts)
        alone = model.translate([model.tokenizer.decode(parts[0][0])], max_new_tokens=6)[0]
        assert one.text.startswith(alone.text)
        words = "house " * 100  # no sentence ends
        assert all(len(ids) <= 64 for ids, _ in translator.parts(words))
        with pytest.raises(OptionError, match="tokens, and the model takes 64"):
            translator.parts("the house " * 50, "a " * 70)


def test_sentences_of_several_scripts() -> None:
    assert _sentences('He said "no." Then left!  3.5 km\n\nEnd') == [
        ('He said "no."', " "), ("Then left!", "  "), ("3.5 km", "\n\n"), ("End", ""),
    ]  # fmt: skip
    assert _sentences("今天天气很好，我们去公园散步吧。好！「是。」对") == [
        ("今天天气很好，我们去公园散步吧。", ""), ("好！", ""), ("「是。」", ""), ("对", ""),
    ]  # fmt: skip
    text = " ".join(TEXTS)
    assert "".join(a + b for a, b in _sentences(text)) == text


# --- the command line


def lines(*args: str, stdin: str | None = None, code: int = 0) -> str:
    done = CliRunner().invoke(group, list(args), input=stdin)
    if isinstance(done.exception, LmclockError):
        assert code == 1
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output  # what is measured once is said on stderr


def test_the_verb(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = str(folders["marian"])
    want = lines("translate", folder, *TEXTS, "-t", "2")
    assert len(want.splitlines()) == 3
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    assert lines("translate", folder, "-f", str(tmp_path / "texts"), "-t", "2") == want
    assert lines("translate", folder, "-t", "2", stdin="\n".join(TEXTS)) == want
    found = json.loads(lines("translate", folder, TEXTS[0], "--json", "--beams", "2", "--results",
                             "2", "-n", "7"))  # fmt: skip
    assert found[0]["source"] == TEXTS[0] and len(found[0]["alternatives"]) == 2
    assert found[0]["tokens"] <= 7 and found[0]["score"] == found[0]["alternatives"][0][1]
    assert "results=3 of width=2" in lines("translate", folder, "a", "--beams", "2", "--results",
                                           "3", code=1)  # fmt: skip


def test_models_that_do_not_translate(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    t5_file(tmp_path)
    wrong = pytest.raises(UnsupportedError, match="has no encoder, so it does not translate")
    with lmclock.load(str(tmp_path)) as model, wrong:
        model.translate(["a"])


@pytest.mark.parametrize("family", ["marian", "t5"])
def test_verbs_that_look_inside(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = str(folders[family])
    report = json.loads(lines("stat", folder, "-p", TEXTS[0], "-n", "5", "--json", "--ignore-eos"))
    assert list(report["kinds"]) == ["decode", "encode", "prefill"]
    encode = report["kinds"]["encode"]
    assert encode["cycles"] == 1 and encode["prompt_tokens"] > 5 and encode["retired"] == 0
    assert report["kinds"]["decode"]["cycles"] == 4
    names = {e["name"] for e in encode["instructions"]}
    assert "store cross[*]" in names and not any("kv[" in name for name in names)
    out = tmp_path / "trace.json"
    lines("trace", folder, "-p", TEXTS[0], "-n", "3", "-o", str(out))
    events = json.loads(out.read_text())
    cycles = [e["name"] for e in events if e.get("cat") == "cycle"]
    assert cycles[0].endswith("(encode)") and cycles[1].endswith("(prefill)")
    listing = lines("disasm", folder)
    assert listing.index("section  encode") < listing.index("section  step")
    assert listing.count(".repeat") > 2, "the layers of both sections are folded"
    chart = lines("disasm", folder, "--mermaid")
    assert 'subgraph encode["encode"]' in chart and "state_cross" in chart
    assert "no instruction diverges" in lines("diff", folder, "-p", TEXTS[0], "-O1")


# --- generation_config.json


def test_settings_of_files_old_and_new() -> None:
    said = {"num_beams": 5, "length_penalty": 2.0, "max_length": 62, "early_stopping": True}
    config = CONFIGS["bart"]().to_dict() | said | {"architectures": None}
    old = from_hf(config, "x")
    assert (old.generation.width, old.generation.longest) == (5, 62)
    assert old.generation.early_stopping is True and old.generation.final == (2,)
    new = from_hf(config, "x", lambda name: {"num_beams": 2, "eos_token_id": [2, 3]})
    assert (new.generation.width, new.generation.length_penalty, new.eos) == (2, 1.0, (2, 3))
    for bad in ({"bad_words_ids": [[]]}, {"early_stopping": "soon"}, {"num_beams": 0}, [1]):
        with pytest.raises(FileError):
            from_hf(config, "x", lambda name, bad=bad: bad)


def test_options_have_transformers_names_too(folders: dict[str, Path]) -> None:
    with lmclock.load(str(folders["t5"])) as model:
        beams = model.translator.beams({"num_beams": 2, "forced_eos_token_id": 1})
        assert (beams.width, beams.final, beams.no_repeat_ngram) == (2, (1,), 2)
        with pytest.raises(OptionError, match="option 'num_beam' is unknown; valid: bad_words_ids"):
            model.translate(["a"], num_beam=2)


def test_scores_of_quantised_caches_stay_near(folders: dict[str, Path]) -> None:
    with lmclock.load(str(folders["marian"]), cache="f16", threads=1) as model:
        half = model.translate(TEXTS, max_new_tokens=6)
    with lmclock.load(str(folders["marian"]), cache="f32", threads=1) as model:
        full = model.translate(TEXTS, max_new_tokens=6)
    np.testing.assert_allclose([o.score for o in half], [o.score for o in full], atol=0.02)
