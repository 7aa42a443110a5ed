"""The hard cases the contract of programs, batches and machines must carry, written by hand.

Each runs on the array machine and is held to something written without it: a rerun from scratch,
plain NumPy, torch.nn, or derivatives worked out by hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmclock.batch import Batch
from lmclock.errors import LmclockError
from lmclock.listing import parse, render
from lmclock.machines import Capacity, create
from lmclock.program import Program
from lmclock.verify import verify
from tests.helpers import PAGE_SIZE, Runner, random_weights, stored
from tests.random_programs import random_program
from tests.tiny import llama

TRANSLATOR = """
program  transformer "translator"
input    src_ids src ids
input    ids tok ids
input    pos tok ids
weight   table 13x16 f32
weight   places 32x16 f32
weight   enc.norm 1x16 f32
weight   enc.q 16x16 f32
weight   enc.k 16x16 f32
weight   enc.v 16x16 f32
weight   enc.o 16x16 f32
weight   cross.k 8x16 f32
weight   cross.v 8x16 f32
weight   dec.q 16x16 f32
weight   dec.k 16x16 f32
weight   dec.v 16x16 f32
weight   dec.cq 16x16 f32
weight   dec.norm 1x16 f32
state    kv[1] paged heads=2 key=8 value=8
state    cross[1] frozen heads=1 key=8 value=8

section  encode
embed    e, src_ids, table
norm     en, e, enc.norm            kind=layer
linear   eq, en, enc.q
linear   ek, en, enc.k
linear   ev, en, enc.v
attend   ea, eq, ek, ev             heads=2 mask=full
linear   eo, ea, enc.o              add=e
linear   ck, eo, cross.k
linear   cv, eo, cross.v
store    cross[0], ck, cv

