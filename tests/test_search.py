"""Beam search in the engine against transformers' generate(num_beams=...): the same sequences, and
scores within 1e-4, several sentences in one batch. And what the beams cost: pages and sources are
shared, and no cache or slot is lost, whatever runs beside.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmclock.assemble import Assembled, assemble
from lmclock.cost import Bound, cost
from lmclock.cycle import Cycle
from lmclock.engine import Beams, Engine, Event, Request, capacity_for
from lmclock.engine.search import Search, largest
from lmclock.errors import ContextError, OptionError, UnsupportedError
from lmclock.machines import create
from tests.hash_machine import engine as hash_engine
from tests.hash_machine import ids, logits_of
from tests.tiny_seq2seq import PAD, VOCAB, random_model

TOLERANCE = 1e-4
LENGTHS = (9, 3, 17, 6)
START = {"marian": PAD, "bart": 2, "t5": 0}
END = {"marian": 0, "bart": 2, "t5": 1}


@functools.cache
def checkpoint(family: str) -> tuple[Any, Assembled]:
    """A model that ends its sentences now and then, and what it assembles to."""
    # The gated T5's embeddings are small: the other one's make it say one word again and again.
    model = random_model("t5-gated" if family == "t5" else family, seed=11)
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias[0, END[family]] += 4.0 if family == "marian" else 2.0
        else:
            model.shared.weight[END[family]] *= 3
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return model, assemble(folder, cache="f32")


def sources(low: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(low, VOCAB - 1, n).tolist() for n in LENGTHS]


def generated(
    family: str, texts: list[list[int]], **options: Any
) -> list[list[tuple[list[int], float]]]:
    """(tokens without start and end, score) of every result of every sentence, by transformers."""
    model, _ = checkpoint(family)
    longest = max(map(len, texts))
    padded = torch.tensor([[*t, *[PAD] * (longest - len(t))] for t in texts])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
    settings = {
        "decoder_start_token_id": START[family], "eos_token_id": END[family], "pad_token_id": PAD,
        "forced_eos_token_id": None, "forced_bos_token_id": None, "do_sample": False,
    }  # fmt: skip
    with torch.no_grad():
        out = model.generate(
            input_ids=padded, attention_mask=mask, return_dict_in_generate=True, output_scores=True,
            **settings | options,
        )  # fmt: skip
    count = options.get("num_return_sequences", 1)
    scores = getattr(out, "sequences_scores", None)
    found: list[list[tuple[list[int], float]]] = [[] for _ in texts]
    for k, row in enumerate(out.sequences.tolist()):
        tokens = row[1:]
        # After the end there is padding; the padding token itself may be sampled before.
        ends = [n for n, t in enumerate(tokens) if t == END[family]]
        tokens = tokens[: ends[0]] if ends else tokens
        found[k // count].append((tokens, float(scores[k]) if scores is not None else 0.0))
    return found


def engine_of(family: str, width: int, machine: str = "native", **options: Any) -> Engine:
    _, model = checkpoint(family)
    capacity = capacity_for(
        model.program, sequences=width * len(LENGTHS), tokens=width * len(LENGTHS) * 64,
        page_size=8, source=32,
    )  # fmt: skip
    made = create(machine, **({"threads": 2} if machine == "native" else {}))
    made.load(model.program, model.weights, capacity)
    return Engine(made, model.program, capacity=capacity, eos=frozenset({END[family]}), **options)


def searched(
    of: Engine, family: str, texts: list[list[int]], beams: Beams, most: int
) -> list[Event]:
    """The last event of every sentence, all of them at once."""
    numbers = [of.add(Request([START[family]], most, source=t, beams=beams)) for t in texts]
    last = {event.sequence: event for event in of.run() if event.finish}
    of.cache.check()
    assert not of.cache.open_sequences
    return [last[number] for number in numbers]


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # transformers' words, and ours
    "plain": ({}, {}),
    "early": ({"early_stopping": True}, {"early_stopping": True}),
    "never": ({"early_stopping": "never", "length_penalty": 0.6},
              {"early_stopping": "never", "length_penalty": 0.6}),
    "short": ({"length_penalty": -1.0}, {"length_penalty": -1.0}),
    "long": ({"length_penalty": 2.0, "min_length": 6}, {"length_penalty": 2.0, "min_length": 6}),
    "several": ({"num_return_sequences": 3}, {"results": 3}),
    "forced": ({"forced_bos_token_id": 7, "forced_eos_token_id": 0, "min_new_tokens": 4},
               {"first": 7, "final": (0,), "min_new_tokens": 4}),
    "no-repeats": ({"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
                   {"no_repeat_ngram": 2, "repetition": 1.3}),
    "banned": ({"bad_words_ids": [[5], [11, 12], [40, 41, 42]]},
               {"banned": ((5,), (11, 12), (40, 41, 42))}),
}  # fmt: skip


OTHERS = ("plain", "early", "forced")
CASES = [("marian", case) for case in SETTINGS]
CASES += [(family, case) for family in ("bart", "t5") for case in OTHERS]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_beams_are_those_of_transformers(family: str, case: str) -> None:
    theirs, ours = SETTINGS[case]
    texts = sources()
    for width, most in ((4, 16), (3, 5)):
        if theirs.get("forced_eos_token_id") is not None:
            theirs = theirs | {"forced_eos_token_id": END[family]}
            ours = ours | {"final": (END[family],)}
        want = generated(family, texts, num_beams=width, max_length=1 + most, **theirs)
        of = engine_of(family, width)
        for event, rows in zip(
            searched(of, family, texts, Beams(width, **ours), most), want, strict=True
        ):
            assert [list(r.tokens) for r in event.results] == [tokens for tokens, _ in rows]
            gaps = [r.score - score for r, (_, score) in zip(event.results, rows, strict=True)]
            assert max(map(abs, gaps)) <= TOLERANCE
            assert event.tokens == event.results[0].tokens


def test_the_models_end_some_sentences_and_not_others() -> None:
    """Otherwise the comparisons would say little."""
    for family in START:
        want = generated(family, sources(), num_beams=4, max_length=17)
        lengths = {len(rows[0][0]) for rows in want}
        assert len(lengths) > 1 and min(lengths) < 16, family


@pytest.mark.parametrize("family", START)
def test_greedy_is_that_of_transformers(family: str) -> None:
    cases = ("plain", "no-repeats", "banned", "long") if family == "marian" else ("plain",)
    for theirs, ours in map(SETTINGS.__getitem__, cases):
        theirs = {k: v for k, v in theirs.items() if k != "length_penalty"}
        want = generated(family, sources(), num_beams=1, max_length=16, **theirs)
        for machine in ("native", "array"):
            of = engine_of(family, 1, machine)
            found = searched(of, family, sources(), Beams(1, **ours), 15)
            assert [list(e.tokens) for e in found] == [rows[0][0] for rows in want]
    # Without settings the sampled sequences of an ordinary request are the same.
    of = engine_of(family, 1)
    numbers = [of.add(Request([START[family]], 15, source=t)) for t in sources()]
    tokens: dict[int, list[int]] = {n: [] for n in numbers}
    for event in of.run():
        tokens[event.sequence] += event.tokens
    want = generated(family, sources(), num_beams=1, max_length=16)
    assert list(tokens.values()) == [rows[0][0] for rows in want]


def test_beams_of_a_decoder() -> None:
    """A prompt in pieces, then beams that share its pages."""
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=64, eos_token_id=1, bos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) / weight.shape[1] ** 0.5)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    ours = assemble(folder, cache="f32")
    prompt = np.random.default_rng(1).integers(2, VOCAB, 21).tolist()
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), num_beams=4, max_new_tokens=12, pad_token_id=0,
                             num_return_sequences=4, do_sample=False,
                             return_dict_in_generate=True, output_scores=True)  # fmt: skip
    capacity = capacity_for(ours.program, sequences=4, tokens=256, chunk=8, page_size=4)
    made = create("native", threads=2)
    made.load(ours.program, ours.weights, capacity)
    of = Engine(made, ours.program, capacity=capacity, chunk=8, eos=frozenset({1}))
    of.add(Request(prompt, 12, beams=Beams(4, results=4)))
    (last,) = [event for event in of.run() if event.finish]
    for k, result in enumerate(last.results):
        row = out.sequences[k].tolist()[21:]
        assert list(result.tokens) == (row[: row.index(1)] if 1 in row else row)
        assert abs(result.score - float(out.sequences_scores[k])) <= TOLERANCE


# --- what beams cost


def test_a_source_is_held_once_and_shared_bytes_count_once() -> None:
    cycles: list[Cycle] = []
    of = engine_of("marian", 4, on_cycles=cycles.extend)
    texts = sources()
    for text in texts:
        of.add(Request([PAD], 20, source=text, beams=Beams(4, min_new_tokens=15)))
    of.step()
    of.step()
    held = list(of.cache.open_sequences.values())
    assert len(held) == 4 * len(texts), "the first step cycle makes all beams"
    pages = [tuple(h.source) for h in held]
    assert len(set(pages)) == len(texts)
    used = of.cache.sources.size - of.cache.sources.room
    assert used == sum(-(-len(text) // 8) for text in texts)
    for _ in range(10):
        of.step()
    assert cycles[0].kind == "encode" and {c.kind for c in cycles[2:]} == {"decode"}
    batch, program = cycles[-1].batch, of.program
    step = program.section("step").instructions
    cross = next(i for i in step if i.op == "attend" and i.state == "cross[0]")
    own = next(i for i in step if i.op == "attend" and i.state == "kv[0]")
    bound = Bound(program, "step", batch)
    row = 4 * (16 + 16) * 4  # heads x (key + value) x bytes of f32
    assert cost(cross, bound).cache == sum(map(len, texts)) * row
    positions = {
        (int(page), offset)
        for table, at in zip(batch.pages["kv"], batch.rows["tok"].positions, strict=True)
        for n, page in enumerate(table)
        for offset in range(min(8, int(at) + 1 - 8 * n))
    }
    assert cost(own, bound).cache == len(positions) * row
    assert len(positions) < 4 * len(texts) * 11, "some pages are shared"
    of.close()
    of.cache.check()


def lone_search(request: Request, ends: frozenset[int]) -> list[tuple[int, ...]]:
    """The results by the hash machine's rule, without an engine."""
    assert request.beams is not None
    last = len(request.prompt) + (request.max_new_tokens or 0)
    search = Search(request.beams, list(request.prompt), last, ends)
    while not search.over:
        rows = [logits_of(s, list(request.source)) for s in search.sequences]
        search.advance(np.array(rows))
    return [result.tokens for result in search.results]


