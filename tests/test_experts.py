"""Mixtures of experts: the bytes counted are those of the experts that were really used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_decoders import write_gguf
from helpers import Runner, arithmetic_error, op_program, random_blocks, random_weights
from parity import TOKENS, random_model
from rich.console import Console
from tiny_decoders import CASES

from lmclock import _native
from lmclock.assemble import assemble
from lmclock.batch import Batch, Rows
from lmclock.clock import Clock
from lmclock.cost import Bound, cost, expected_experts
from lmclock.cycle import Cycle
from lmclock.engine import Engine, Request, capacity_for
from lmclock.formats import get_format
from lmclock.machines import Capacity, create
from lmclock.passes import optimise
from lmclock.program import Program
from lmclock.reports.stat import print_stat
from lmclock.reports.summary import summary
from tests.measured import limits

COUNT, TOP, WIDTH, HIDDEN = 23, 2, 32, 32
LAYER = op_program(
    f"route p, e, x, r   experts={COUNT} top={TOP}\n"
    f"experts y, x, p, e, gate, up, down   experts={COUNT}",
    f"input x tok f32 width={WIDTH}\nweight r {COUNT}x{WIDTH} f32\n"
    f"weight gate {COUNT * HIDDEN}x{WIDTH} q8_0\nweight up {COUNT * HIDDEN}x{WIDTH} q8_0\n"
    f"weight down {COUNT * WIDTH}x{HIDDEN} q8_0",
)
MACHINES = {"array": ("array", {}), **{p: ("native", {"path": p}) for p in _native.simd_paths()}}


def run(weights: dict[str, Any], batch: Batch, machine: str) -> tuple[np.ndarray, np.ndarray]:
    """(the layer's output, the ids its router chose)."""
    name, options = MACHINES[machine]
    m = create(name, **options)
    m.load(LAYER, weights, Capacity(rows=64))
    m.bind(batch)
    m.run("step")
    found = m.read("y"), m.read("e")
    m.close()
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_bytes_counted_are_those_the_kernel_reads(rows: int, machine: str) -> None:
    """Of each expert in turn the weights are changed: the output differs if they were read."""
    x = np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)
    batch = Batch({"tok": Rows.of([(0, rows)])}, {"x": x}, np.zeros(1, np.int32))
    weights = random_weights(LAYER)
    y, chosen = run(weights, batch, machine)
    touched: dict[str, int] = {}
    for name in ("gate", "up", "down"):
        part = len(weights[name].data) // COUNT
        for expert in range(COUNT):
            data = weights[name].data.copy()
            data[expert * part : (expert + 1) * part] = 0
            other, same = run(weights | {name: replace(weights[name], data=data)}, batch, machine)
            np.testing.assert_array_equal(same, chosen)
            touched[name] = touched.get(name, 0) + part * (not np.array_equal(other, y))
    route, experts = LAYER.section("step").instructions
    found = cost(experts, Bound(LAYER, "step", replace(batch, routed={"e": chosen})))
    assert found.weight == sum(touched.values())
    assert found.experts == len(np.unique(chosen)) < COUNT
    assert cost(route, Bound(LAYER, "step", batch)).weight == COUNT * WIDTH * 4


def test_padding_rows_use_no_expert() -> None:
    rows = Rows.of([(0, 3)])
    rows.valid[1] = False
    chosen = np.array([[0, 1], [7, 8], [1, 2]], np.int32)
    batch = Batch({"tok": rows}, {}, np.zeros(1, np.int32), routed={"e": chosen})
    experts = LAYER.section("step").instructions[1]
    assert cost(experts, Bound(LAYER, "step", batch)).experts == 3
    unseen = cost(experts, Bound(LAYER, "step", replace(batch, routed={})))
    assert unseen.experts == expected_experts(COUNT, TOP, 2) == COUNT * (1 - (1 - TOP / COUNT) ** 2)


# --- whole models


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("qwen")
    random_model(CASES["qwen2-moe"]()).save_pretrained(folder)
    return assemble(folder, cache="f32")


def cycles(model: Any, machine: str) -> tuple[Program, list[Cycle], Any]:
    program = optimise(model.program, 1)
    m, found = create(machine), []
    room = capacity_for(program, sequences=4, chunk=16)
    m.load(program, model.weights, room)
    engine = Engine(m, program, capacity=room, on_cycles=found.extend)
    for first in (3, 40):
        engine.add(Request([first, *TOKENS[:5]], max_new_tokens=3))
    while engine.busy:
        engine.step(8)  # many cycles in one call would leave no time to see what was chosen
    traits = m.traits
    engine.close()
    return program, found, traits