section  step
embed    x0, ids, table             scale=3.0
embed    xp, pos, places            scale=2.0
binary   x, x0, xp
linear   q, x, dec.q
linear   k, x, dec.k
linear   v, x, dec.v
store    kv[0], k, v
attend   a, q, kv[0]                heads=2
binary   y, x, a
linear   cq, y, dec.cq
attend   c, cq, cross[0]            heads=2 kv_heads=1 mask=full
binary   z, y, c
norm     zn, z, dec.norm            kind=layer
pick     last, zn
linear   scores, last, table        scale=0.4
softmax  logits, scores             log=1
"""
START, END, LONGEST, WIDTH = 1, 2, 7, 3
SOURCES = {"a": [3, 9, 4, 4, 12, 7], "b": [5, 11]}
Beam = tuple[float, list[int]]


def best_continuations(beams: list[Beam], rows: list[np.ndarray]) -> list[tuple[float, int, int]]:
    """The WIDTH best (score, beam, token) of all continuations."""
    every = [(beams[b][0] + float(row[t]), b, t) for b, row in enumerate(rows) for t in range(13)]
    return sorted(every, key=lambda item: -item[0])[:WIDTH]


def search_from_scratch(program: Program, weights: Any, source: list[int]) -> list[Beam]:
    """Beam search that recomputes every beam, encoder included, on a machine of its own."""
    beams: list[Beam] = [(0.0, [START])]
    while len(beams[0][1]) < LONGEST:
        rows = []
        for _, tokens in beams:
            alone = Runner(program, weights)
            rows.append(alone.cycle({"x": tokens}, {"x": source})["x"][-1])
        best = best_continuations(beams, rows)
        beams = [(score, [*beams[b][1], token]) for score, b, token in best]
    return beams


def test_beams_of_two_sentences_share_a_batch_and_their_source() -> None:
    program = verify(parse(TRANSLATOR))
    weights = random_weights(program)
    runner = Runner(program, weights, pages=32)
    beams: dict[str, list[Beam]] = {s: [(0.0, [START])] for s in SOURCES}
    names = {s: [s] for s in SOURCES}
    rows = runner.cycle({s: [START] for s in SOURCES}, SOURCES)
    for step in range(1, LONGEST):
        for s in SOURCES:
            best = best_continuations(beams[s], [rows[name][-1] for name in names[s]])
            children = [f"{s}{step}.{k}" for k in range(len(best))]
            for child, (_, b, _) in zip(children, best, strict=True):
                runner.fork(names[s][b], child)
            for name in names[s]:
                runner.close(name)
            beams[s] = [(score, [*beams[s][b][1], token]) for score, b, token in best]
            names[s] = children
        sources = {tuple(runner.held[name].source) for name in names["a"]}
        assert len(sources) == 1, "beams hold one frozen copy of their source"
        # Beams of both sentences interleave: their order in a batch is nobody's business.
        work = {names[s][k]: [beams[s][k][1][-1]] for k in range(WIDTH) for s in SOURCES}
        rows = runner.cycle(work)
    for s, source in SOURCES.items():
        want = search_from_scratch(program, weights, source)
        assert [tokens for _, tokens in beams[s]] == [tokens for _, tokens in want]
        np.testing.assert_allclose([b[0] for b in beams[s]], [b[0] for b in want], atol=1e-4)
    assert beams["a"][0][1] != beams["b"][0][1], "the source matters"


MIXTRAL = """
program  mixtral "layer"
input    x tok f32 width=32
weight   router 6x32 f32
weight   gate 120x32 f32
weight   up 120x32 f32
weight   down 192x20 f32
section  step
route    p, e, x, router            experts=6 top=2
experts  y, x, p, e, gate, up, down   experts=6
binary   logits, y, x
"""


def test_mixture_of_experts_is_the_plain_sum() -> None:
    program = verify(parse(MIXTRAL))
    weights = random_weights(program)
    x = np.random.default_rng(1).standard_normal((9, 32), np.float32)
    runner = Runner(program, weights)
    got = runner.machine
    got.bind(runner.batch({"a": [0] * 4, "b": [0] * 5}, pick="none", x=x))
    got.run("step")
    router, gate, up, down = (weights[n].unpack() for n in ("router", "gate", "up", "down"))
    for row in range(9):
        scores = np.exp(router @ x[row])
        chosen = sorted(range(6), key=lambda e: (-scores[e], e))[:2]
        want = x[row].copy()
        for e in chosen:
            g, u = gate[20 * e : 20 * (e + 1)] @ x[row], up[20 * e : 20 * (e + 1)] @ x[row]
            share = scores[e] / scores[chosen].sum()
            want += share * (down[32 * e : 32 * (e + 1)] @ (g / (1 + np.exp(-g)) * u))
        assert list(got.read("e")[row]) == chosen
        np.testing.assert_allclose(got.read("logits")[row], want, atol=1e-5)


LSTM = """
program  lstm "language model"
input    ids tok ids
weight   table 11x6 f32
weight   in.0 20x6 f32
weight   state.0 20x5 f32
weight   b_in.0 1x20 f32
weight   b_state.0 1x20 f32
weight   in.1 20x5 f32
weight   state.1 20x5 f32
weight   b_in.1 1x20 f32
weight   b_state.1 1x20 f32
weight   out 11x5 f32
state    hc[2] fixed width=10
section  step
embed    x, ids, table
lstm     h0, x, hc[0], in.0, state.0     bias=b_in.0 bias_k=b_state.0
lstm     h1, h0, hc[1], in.1, state.1    bias=b_in.1 bias_k=b_state.1
pick     p, h1
linear   logits, p, out
"""


def lstm_by_torch(weights: Any, ids: list[int]) -> np.ndarray:
    """Logits (rows, 11) by torch.nn.LSTM, the whole sequence at once."""
    torch = pytest.importorskip("torch")
    layers = torch.nn.LSTM(6, 5, num_layers=2)
    names = {"weight_ih": "in", "weight_hh": "state", "bias_ih": "b_in", "bias_hh": "b_state"}
    with torch.no_grad():
        for name, ours in names.items():
            for n in range(2):
                target = getattr(layers, f"{name}_l{n}")
                target.copy_(torch.tensor(weights[f"{ours}.{n}"].unpack()).reshape(target.shape))
        h, _ = layers(torch.tensor(weights["table"].unpack()[ids]))
        return (h @ torch.tensor(weights["out"].unpack()).T).numpy()


@pytest.mark.parametrize("namespace", ["numpy", "torch"])
def test_lstm_carries_its_state_over_cycles_and_forks(namespace: str) -> None:
    program = verify(parse(LSTM))
    weights = random_weights(program)
    runner = Runner(program, weights, namespace=namespace)
    a, b = [1, 5, 2, 9, 10, 3], [4, 4, 0]
    got = [runner.cycle({"a": a[:3]}, pick="all")["a"]]
    runner.cycle({"a": [], "b": b[:2]})  # a rests: its state stays
    runner.fork("a", "c")
    for step in range(3):
        # "c" goes another way from here, in the same batches
        got.append(runner.cycle({"c": [b[step]], "a": [a[3 + step]]})["a"])
    np.testing.assert_allclose(np.concatenate(got), lstm_by_torch(weights, a), atol=1e-5)
    c = runner.cycle({"c": [7], "b": b[2:]})
    np.testing.assert_allclose(c["b"][-1], lstm_by_torch(weights, b)[-1], atol=1e-5)
    np.testing.assert_allclose(c["c"][-1], lstm_by_torch(weights, a[:3] + b + [7])[-1], atol=1e-5)


def test_a_used_slot_starts_a_new_sequence_from_zeros() -> None:
    program = verify(parse(LSTM))
    runner = Runner(program, random_weights(program), slots=1)
    first = runner.cycle({"a": [1, 2, 3]})["a"]
    runner.close("a")
    np.testing.assert_array_equal(runner.cycle({"b": [1, 2, 3]})["b"], first)


PROMPTS = {"a": [3, 1, 4, 1, 5, 9, 2, 6, 5], "b": [2, 7, 1, 8, 2], "c": [1, 6]}


@pytest.fixture(scope="module")
def decoder() -> tuple[Program, Any]:
    program = verify(llama(cache="f32"))
    return program, random_weights(program)


def alone(decoder: tuple[Program, Any], ids: list[int]) -> np.ndarray:
    """Logits of the last row, the sequence by itself in one piece."""
    return Runner(*decoder).cycle({"x": ids})["x"][-1]


def test_prefill_and_decode_rows_of_three_sequences_mix(decoder: tuple[Program, Any]) -> None:
    runner = Runner(*decoder)
    runner.cycle({"a": PROMPTS["a"][:8]})
    runner.cycle({"b": PROMPTS["b"][:2]})
    # a decodes one row, b goes on in the middle of its prompt, c begins
    rows = runner.cycle({"b": PROMPTS["b"][2:], "a": PROMPTS["a"][8:], "c": PROMPTS["c"]})
    for name, ids in PROMPTS.items():
        np.testing.assert_allclose(rows[name][-1], alone(decoder, ids), atol=2e-5)


def test_fork_and_truncate_of_a_paged_sequence(decoder: tuple[Program, Any]) -> None:
    a = PROMPTS["a"]
    assert len(a) % PAGE_SIZE, "the fork must find a page that is partly filled"
    runner = Runner(*decoder)
    runner.cycle({"a": a})
    runner.fork("a", "b")
    rows = runner.cycle({"a": [10, 11], "b": [20]})
    rows |= runner.cycle({"b": [21, 22]})
    np.testing.assert_allclose(rows["a"][-1], alone(decoder, [*a, 10, 11]), atol=2e-5)
    np.testing.assert_allclose(rows["b"][-1], alone(decoder, [*a, 20, 21, 22]), atol=2e-5)
    shared = set(runner.held["a"].pages) & set(runner.held["b"].pages)
    assert len(shared) == len(a) // PAGE_SIZE
    # b goes back into a page that c shares, and writes there: c must not see it.
    runner.fork("b", "c")
    runner.truncate("b", len(a) + 1)
    rows = runner.cycle({"b": [33, 34], "c": [35]})
    np.testing.assert_allclose(rows["b"][-1], alone(decoder, [*a, 20, 33, 34]), atol=2e-5)
    np.testing.assert_allclose(rows["c"][-1], alone(decoder, [*a, 20, 21, 22, 35]), atol=2e-5)


def test_pieces_of_a_prompt_equal_the_whole(decoder: tuple[Program, Any]) -> None:
    ids = PROMPTS["a"]
    whole = Runner(*decoder).cycle({"x": ids}, pick="all")["x"]
    for cuts in ([4], [1, 2, 8], list(range(1, 9))):
        runner = Runner(*decoder)
        pieces = np.split(np.array(ids), cuts)
        rows = [runner.cycle({"x": list(piece)}, pick="all")["x"] for piece in pieces]
        np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-5)


def test_padding_rows_change_nothing(decoder: tuple[Program, Any]) -> None:
    plain, padded = Runner(*decoder), Runner(*decoder)
    for work in ({"a": PROMPTS["a"], "b": PROMPTS["b"]}, {"b": [7], "a": [8]}):
        want = plain.cycle(work)
        batch = padded.batch(work, padding=3)
        assert len(batch.rows["tok"]) == 6 + sum(map(len, work.values()))
        # Ids of padding rows are nobody's: not even a row of the table.
        batch.inputs["ids"][~batch.rows["tok"].valid] = 10**6
        padded.machine.bind(batch)
        padded.machine.run("step")
        got = padded.machine.read("logits")
        attended = padded.machine.read("a.0")
        padded.advance(work)
        np.testing.assert_allclose(got, np.concatenate(list(want.values())), atol=1e-5)
        assert not attended[~batch.rows["tok"].valid].any()


@pytest.mark.parametrize("seed", range(6))
def test_a_span_run_twice_gives_the_same(seed: int) -> None:
    """States included: a cycle run in spans, some of them repeated, and again from the start."""
    program = random_program(np.random.default_rng(seed), length=14)
    weights = random_weights(program)
    once, twice = Runner(program, weights), Runner(program, weights)
    length = len(program.section("step").instructions)
    for work in ({"a": [1, 2, 3, 4, 5], "b": [6]}, {"a": [7], "b": [8, 9]}):
        want = once.cycle(work)
        machine = twice.machine
        machine.bind(twice.batch(work))
        for first in range(0, length, 3):
            machine.run("step", first, min(first + 3, length))
            machine.run("step", first, min(first + 3, length))
        machine.run("step")
        got = machine.read("logits")
        twice.advance(work)
        np.testing.assert_array_equal(got, np.concatenate(list(want.values())))


def test_a_value_written_over_is_what_later_instructions_see(decoder: tuple[Program, Any]) -> None:
    program, weights = decoder
    runner = Runner(program, weights)
    names = [i.outs[0] if i.outs else "" for i in program.section("step").instructions]
    middle = names.index("x.1") + 1
    machine = runner.machine
    machine.bind(runner.batch({"a": [1, 2, 3]}))
    machine.run("step")
    want, residual = machine.read("logits"), machine.read("x.1")
    machine.bind(runner.batch({"a": [4, 5, 6]}))
    machine.run("step", 0, middle)
    machine.write("x.1", residual)
    machine.run("step", middle)
    np.testing.assert_array_equal(machine.read("logits"), want)
    with pytest.raises(LmclockError, match=r"x\.1 is"):
        machine.write("x.1", residual[:1])
    with pytest.raises(LmclockError, match="nonsense"):
        machine.read("nonsense")


TRAINED = """
program  net "2-3-1"
input    x seq f32 width=2
input    target seq f32 width=1
weight   w1 3x2 f32
weight   b1 1x3 f32
weight   w2 1x3 f32
weight   b2 1x1 f32
section  train
linear   a, x, w1    bias=b1
act      h, a        kind=relu
linear   y, h, w2    bias=b2
loss     l, y, target    kind=mse
"""


def test_gradients_of_a_small_net_are_the_hand_computed_ones() -> None:
    pytest.importorskip("torch")
    program = verify(parse(TRAINED))
    values = {
        "w1": [[1.0, -2.0], [0.5, 1.0], [-1.0, 0.25]], "b1": [[0.5, -0.25, 0.0]],
        "w2": [[2.0, -1.0, 3.0]], "b2": [[0.125]],
    }  # fmt: skip
    weights = {name: stored(name, np.array(v, np.float32)) for name, v in values.items()}
    machine: Any = create("array", namespace="torch")
    machine.load(program, weights, Capacity())
    x, target = np.array([[1.0, 2.0], [-2.0, 1.0]]), np.array([[1.0], [2.0]])
    machine.bind(Batch({}, {"x": x, "target": target}, np.arange(2)))
    machine.run("train")
    # Row 1: a = (-2.5, 2.25, -0.5), h = (0, 2.25, 0), y = -2.125, dl/dy = 2 (y - 1) = -6.25
    # Row 2: a = (-3.5, -0.25, 2.25), h = (0, 0, 2.25), y = 6.875, dl/dy = 2 (y - 2) = 9.75
    np.testing.assert_array_equal(machine.read("y"), [[-2.125], [6.875]])
    np.testing.assert_array_equal(machine.read("l"), [[9.765625], [23.765625]])
    machine.value("l").sum().backward()
    want = {
        "b2": [[3.5]],
        "w2": [[0.0, -6.25 * 2.25, 9.75 * 2.25]],
        # dl/da = dl/dy w2 where a > 0: row 1 gives 6.25 in the second, row 2 29.25 in the third
        "b1": [[0.0, 6.25, 29.25]],
        "w1": [[0.0, 0.0], [6.25, 12.5], [-58.5, 29.25]],
    }
    for name, gradient in want.items():
        np.testing.assert_array_equal(machine.weights[name].grad.numpy(), gradient, err_msg=name)


@pytest.mark.parametrize("text", [TRANSLATOR, MIXTRAL, LSTM, TRAINED])
def test_hand_written_programs_survive_the_listing(text: str) -> None:
    program = verify(parse(text))
    assert parse(render(program)) == program