@pytest.mark.parametrize("kind", ["paged", "encoder"])
def test_searches_among_others_find_what_they_find_alone(kind: str) -> None:
    """With little room: sequences are preempted, searches start over, some are cancelled."""
    ends = frozenset({0})
    for tokens in (256, 52):
        of = hash_engine(kind, tokens=tokens, eos=ends)
        source = {"source": ids(5)} if kind == "encoder" else {}
        asked = [
            Request(ids(3 + n % 3, n), 7, beams=Beams(width, results=width), **source)
            if width else Request(ids(9 + 3 * n, n), 14, **source)
            for n, width in enumerate((0, 3, 2, 1, 3, 0, 2, 2, 4, 0, 3))
        ]  # fmt: skip
        numbers = [of.add(request) for request in asked]
        last: dict[int, Event] = {}
        cancelled = numbers[4]
        for step in range(3000):
            if not of.busy:
                break
            of.step()
            of.cache.check()
            last |= {event.sequence: event for event in of.events if event.finish}
            if step == 12:
                of.cancel(cancelled)
        assert not of.busy and not of.cache.open_sequences
        for number, request in zip(numbers, asked, strict=True):
            if request.beams and last[number].finish != "cancelled":
                assert [r.tokens for r in last[number].results] == lone_search(request, ends)
        assert (of.scheduler.preemptions > 0) == (tokens == 52)


