"""The native machine keeps the contract of machines: bits, spans, states, errors, ticks."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmclock import _native
from lmclock.batch import ADJUST, Batch, Rows
from lmclock.errors import (
    ContextError,
    FileError,
    LmclockError,
    OptionError,
    ProgramError,
    UnsupportedError,
)
from lmclock.listing import parse
from lmclock.machines import Capacity, create
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.verify import verify
from tests.helpers import (
    PAGE_SIZE,
    Runner,
    arithmetic_error,
    numbers,
    op_program,
    random_weights,
    sampling,
    stored,
)
from tests.random_programs import random_program
from tests.test_hard_cases import LSTM, MIXTRAL, TRANSLATOR
from tests.tiny import llama

PATHS = _native.simd_paths()
FORMATS = ("q4_1", "q8_0", "f32")  # of the layers' matrices
PROMPTS = {"a": [3, 1, 4, 1, 5, 9, 2, 6, 5] * 9, "b": [2, 7, 1, 8, 2], "c": [1, 6]}


def native(program: Program, weights: Any, **options: Any) -> Runner:
    return Runner(program, weights, machine="native", **{"threads": 2, **options})


# --- whole programs


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_agree_with_the_reference(seed: int) -> None:
    program = random_program(np.random.default_rng(seed), length=14)
    weights = random_weights(program)
    want, got = Runner(program, weights), native(program, weights, path=PATHS[seed % len(PATHS)])
    for work in ({"a": [1, 2, 3, 4, 5], "b": [6]}, {"a": [7], "b": [8, 9], "c": list(range(20))}):
        expected, found = want.cycle(work, padding=2), got.cycle(work, padding=2)
        for name in work:
            assert arithmetic_error(found[name], expected[name]) < 1e-8


@pytest.mark.parametrize("text", [TRANSLATOR, LSTM])
def test_hand_written_programs_agree_with_the_reference(text: str) -> None:
    program = verify(parse(text))
    weights = random_weights(program)
    want, got = Runner(program, weights), native(program, weights)
    source = {"a": [3, 9, 4, 4, 12, 7], "b": [5, 11]} if program.has("encode") else None
    for work, given in (({"a": [1], "b": [1, 2]}, source), ({"b": [4], "a": [3, 5]}, None)):
        expected, found = want.cycle(work, given), got.cycle(work, given)
        for name in work:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    for runner in (want, got):
        runner.fork("a", "d")
    work = {"d": [7], "a": [8]}
    expected, found = want.cycle(work), got.cycle(work)
    for name in work:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0"])
def test_every_level_of_optimisation_agrees_with_the_reference(level: int, cache: str) -> None:
    program = optimise(llama(cache=cache, width=128), level, invariant=True)
    weights = random_weights(program)
    want, got = Runner(program, weights), native(program, weights)
    for work in ({"a": PROMPTS["a"]}, {"a": [4], "b": PROMPTS["b"]}, {"b": [1], "a": [2]}):
        expected, found = want.cycle(work), got.cycle(work)
        for name in work:
            # A rounding that falls the other way moves more than the arithmetic does.
            assert arithmetic_error(found[name], expected[name]) < (1e-4 if level == 2 else 1e-8)


# --- bits


@pytest.fixture(scope="module", params=["f32", "f16", "q8_0"])
def decoder(request: pytest.FixtureRequest) -> tuple[Program, Any]:
    plain = llama(cache=request.param, width=128, formats=FORMATS)
    program = optimise(plain, 2, invariant=True)
    return program, random_weights(program)


def logits(decoder: tuple[Program, Any], work: Sequence[Mapping[str, Sequence[int]]],
           padding: int = 0, **options: Any) -> list[np.ndarray]:  # fmt: skip
    """Logits of every row of sequence a, cycle by cycle."""
    runner = native(*decoder, **options)
    return [runner.cycle(w, pick="all", padding=padding)["a"] for w in work]


@pytest.mark.parametrize("path", PATHS)
def test_a_row_keeps_its_bits(decoder: tuple[Program, Any], path: str) -> None:
    """Whatever else is in the batch, however many threads and pages, whole or in pieces."""
    ids = PROMPTS["a"]
    whole = logits(decoder, [{"a": ids}], path=path)[0]
    work = {"b": PROMPTS["b"], "a": ids, "c": PROMPTS["c"]}
    for threads in (1, 2, 3):
        got = logits(decoder, [work], padding=1, path=path, threads=threads)[0]
        np.testing.assert_array_equal(got, whole, f"in a batch, {threads} threads")
    for cuts in ([1], [40], [3, 64, 66], list(range(1, 12))):
        pieces = [{"a": list(part)} for part in np.split(np.array(ids), cuts)]
        got = np.concatenate(logits(decoder, pieces, path=path))
        np.testing.assert_array_equal(got, whole, f"cut at {cuts}")


def test_the_size_of_a_page_changes_no_bit(decoder: tuple[Program, Any]) -> None:
    program, weights = decoder
    ids = np.array([PROMPTS["a"]], np.int32).T
    rows = {"tok": Rows.of([(0, len(ids))]), "src": Rows.of([(0, 0)])}
    found = []
    for size in (PAGE_SIZE, 16, 48, 64, 100):
        machine = create("native", threads=2)
        machine.load(program, weights, Capacity(128, 128, 1, size, {"kv": 32}))
        pages = {"kv": [np.arange(32, dtype=np.int32)[::-1]]}
        machine.bind(Batch(rows, {"ids": ids}, np.zeros(1, np.int32), pages, page_size=size,
                           pick=np.arange(len(ids)), sampling=sampling(len(ids))))  # fmt: skip
        machine.run("step")
        found.append(machine.read("logits"))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_vector_paths_give_the_same_bits(decoder: tuple[Program, Any]) -> None:
    """Scalar may differ: its multiply-add rounds twice, once in 2^29 times."""
    work = [{"a": PROMPTS["a"]}, {"a": [7]}]
    found = [logits(decoder, work, path=path) for path in PATHS if path != "scalar"]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


# --- spans, reading and writing


@pytest.mark.parametrize("seed", range(4))
def test_a_span_run_twice_gives_the_same(seed: int) -> None:
    program = random_program(np.random.default_rng(seed), length=14)
    weights = random_weights(program)
    once, twice = native(program, weights), native(program, weights)
    length = len(program.section("step").instructions)
    for work in ({"a": [1, 2, 3, 4, 5], "b": [6]}, {"a": [7], "b": [8, 9]}):
        want = once.cycle(work)
        machine = twice.machine
        machine.bind(twice.batch(work))
        for first in range(0, length, 3):
            for _ in range(2):
                machine.run("step", first, min(first + 3, length))
        machine.run("step")
        got = machine.read("logits")
        twice.advance(work)
        np.testing.assert_array_equal(got, np.concatenate(list(want.values())))


def test_a_recurrent_state_moves_at_commit_only() -> None:
    program = verify(parse(LSTM))
    runner = native(program, random_weights(program))
    runner.cycle({"a": [1, 2]})
    machine = runner.machine
    machine.bind(runner.batch({"a": [3]}))
    machine.run("step")
    first = machine.read("logits")
    machine.run("step")
    np.testing.assert_array_equal(machine.read("logits"), first)
    machine.bind(runner.batch({"a": [3]}))  # never committed: the same again
    machine.run("step")
    np.testing.assert_array_equal(machine.read("logits"), first)
    machine.commit()
    machine.run("step")
    assert (machine.read("logits") != first).any()


def test_values_are_read_while_their_register_holds_them() -> None:
    program = optimise(llama(cache="f32"), 0)
    weights = random_weights(program)
    runner = native(program, weights)
    machine = runner.machine
    machine.bind(runner.batch({"a": [1, 2, 3]}))
    shared = dict(program.registers)
    first = program.section("step").instructions[0].outs[0]
    with pytest.raises(ProgramError, match=f"value {first} is not in its register"):
        machine.read(first)
    machine.run("step")
    gone = next(v for v, r in program.registers if list(shared.values()).count(r) > 1)
    with pytest.raises(ProgramError, match="keep="):
        machine.read(gone)
    with pytest.raises(ProgramError, match="keep="):
        machine.run("step", len(program.section("step").instructions) // 2)
    with pytest.raises(ProgramError, match="no value 'nonsense'"):
        machine.read("nonsense")
    pages = {"kv": 64}
    machine.load(program, weights, Capacity(16, 16, 16, PAGE_SIZE, pages), keep=[gone])
    machine.bind(runner.batch({"a": [1, 2, 3]}))
    machine.run("step")
    assert machine.read(gone).shape[0] == 3


def test_a_value_written_over_is_what_later_instructions_see() -> None:
    program = verify(llama(cache="f32"))
    weights = random_weights(program)
    runner = native(program, weights)
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
    with pytest.raises(ProgramError, match=r"x\.1 is \(3, \d+\), not \(1, "):
        machine.write("x.1", residual[:1])
    machine.write("ids", np.array([[1], [2], [3]]))
    machine.run("step")
    np.testing.assert_array_equal(machine.read("logits"), want)


def test_a_second_program_replaces_the_first() -> None:
    machine = create("native", threads=2)
    for text in (LSTM, MIXTRAL):
        program = verify(parse(text))
        weights = random_weights(program)
        got, want = Runner(program, weights, machine=machine), Runner(program, weights)
        inputs = {} if text is LSTM else {"x": numbers(3, 32)}
        for runner in (got, want):
            runner.machine.bind(runner.batch({"a": [1, 2, 3]}, **inputs))
            runner.machine.run("step")
        logits = [runner.machine.read("logits") for runner in (got, want)]
        np.testing.assert_allclose(*logits, atol=1e-5)


# --- ticks


def test_ticks_cover_every_instruction_and_thread() -> None:
    program = optimise(llama(), 2)
    runner = native(program, random_weights(program), threads=2)
    machine = runner.machine
    machine.bind(runner.batch({"a": [1, 2, 3]}))
    before = machine.now()
    ticks = machine.run("step", 0, 7)
    after = machine.now()
    assert ticks.table.shape == (7, 2, 2)
    assert ticks.table.dtype == np.int64
    stamps = ticks.table.transpose(1, 0, 2).reshape(2, -1)
    assert (np.diff(stamps, axis=1) >= 0).all(), "a thread's stamps ascend"
    assert before <= ticks.begin <= stamps.min() <= stamps.max() <= ticks.end <= after
    # Nobody begins an instruction that threads share before all have ended what is before it.
    for n, i in enumerate(program.section("step").instructions[:7]):
        if n and i.op in ("qkv", "glu", "linear", "attend"):
            assert ticks.table[n, :, 0].min() >= ticks.table[:n, :, 1].max()
    assert machine.run("step", 7, 9).first == 7
    assert machine.traits.tick_source in ("tsc", "wall")
    assert machine.traits.tick_rate > 1e6


# --- refusals


def test_what_the_machine_lacks_is_refused_at_load() -> None:
    machine = create("native", threads=1)
    declare = "input x tok f32 width=4\ninput t tok ids\n"
    for body, section, what in (
        ("loss l, x, t", "step", "opcode loss"),
        ("dropout y, x   p=0.5", "step", "opcode dropout"),
        ("act y, x", "train", "section train"),
    ):
        with pytest.raises(UnsupportedError, match=what):
            machine.load(op_program(body, declare, section), {}, Capacity())
    states = {"kv[1] paged heads=1 key=16 value=32 format=q8_0": "multiples of 32",
              "kv[1] paged heads=1 key=32 value=32 format=q4_1": "format q4_1"}  # fmt: skip
    for state, what in states.items():
        program = replace(
            op_program("store kv[0], x, v", "input x tok f32 width=32\ninput v tok f32 width=32\n"
                       "state kv[1] paged heads=1 key=32 value=32"),
            states=parse(f"program a \"b\"\nstate {state}").states,
        )  # fmt: skip
        with pytest.raises(UnsupportedError, match=what):
            machine.load(program, {}, Capacity())
    program = op_program("act y, x", declare)
    with pytest.raises(ProgramError, match="act y: register 0 is both read and written"):
        machine.load(replace(program, registers=(("x", 0), ("y", 0))), {}, Capacity())
    with pytest.raises(ProgramError, match="w is declared but not given"):
        machine.load(op_program("linear y, x, w", declare + "weight w 3x4 f32"), {}, Capacity())


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0", "q4_1"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(form: str, bad: float) -> None:
    program = op_program("linear y, x, blk.w   norm=n", "input x tok f32 width=64\n"
                         f"weight blk.w 40x64 {form}\nweight n 1x64 f32")  # fmt: skip
    weights = random_weights(program)
    machine = create("native", threads=2)
    data = weights["blk.w"].data.copy()
    last = data.reshape(40, -1)[33]  # in a panel that is not full
    number = np.array([bad], np.float32)
    raw = {"f32": number, "bf16": (number.view(np.uint32) >> 16).astype(np.uint16)}.get(
        form, number.astype(np.float16))  # fmt: skip
    last[: raw.nbytes] = raw.view(np.uint8)
    with pytest.raises(FileError, match=r"blk\.w"):
        machine.load(program, weights | {"blk.w": replace(weights["blk.w"], data=data)}, Capacity())
    scale = np.ones((1, 64), np.float32)
    scale[0, 63] = bad
    with pytest.raises(FileError, match="tensor n "):
        machine.load(program, weights | {"n": stored("n", scale)}, Capacity())
    machine.load(program, weights, Capacity())


def test_after_a_load_that_failed_nothing_is_loaded_until_one_succeeds() -> None:
    good = op_program("store kv[0], x, x\nlinear y, x, w", "input x tok f32 width=32\n"
                      "weight w 3x32 f32\nstate kv[1] paged heads=1 key=32 value=32")  # fmt: skip
    weights = random_weights(good)
    infinite = {"w": stored("w", np.full((3, 32), np.inf, np.float32))}
    huge = Capacity(8, page_size=2**20, pages={"kv": 2**31 - 1})
    unknown = op_program("loss l, x, t", "input x tok f32 width=4\ninput t tok ids\n")
    failures: list[tuple[type[LmclockError], Program, Any, Capacity]] = [
        (FileError, good, infinite, Capacity(8)),
        (ContextError, good, weights, huge),
        (ProgramError, good, {}, Capacity(8)),
        (UnsupportedError, unknown, {}, Capacity(8)),
    ]
    machine = create("native", threads=2)
    x = numbers(2, 32)
    room = Capacity(8, page_size=PAGE_SIZE, pages={"kv": 4})
    some = Batch({"tok": Rows.of([(0, 2)]), "src": Rows.of([(0, 0)])}, {"x": x},
                 np.zeros(1, np.int32), {"kv": [np.zeros(1, np.int32)]},
                 page_size=PAGE_SIZE)  # fmt: skip
    uses = (
        lambda: machine.bind(some),
        lambda: machine.run("step"),
        machine.commit,
        lambda: machine.read("y"),
        lambda: machine.write("x", x),
        lambda: machine.copy("kv", [(0, 1)]),
    )
    for use in uses:
        with pytest.raises(ProgramError, match="no program is loaded"):
            use()
    for kind, program, given, capacity in failures:
        with pytest.raises(kind):
            machine.load(program, given, capacity)
        for use in uses:
            with pytest.raises(ProgramError, match="no program is loaded, since the last load"):
                use()
        machine.load(good, weights, room)
        with pytest.raises(ProgramError, match="no batch is bound"):
            machine.run("step")
        machine.bind(some)
        machine.run("step")
        np.testing.assert_allclose(machine.read("y"), x @ weights["w"].unpack().T, atol=1e-5)
    machine.close()
    for use in uses:
        with pytest.raises(ProgramError, match="the machine is closed"):
            use()


def test_batches_that_do_not_fit_are_refused() -> None:
    program = verify(llama(cache="f32"))
    runner = native(program, random_weights(program))
    machine = runner.machine
    with pytest.raises(ProgramError, match="no batch is bound"):
        machine.run("step")
    good = runner.batch({"a": [1, 2, 3], "b": [4]})
    tok = good.rows["tok"]
    picks = {"pick": np.arange(4, dtype=np.int32), "sampling": sampling(4)}
    far = {"kv": [np.array([900], np.int32), good.pages["kv"][1]]}
    few = {"kv": [good.pages["kv"][0][:0], good.pages["kv"][1]]}
    ascending = Rows(tok.starts, np.array([0, 2, 1, 0], np.int32), tok.valid)
    torn = Rows(np.array([0, 9, 4], np.int32), tok.positions, tok.valid)
    row_9 = np.array([(9, 0, 0, 1.0)], ADJUST)
    cases: list[tuple[dict[str, Any], type[LmclockError], str]] = [
        ({"slots": np.array([0, 99], np.int32)}, ProgramError, "slot 99 does not exist"),
        ({"slots": np.array([-1, 0], np.int32)}, ProgramError, "slot -1"),
        ({"pages": far}, ProgramError, "page 900 does not exist"),
        ({"pages": few}, ProgramError, "sequence 0 reaches page 0"),
        ({"pick": np.array([4], np.int32)}, ProgramError, "picked row 4"),
        ({"rows": good.rows | {"tok": ascending}}, ProgramError, "must ascend"),
        ({"rows": good.rows | {"tok": torn}}, ProgramError, "do not bound"),
        ({"inputs": {"ids": np.zeros((9, 1), np.int32)}}, ProgramError, "input 0 must have 4"),
        ({"inputs": {}}, ProgramError, "value ids is not in its register"),
        ({"inputs": {"ids": np.full((4, 1), 10**6)}}, ProgramError, "row 1000000 of "),
        ({"page_size": 99}, ProgramError, "pages of 99"),
        ({"sampling": sampling(1)}, ProgramError, "sampling settings for 2 picks"),
        ({"adjust": row_9}, ProgramError, "sorted by row"),
        ({**picks, "sampling": sampling(0)}, ProgramError, "brings no sampling settings"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)):
            machine.bind(replace(good, **change))
            machine.run("step")
    machine.bind(good)
    machine.run("step")
    machine.load(program, random_weights(program), Capacity(3, 1, 16, PAGE_SIZE, {"kv": 64}))
    with pytest.raises(ContextError, match="4 tok rows exceeds the capacity, 3"):
        machine.bind(good)
    with pytest.raises(ProgramError, match="page 64 does not exist"):
        machine.copy("kv", [(0, 64)])


def test_logits_that_are_not_finite_are_an_error() -> None:
    program = op_program("pick p, x\nsample next, p", "input x tok f32 width=20")
    machine = create("native", threads=2)
    machine.load(program, {}, Capacity())
    for bad, temperature in ((np.nan, 0), (np.nan, 1), (np.inf, 0.5), (-np.inf, 1)):
        x = numbers(2, 20)
        x[1, 17 if bad != -np.inf else slice(None)] = bad
        settings = sampling(2, temperature=temperature)
        machine.bind(Batch({"tok": Rows.of([(0, 2)])}, {"x": x}, np.zeros(1, np.int32),
                           pick=np.arange(2), sampling=settings))  # fmt: skip
        with pytest.raises(LmclockError, match="sample next: logits of row 1 are not finite"):
            machine.run("step")


def test_options_out_of_range_are_refused() -> None:
    for options in ({"threads": 0}, {"threads": 2000}, {"path": "mmx"}):
        with pytest.raises(OptionError, match=r"valid|thread count"):
            create("native", **options)


def _run_in_child(machine: Any, queue: Any) -> None:
    try:
        machine.run("step")
        queue.put("ran")
    except LmclockError as error:
        queue.put(str(error))


def test_a_forked_process_is_told_that_the_threads_are_not_its_own() -> None:
    program = op_program("act y, x", "input x tok f32 width=4")
    machine = create("native", threads=2)
    machine.load(program, {}, Capacity())
    machine.bind(Batch({"tok": Rows.of([(0, 1)])}, {"x": numbers(1, 4)}, np.zeros(1, np.int32)))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_run_in_child, args=(machine, queue))
    child.start()
    assert "before fork" in queue.get()
    child.join(20)
    machine.run("step")
    assert machine.read("y").shape == (1, 4)


def test_it_never_computes_through_the_array_machine() -> None:
    source = Path(sys.modules["lmclock.machines.native"].__file__ or "").read_text()
    assert "array_" not in source.replace("_array_", "") and "machines.array" not in source
    code = """
