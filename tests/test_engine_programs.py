"""The engine over real programs: decoders, translators, encoders and LSTMs on real machines.

What the engine hands out is held to the same program run row by row without an engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmclock import listing
from lmclock.cycle import Cycle
from lmclock.engine import Engine, Request, Sampling, capacity_for
from lmclock.errors import ContextError, OptionError, UnsupportedError
from lmclock.machines import create
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.verify import verify
from tests.helpers import Runner, random_weights
from tests.test_hard_cases import LSTM, TRANSLATOR
from tests.tiny import llama

MACHINES = ("array", "native")
SAMPLE = "sample   next, logits\n"
ENCODER = """
program  bert "sentences"
input    ids src ids
input    pos src ids
input    types src ids
weight   table 23x16 f32
weight   places 30x16 f32
weight   kinds 2x16 f32
weight   q 16x16 f32
weight   k 16x16 f32
section  encode
embed    a, ids, table
embed    b, pos, places
embed    c, types, kinds
binary   ab, a, b
binary   x, ab, c
linear   qx, x, q
linear   kx, x, k
attend   y, qx, kx, x     heads=2 mask=full
pool     sentence, y
"""
CLASSIFIER = LSTM.replace("pick     p, h1", "pool     p, h1    kind=max").replace(
    'lstm "language model"', 'lstm "classifier"'
)
PROGRAMS = {
    "llama": lambda: llama(cache="f32"),
    "translator": lambda: listing.parse(TRANSLATOR + SAMPLE),
    "lstm": lambda: listing.parse(LSTM + SAMPLE),
    "encoder": lambda: listing.parse(ENCODER),
    "classifier": lambda: listing.parse(CLASSIFIER),
}
LENGTHS = (1, 7, 19, 20, 4, 11)


def engine(name: str, machine: str = "array", tokens: int = 400, **options: Any) -> Engine:
    """An engine for four sequences with pages of 8 positions."""
    program = verify(PROGRAMS[name]())
    capacity = capacity_for(
        program, sequences=4, tokens=tokens, chunk=options.get("chunk", 16), page_size=8,
        source=32, picks=64,
    )  # fmt: skip
    made = create(machine)
    made.load(program, random_weights(program), capacity)
    return Engine(made, program, capacity=capacity, **options)


def ids(length: int, most: int) -> list[int]:
    return np.random.default_rng(length).integers(0, most, length).tolist()


def source_of(of: Engine, length: int) -> list[int]:
    return ids(length % 5 + 2, of.facts.source_vocabulary or 1) if of.facts.encodes else []


def requests(of: Engine, **options: Any) -> list[Request]:
    assert of.facts.vocabulary
    vocabulary = of.facts.vocabulary
    return [
        Request(ids(n, vocabulary), source=source_of(of, n), **options)
        for n in LENGTHS
    ]  # fmt: skip


def tokens_of(of: Engine, asked: list[Request]) -> list[list[int]]:
    """New tokens of each request, all of them at once."""
    found: dict[int, list[int]] = {of.add(request): [] for request in asked}
    for event in of.run():
        assert event.finish != "error", event.message
        found[event.sequence] += event.tokens
    of.cache.check()
    assert not of.cache.open_sequences
    return list(found.values())


def rows_of(of: Engine, request: Request, tokens: list[int], value: str) -> np.ndarray:
    """Rows of `value` for prompt and new tokens, by one pass without an engine."""
    runner = Runner(of.program, random_weights(of.program))
    source = {"a": list(request.source)} if request.source else None
    return runner.cycle({"a": [*request.prompt, *tokens]}, source, value, pick="all")["a"]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ("llama", "translator", "lstm"))
def test_greedy_tokens_are_the_best_of_a_plain_pass(name: str, machine: str) -> None:
    of = engine(name, machine)
    asked = requests(of, max_new_tokens=9)
    for request, tokens in zip(asked, tokens_of(of, asked), strict=True):
        logits = rows_of(of, request, tokens, "logits")[len(request.prompt) - 1 : -1]
        margin = logits.max(axis=1) - logits[np.arange(9), tokens]
        assert len(tokens) == 9 and margin.max() < 1e-4


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ("llama", "translator", "lstm"))
def test_company_chunks_and_preemption_change_no_token(name: str, machine: str) -> None:
    sampled = Sampling(0.9, top_p=0.95, repetition=1.1, seed=11)
    of = engine(name, machine)
    alone = [tokens_of(of, [request])[0] for request in requests(of, max_new_tokens=12,
                                                                 sampling=sampled)]  # fmt: skip
    for options in ({}, {"chunk": 5}, {"tokens": 64}, {"tokens": 64, "invariant": True}):
        crowd = engine(name, machine, **options)
        assert tokens_of(crowd, requests(crowd, max_new_tokens=12, sampling=sampled)) == alone
        assert (crowd.scheduler.preemptions > 0) == ("tokens" in options and name != "lstm")


@pytest.mark.parametrize("machine", MACHINES)
def test_logits_of_every_position_for_perplexity(machine: str) -> None:
    of = engine("llama", machine, chunk=7)
    for n in (30, 1, 8):
        rows: list[np.ndarray] = []
        want = {"logits": lambda at, x, rows=rows: rows.append(x.copy())}
        request = Request(ids(n, 100), 0, want=want, pick_all=True)
        assert tokens_of(of, [request]) == [[]]
        right = rows_of(of, request, [], "logits")
        np.testing.assert_allclose(np.concatenate(rows), right, atol=2e-5)


def logits_of(of: Engine, crowd: bool) -> list[np.ndarray]:
    """Logits of every prompt position and new token of two sequences, alone or among others."""
    found = []
    for n in (29, 12):
        rows: list[np.ndarray] = []
        want = {"logits": lambda at, x, rows=rows: rows.append(x.copy())}
        for k in LENGTHS if crowd else ():
            of.add(Request(ids(k, 100), 12))
        of.add(Request(ids(n, 100), 6, Sampling(1.0, seed=n), want=want, pick_all=True))
        list(of.run())
        found.append(np.concatenate(rows))
    return found


@pytest.mark.parametrize("cache", ("f32", "f16", "q8_0"))
def test_bits_do_not_depend_on_company_chunks_paging_or_threads(cache: str) -> None:
    """Alone in one piece with one thread, and in every other way, on the fast path."""
    program = llama(width=128, ffn=96, formats=("q8_0", "q4_0", "f32"), cache=cache)
    program = optimise(verify(program), 2, invariant=True)
    weights = random_weights(program)
    found = []
    for threads, chunk, page_size, tokens, crowd in (
        (1, 64, 64, 512, False),
        (2, 64, 8, 512, True),
        (1, 7, 16, 512, True),
        (2, 1, 4, 512, False),
        (2, 16, 4, 60, True),  # with preemption
    ):
        capacity = capacity_for(
            program, sequences=4, tokens=tokens, chunk=chunk, page_size=page_size
        )
        machine = create("native", threads=threads)
        machine.load(program, weights, capacity)
        of = Engine(machine, program, capacity=capacity, chunk=chunk, invariant=True)
        found.append(logits_of(of, crowd))
        assert (of.scheduler.preemptions > 0) == (tokens == 60)
        of.close()
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("machine", MACHINES)
def test_an_encoder_finishes_in_one_cycle_and_hands_out_its_value(machine: str) -> None:
    cycles: list[Cycle] = []
    of = engine("encoder", machine, on_cycles=cycles.extend)
    found: dict[int, np.ndarray] = {}
    for n in (20, 3, 12):
        want = {"sentence": lambda at, x, n=n: found.__setitem__(n, x.copy())}
        types = np.arange(n)[:, None] % 2
        of.add(Request(ids(n, 23), want=want, inputs={"types": types} if n != 3 else {}))
    assert [event.finish for event in of.run()] == ["length"] * 3
    assert len(cycles) == 2  # of 35 rows 32 fit
    w = {name: stored.unpack() for name, stored in random_weights(of.program).items()}
    for n, sentence in found.items():
        types = np.arange(n) % 2 if n != 3 else np.zeros(n, int)
        x = w["table"][ids(n, 23)] + w["places"][:n] + w["kinds"][types]
        q, k, v = ((m).reshape(n, 2, 8) for m in (x @ w["q"].T, x @ w["k"].T, x))
        scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(8))
        y = np.einsum("hqk,khd->qhd", scores / scores.sum(axis=2, keepdims=True), v)
        np.testing.assert_allclose(sentence, y.reshape(n, 16).mean(axis=0)[None], atol=1e-5)
    with pytest.raises(UnsupportedError, match="does not sample, so max_new_tokens=1"):
        of.add(Request([1], 1))
    with pytest.raises(ContextError, match=r"31 tokens does not fit: the context .* 30 tokens"):
        of.add(Request(ids(31, 23)))
    with pytest.raises(OptionError, match=r"'types' has shape \(2, 1\); valid: \(1, 1\)"):
        of.add(Request([1], inputs={"types": np.zeros((2, 1))}))


@pytest.mark.parametrize("machine", MACHINES)
def test_a_classifier_sees_its_whole_text_in_one_cycle(machine: str) -> None:
    of = engine("classifier", machine, chunk=32)
    for n in (30, 5):
        scores: list[np.ndarray] = []
        of.add(Request(ids(n, 11), want={"logits": lambda at, x, s=scores: s.append(x.copy())}))
        list(of.run())
        runner = Runner(of.program, random_weights(of.program))
        runner.cycle({"a": ids(n, 11)})
        assert len(scores) == 1
        np.testing.assert_allclose(scores[0], runner.machine.read("logits"), atol=1e-6)


def test_forks_of_one_prompt_sample_on_their_own() -> None:
    """What n completions of a prompt are made of: one prefill, then a fork for each."""
    of = engine("llama")
    cycles: list[Cycle] = []
    of.on_cycles = cycles.extend
    prompt = ids(21, 100)
    alone = [tokens_of(of, [Request(prompt, 8, Sampling(1.0, seed=seed))])[0] for seed in (1, 2, 3)]
    cycles.clear()
    of = engine("llama", on_cycles=cycles.extend)
    first = of.add(Request(prompt, 8, Sampling(1.0, seed=1)))
    of.step()  # the first 16 rows
    numbers = [first, *(of.fork(first, Sampling(1.0, seed=seed)) for seed in (2, 3))]
    found: dict[int | None, list[int]] = {number: [] for number in numbers}
    for event in of.run():
        found[event.sequence] += event.tokens
    assert list(found.values()) == alone
    assert sum(c.prompt_rows for c in cycles) == 16 + 3 * 5


def test_programs_that_cannot_go_on_generate_one_token_at_most() -> None:
    program = verify(
        listing.parse(ENCODER.replace("section  encode", "section  step").replace(" src ", " tok ")
                      .replace("pool     sentence, y", "pick p, y\nlinear logits, p, table\n")
                      + SAMPLE)
    )  # fmt: skip
    capacity = capacity_for(program, sequences=2, chunk=16)
    machine = create("array")
    machine.load(program, random_weights(program), capacity)
    of = Engine(machine, program, capacity=capacity)
    with pytest.raises(UnsupportedError, match="keeps no state to go on from, so max_new_tokens=2"):
        of.add(Request([1, 2], 2))
    assert len(tokens_of(of, [Request([1, 2, 3])])[0]) == 1


def test_sampling_rows_that_are_not_picked_is_refused() -> None:
    text = "input ids tok ids\nweight t 4x4 f32\nsection step\nembed x, ids, t\nsample next, x"
    program = verify(listing.parse(f'program p "p"\n{text}\n'))
    with pytest.raises(UnsupportedError, match="samples x, whose rows are not picked ones"):
        Engine(create("array"), program, capacity=capacity_for(program))


def test_a_program_without_a_section_to_run_is_refused() -> None:
    program = Program("none", "empty")
    with pytest.raises(UnsupportedError, match=r"neither a section step nor encode .* it has none"):
        Engine(create("array"), program, capacity=capacity_for(program))