def test_the_record_of_a_cycle_has_what_the_routers_chose(qwen: Any) -> None:
    program, found, _ = cycles(qwen, "native")
    _, other, _ = cycles(qwen, "array")
    routes = [i for i in program.section("step").instructions if i.op == "route" and i["top"] > 1]
    assert len(routes) == 2  # layers 0 and 2; the shared experts are no choice
    for cycle, same in zip(found, other, strict=True):
        assert list(cycle.batch.routed) == [i.outs[1] for i in routes]
        for i in routes:
            ids = cycle.batch.routed[i.outs[1]]
            assert ids.shape == (len(cycle.batch.rows["tok"]), i["top"])
            np.testing.assert_array_equal(ids, same.batch.routed[i.outs[1]])


def test_stat_shows_the_experts_of_each_layer(qwen: Any) -> None:
    program, found, traits = cycles(qwen, "native")
    clock = Clock(program, traits.threads, traits.tick_rate, limits())
    for cycle in found:
        clock.add(cycle)
    report = summary(clock, traits)
    decode = [c for c in found if c.kind == "decode"]
    entry = report["kinds"]["decode"]["experts"]
    assert entry["observed"] and [layer["of"] for layer in entry["layers"]] == [6, 6]
    for layer, name in zip(entry["layers"], decode[0].batch.routed, strict=True):
        used = [len(np.unique(c.batch.routed[name])) for c in decode]
        assert layer["used"] == pytest.approx(np.mean(used))
    console = Console(record=True, width=100)
    print_stat(report, console)
    assert "experts used of 6, by layer (observed):" in console.export_text()
    unseen = Clock(program, traits.threads, traits.tick_rate, limits())
    for cycle in decode:
        unseen.add(replace(cycle, batch=replace(cycle.batch, routed={})))
    print_stat(summary(unseen, traits), console)
    assert "(expected of even choices):" in console.export_text()


# --- quantised experts


@pytest.mark.parametrize("form", ["q4_k", "q5_k", "q6_k", "q4_0", "q8_0"])
def test_quantised_experts(form: str) -> None:
    """Blocks of random bytes, which no writer of the gguf package makes of K-quants."""
    count, d, f = 5, 256, 256
    program = op_program(
        f"route p, e, x, r   experts={count} top=3\n"
        f"experts y, x, p, e, g, u, w   experts={count} act=q8_32\n"
        f"experts z, x, p, e, g, u, w   experts={count} kind=gelu_tanh",
        f"input x tok f32 width={d}\nweight r {count}x{d} f32\n"
        f"weight g {count * f}x{d} {form}\nweight u {count * f}x{d} {form}\n"
        f"weight w {count * d}x{f} {form}",
    )
    weights = random_weights(program)
    x = np.random.default_rng(1).standard_normal((7, d)).astype(np.float32)
    batch = Batch({"tok": Rows.of([(0, 7)])}, {"x": x}, np.zeros(1, np.int32))
    values = {}
    for machine, (name, options) in MACHINES.items():
        m = create(name, **options)
        m.load(program, weights, Capacity(rows=64))
        m.bind(batch)
        m.run("step")
        values[machine] = m.read("y"), m.read("z")
        m.close()
    for machine, found in values.items():
        for got, want in zip(found, values["array"], strict=True):
            assert arithmetic_error(got, want) <= 1e-7, machine


def test_k_quants_of_experts_from_a_file(tmp_path: Path) -> None:
    """A tensor with an axis of experts, in blocks of 256: native and reference agree."""
    config = CASES["mixtral"]()
    config.hidden_size = config.intermediate_size = 256
    random_model(config).save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "plain.gguf")
    reader, rng = gguf.GGUFReader(tmp_path / "plain.gguf"), np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for t in reader.tensors:
        if "_exps" in t.name:
            shape, kind = t.shape[::-1].tolist(), gguf.GGMLQuantizationType.Q4_K
            raw = random_blocks(get_format("q4_k"), shape[0] * shape[1], shape[2], rng)
            writer.add_tensor(t.name, raw.reshape(shape[0], shape[1], -1), raw_dtype=kind)
        else:
            writer.add_tensor(t.name, t.data)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):  # fmt: skip
        write()
    model = assemble(tmp_path / "tiny.gguf", cache="f32")
    assert model.program.weight_table["blk.0.ffn_gate_exps"].format == "q4_k"
    # Sums of f32 weights differ in their last bits, and at -O2 a code on the edge of its rounding
    # moves.
    for level, bound in ((1, 1e-6), (2, 1e-4)):
        program = optimise(model.program, level, invariant=True)
        runs = [Runner(program, model.weights, name).cycle({"a": TOKENS}, pick="all")["a"]
                for name in ("array", "native")]  # fmt: skip
        assert arithmetic_error(runs[1], runs[0]) < bound, level