import sys
import numpy as np
from lmclock.batch import Batch, Rows
from lmclock.listing import read
from lmclock.machines import Capacity, create
m = create("native", threads=1)
m.load(read("examples/neurons.lmc"), {}, Capacity())
x = np.ones((2, 2), np.float32)
m.bind(Batch({"tok": Rows.of([(0, 2)])}, {"x": x}, np.zeros(1, np.int32)))
m.run("step")
assert m.read("y").shape == (2, 1)
print([name for name in sys.modules if "machines.array" in name or name == "torch"])
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("size", [0, 100, 1 << 16, 64 << 20])
def test_memory_made_ready_is_used_whatever_its_size(size: int) -> None:
    program = op_program("linear y, x, w", "input x tok f32 width=64\nweight w 640x64 f32")
    weights, x = random_weights(program), numbers(3, 64)
    some = Batch({"tok": Rows.of([(0, 3)]), "src": Rows.of([(0, 0)])}, {"x": x},
                 np.zeros(1, np.int32), page_size=PAGE_SIZE)  # fmt: skip
    found = []
    for prepared in (None, size):
        machine = create("native", threads=2)
        for _ in range(2):  # a machine that is loaded makes nothing ready
            if prepared is not None:
                machine.prepare(prepared)
            machine.load(program, weights, Capacity(8, page_size=PAGE_SIZE))
        machine.bind(some)
        machine.run("step")
        found.append(machine.read("y").copy())
        machine.close()
    np.testing.assert_array_equal(found[0], found[1])