def test_the_largest_elements_in_order() -> None:
    rng = np.random.default_rng(3)
    for size, count in ((5000, 8), (64 * 40 + 7, 3), (100, 16), (10, 20)):
        x = rng.integers(0, 50, size).astype(np.float32)  # with many equals
        want = np.argsort(-x, kind="stable")[:count]
        got = largest(x, count)
        np.testing.assert_array_equal(x[got], x[want])
        assert len(set(got.tolist())) == len(want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0 is out of range; valid: a whole number from 1 to 256"),
        ({"width": 2, "results": 3}, "results=3 of width=2 beams"),
        ({"early_stopping": "maybe"}, "early_stopping='maybe' is unknown"),
        ({"length_penalty": "x"}, "length_penalty='x' is out of range"),
        ({"banned": ((),)}, "empty run"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Beams(**options)


def test_searches_that_cannot_be() -> None:
    of = hash_engine("paged")
    with pytest.raises(ContextError, match="5 beams do not fit; valid: at most 4 here"):
        of.add(Request([1], 4, beams=Beams(5)))
    with pytest.raises(OptionError, match="the search names token 99; valid ids: 0 to 12"):
        of.add(Request([1], 4, beams=Beams(2, banned=((99,),))))
    with pytest.raises(UnsupportedError, match="a state that cannot be shared"):
        hash_engine("fixed").add(Request([1], 4, beams=Beams(2)))
    number = of.add(Request([1], 4, beams=Beams(2)))
    with pytest.raises(OptionError, match="is a search, which cannot be forked"):
        of.fork(number)
