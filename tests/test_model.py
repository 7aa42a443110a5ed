"""The Python API on a tiny model: replies, streams by turns, early ends, errors of our kinds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from measured import limits

import lmclock
from lmclock.errors import ContextError, FileError, LmclockError, OptionError, UnsupportedError
from lmclock.model import Model, TextStream, load
from lmclock.text import Tokeniser

PROMPT = "the clock"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="module", params=["array", "native"])
def model(request: pytest.FixtureRequest, file: str) -> Iterator[Model]:
    # One thread: two would wait for each other on a machine that is busy with other things.
    threads = 1 if request.param == "native" else None
    with load(file, machine=request.param, sequences=3, threads=threads) as loaded:
        yield loaded


@pytest.fixture
def made_up_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmclock.hardware.calibrate.limits", lambda *args: limits())


def drawn(seed: int, **options: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "seed": seed, "max_new_tokens": 24, "ignore_eos": True} | options


# --- replies


def test_a_reply(model: Model) -> None:
    reply = model.generate(PROMPT, **drawn(1))
    assert len(reply.tokens) == 24 and reply.finish == "length"
    assert reply.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert reply.text == model.tokenizer.decode(reply.tokens, continued=True)
    assert model.generate(PROMPT, **drawn(1)).text == reply.text
    assert model.generate(PROMPT, **drawn(2)).text != reply.text
    assert not model.engine.live and not model.streams


def test_a_prompt_may_be_text_ids_or_messages(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPT)
    same = [model.generate(p, **drawn(1)).tokens for p in (PROMPT, ids, tuple(ids), np.array(ids))]
    assert len(set(same)) == 1
    turn = [{"role": "user", "content": "hi"}]
    template = model.tokenizer.encode(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", allow_special=True
    )
    assert model.encode(turn) == template
    assert model.generate(turn, **drawn(1)).prompt_tokens == len(template)


def test_nothing_new_is_no_error(model: Model) -> None:
    reply = model.generate(PROMPT, max_new_tokens=0)
    assert (reply.text, reply.tokens, reply.finish) == ("", (), "length")


def test_end_tokens_end_a_reply_unless_ignored(model: Model) -> None:
    bias = {tiny_gguf.END: 100.0}
    assert model.generate(PROMPT, max_new_tokens=5, logit_bias=bias).finish == "stop"
    reply = model.generate(PROMPT, max_new_tokens=5, logit_bias=bias, ignore_eos=True)
    assert (reply.finish, reply.tokens) == ("length", (tiny_gguf.END,) * 5)
    assert reply.text == "", "special tokens are not shown"


def test_a_stop_string_ends_a_reply_before_it(model: Model) -> None:
    reply = model.generate(PROMPT, **drawn(3))
    cut = reply.text[10:12]
    stopped = model.generate(PROMPT, **drawn(3, stop=cut))
    assert stopped.finish == "stop" and stopped.text == reply.text.split(cut)[0]
    assert model.generate(PROMPT, **drawn(3, stop=["nowhere", cut])).text == stopped.text
    assert not model.engine.live


def test_names_of_other_tools(model: Model) -> None:
    ours = model.generate(PROMPT, **drawn(1, repetition=1.5, presence=0.5, frequency=0.25))
    theirs = drawn(1, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    assert model.generate(PROMPT, **theirs).tokens == ours.tokens


def test_the_model_shows_what_it_is_made_of(model: Model) -> None:
    assert isinstance(model.tokenizer, Tokeniser)
    assert model.program.name == "tiny" and model.program.context == tiny_gguf.CONTEXT
    assert lmclock.load is load and lmclock.Model is Model
    assert set(lmclock.__all__) <= {*dir(lmclock), "Model", "Reply", "load", "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = lmclock.lode


# --- streams


def test_pieces_make_the_text(model: Model) -> None:
    stream = model.stream(PROMPT, **drawn(4))
    pieces = list(stream)
    assert all(pieces) and "".join(pieces) == stream.text == stream.reply.text
    assert stream.text == model.generate(PROMPT, **drawn(4)).text
    assert list(stream) == [], "a stream is read once"


def test_leaving_early_cancels(model: Model) -> None:
    whole = model.generate(PROMPT, **drawn(5, max_new_tokens=200)).text
    stream = model.stream(PROMPT, **drawn(5, max_new_tokens=200))
    for _ in stream:
        if len(stream.text) > 5:
            break
    assert stream.finish == "cancelled" and whole.startswith(stream.text.rstrip("\ufffd"))
    assert not model.engine.live and not model.streams
    assert 0 < len(stream.reply.tokens) < 200
    assert model.generate(PROMPT, **drawn(5, max_new_tokens=200)).text == whole


def test_an_error_in_the_loop_cancels(model: Model) -> None:
    with pytest.raises(KeyError):
        for _ in model.stream(PROMPT, **drawn(5)):
            raise KeyError
    assert not model.engine.live


def test_cancel_ends_before_the_next_cycle(model: Model) -> None:
    stream = model.stream(PROMPT, **drawn(5, max_new_tokens=200))
    for _ in stream:
        stream.cancel()
    assert stream.finish == "cancelled" and len(stream.tokens) < 10
    assert not model.engine.live


def test_a_stream_nobody_reads_takes_no_room(model: Model) -> None:
    streams = [model.stream(PROMPT, **drawn(n)) for n in range(10)]
    assert not model.engine.live
    assert model.generate(PROMPT, **drawn(1)).finish == "length"
    assert "".join(streams[1]) == model.generate(PROMPT, **drawn(1)).text


@pytest.mark.parametrize("sequences", [1, 3])
def test_streams_by_turns_say_what_they_say_alone(file: str, sequences: int) -> None:
    with load(file, machine="array", sequences=sequences) as model:
        prompts = ["the clock", "he", "a longer prompt than the others"]
        alone = [model.generate(p, **drawn(n)).text for n, p in enumerate(prompts)]
        streams = [model.stream(p, **drawn(n)) for n, p in enumerate(prompts)]
        pieces = list(zip_longest(*streams, fillvalue=""))
        assert ["".join(column) for column in zip(*pieces, strict=True)] == alone
        assert [s.finish for s in streams] == ["length"] * 3
        assert not model.streams and not model.engine.live


def test_one_of_several_streams_may_end_early(file: str) -> None:
    with load(file, machine="array", sequences=2) as model:
        alone = model.generate("he", **drawn(1)).text
        first, second = model.stream("the", **drawn(0)), model.stream("he", **drawn(1))
        parts = []
        other = iter(second)
        parts.append(next(other))
        for _ in first:
            break
        assert first.finish == "cancelled"
        assert "".join([*parts, *other]) == alone


def test_cycles_live_as_long_as_the_reply(model: Model) -> None:
    reply = model.generate(PROMPT, **drawn(1))
    assert [c.kind for c in reply.cycles] == ["prefill"] + ["decode"] * 23
    assert sum(c.retired for c in reply.cycles) == 24
    first = weakref.ref(reply.cycles[0])
    del reply
    gc.collect()
    assert first() is None


# --- the clock


def test_the_clock_of_a_reply(model: Model, made_up_limits: None) -> None:
    model._limits = None
    reply = model.generate(PROMPT, **drawn(1))
    kinds = reply.clock.summary["kinds"]
    assert kinds["prefill"]["prompt_tokens"] == reply.prompt_tokens
    assert kinds["prefill"]["retired"] + kinds["decode"]["retired"] == 24
    assert kinds["decode"]["cycles"] == 23 and kinds["decode"]["hz"] > 0
    for account in (tally.account for tally in reply.clock.clock.kinds.values()):
        account.check()
    assert str(reply.clock).startswith(f"prefill {reply.prompt_tokens} tokens, ")
    assert "decode 23 tokens" in repr(reply.clock) and reply.clock is reply.clock
    model._limits = None


def test_mixed_cycles_of_two_streams(file: str, made_up_limits: None) -> None:
    with load(file, machine="array", sequences=2) as model:
        first, second = model.stream(PROMPT, **drawn(0)), model.stream("he", **drawn(1))
        one = iter(first)
        next(one)
        assert all(True for _ in second)
        assert {c.kind for c in second.cycles} == {"mixed", "decode"}
        (mixed,) = (c for c in second.cycles if c.kind == "mixed")
        assert mixed.decoding == (True, False)
        assert sum(len(c.batch.rows["tok"]) for c in second.cycles) > len(second.tokens)
        parts = second.reply.clock.summary["kinds"]["mixed"]["parts"]
        assert parts["decode"]["bound_seconds_per_cycle"] > 0
        one.close()  # type: ignore[attr-defined]


# --- errors


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("", {}, OptionError, "the prompt is empty"),
        ([], {}, OptionError, "the prompt is empty"),
        (b"bytes", {}, OptionError, "the prompt is a bytes; valid: text, token ids, or chat"),
        (17, {}, OptionError, "the prompt is a int"),
        (None, {}, OptionError, "the prompt is a NoneType"),
        ({"role": "user"}, {}, OptionError, "the prompt is a dict"),
        (["hi", "you"], {}, OptionError, "the prompt holds 'hi'"),
        ([1, True], {}, OptionError, "the prompt holds True"),
        ([1.5], {}, OptionError, "the prompt holds 1.5"),
        ([-1], {}, OptionError, "token id -1 in the prompt; valid: 0 to"),
        ([10**6], {}, OptionError, "token id 1000000"),
        ([{"content": "hi"}], {}, OptionError, "role"),
        ("half \ud800", {}, OptionError, "this text cannot be encoded"),
        ("x" * 300, {}, ContextError, "a prompt of 300 tokens does not fit: the .* 256 tokens"),
        ("hi", {"max_new_tokens": 300}, ContextError, "2 tokens and 300 new ones does not fit"),
        ("hi", {"max_new_tokens": -1}, OptionError, "max_new_tokens=-1 is out of range"),
        ("hi", {"max_new_tokens": "8"}, OptionError, "max_new_tokens='8'"),
        ("hi", {"temperature": -1}, OptionError, "temperature=-1 is out of range; valid: 0, or"),
        ("hi", {"top_p": float("nan")}, OptionError, "top_p=nan is out of range"),
        ("hi", {"tempreature": 1}, OptionError, "option 'tempreature' is unknown; valid: .*max"),
        ("hi", {"stop": ""}, OptionError, "stop string '' is not valid"),
        ("hi", {"stop": [1]}, OptionError, "stop string '1' is not valid"),
        ("hi", {"logit_bias": {10**6: 1.0}}, OptionError, "logit_bias for token 1000000"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_before_any_work(
    model: Model, prompt: Any, options: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.stream(prompt, **options)
    assert issubclass(kind, LmclockError) and not model.engine.live and not model.streams


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"machine": "naitve"}, OptionError, "machine 'naitve' is unknown; valid: array or native"),
        ({"machine": "array", "threads": 2}, OptionError, "options of machine 'native'"),
        ({"level": 3}, OptionError, "optimisation level 3 is unknown; valid: 0, 1 or 2"),
        ({"cache": "f8"}, OptionError, "cache='f8' is unknown; valid: f32, f16 or q8_0"),
        ({"context": -1}, OptionError, "context=-1 is out of range"),
        ({"context": 999}, OptionError, "context=999 is more than the model was made for, 256"),
        ({"sequences": 0}, OptionError, "sequences=0 is out of range"),
        ({"chunk": 0}, OptionError, "chunk=0 is out of range"),
        ({"threads": 0}, OptionError, "threads=0"),
        ({"path": "sse"}, OptionError, "path='sse' is not available"),
        ({"model": "no/such.gguf"}, FileError, "there is no file or folder"),
        ({"model": "smollm3"}, FileError, "did you mean 'smollm2'"),
        ({"model": "x.lmc"}, UnsupportedError, "x.lmc is a listing"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_said(
    file: str, options: dict[str, Any], kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(**{"model": file} | options)


def test_a_closed_model_says_so(file: str) -> None:
    model = load(file, machine="array")
    stream = model.stream(PROMPT, **drawn(1))
    part = iter(stream)
    next(part)
    model.close()
    model.close()
    assert stream.finish == "cancelled" and list(part) == []
    with pytest.raises(LmclockError, match="this model is closed"):
        model.generate(PROMPT)


def test_a_failing_machine_is_an_error_of_its_stream(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(file, machine="array") as model:
        run, calls = model.machine.run, []

        def fails(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 4:
                raise UnsupportedError("the machine has had enough")
            return run(*args)

        monkeypatch.setattr(model.machine, "run", fails)
        stream = model.stream(PROMPT, **drawn(1))
        with pytest.raises(LmclockError, match="the machine has had enough"):
            list(stream)
        assert (stream.finish, len(stream.tokens)) == ("error", 3)
        assert model.generate(PROMPT, **drawn(1)).finish == "length", "and the model goes on"


def test_a_damaged_tokenizer_is_a_file_error(tmp_path: Path, file: str) -> None:
    raw = Path(file).read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(raw.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.merged"))
    with load(str(broken), machine="array") as model, pytest.raises(FileError):
        model.generate(PROMPT)


def test_streams_are_made_by_models() -> None:
    assert Model.stream.__annotations__["return"] == TextStream.__name__
