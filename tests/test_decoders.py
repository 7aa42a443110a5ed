"""Every decoder family beside Llama's against transformers in fp32: prefill and cached decode, on
each machine and SIMD path, from Hugging Face folders and from the same weights as GGUF.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_decoders import write_gguf
from helpers import arithmetic_error
from parity import (
    MACHINES,
    TOLERANCE,
    assert_parity,
    prefilled,
    random_model,
    reference,
    reloaded,
)
from tiny_decoders import CASES

from lmclock import _native
from lmclock.assemble import assemble
from lmclock.passes import optimise


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the folder of a tiny model, its logits by transformers)."""
    path = tmp_path_factory.mktemp(request.param)
    model = random_model(CASES[request.param]())
    model.save_pretrained(path)
    return path, reference(model)


@pytest.mark.parametrize("machine", MACHINES)
def test_folder(folder: tuple[Path, np.ndarray], machine: str) -> None:
    path, want = folder
    name, options = MACHINES[machine]
    assert_parity(assemble(path, cache="f32"), want, name, **options)


def test_fused_program(folder: tuple[Path, np.ndarray]) -> None:
    path, want = folder
    ours = assemble(path, cache="f32")
    fused = optimise(ours.program, 1)
    assert len(fused.section("step").instructions) < len(ours.program.section("step").instructions)
    got = prefilled(replace(ours, program=fused), "native")
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe"])
def test_experts_as_transformers_keeps_them(case: str, tmp_path: Path) -> None:
    """Gate and up of all experts in one tensor, as version 5 saves them when asked to."""
    model = random_model(CASES[case]())
    model.save_pretrained(tmp_path, save_original_format=False)
    ours = assemble(tmp_path, cache="f32")
    assert_parity(ours, reference(model), "native")
    e, table = ours.config.experts, ours.program.weight_table  # type: ignore[attr-defined]
    layer = sum(table[f"blk.0.ffn_{name}_exps"].bytes for name in ("gate", "up", "down"))
    every = sum(w.bytes for w in ours.program.weights if w.name != "token_embd")
    unused = sum(e.sparse) * layer * (e.count - e.top) // e.count
    assert ours.program.bytes_per_cycle == pytest.approx(every - unused, abs=1), "of one row"


# --- the same weights as GGUF

GGUF_CASES = [
    ("gpt2", "f32"), ("gpt2", "q8_0"), ("bigcode", "q4_0"), ("neox", "q8_0"),
    ("neox-sequential", "f32"), ("mixtral", "f32"), ("mixtral", "q4_0"), ("qwen2-moe", "f32"),
    ("qwen2-moe-renormed", "q8_0"), ("qwen3-moe", "q4_0"), ("gemma", "f32"), ("gemma2", "q8_0"),
    ("gemma3", "f32"), ("gemma3-stretched", "q4_0"), ("phi3", "q8_0"), ("olmo2", "f32"),
    ("granite", "q8_0"),
]  # fmt: skip
# What a GGUF file does not say, and its readers take for granted.
UNSTATED = {
    "gemma2": {"query_pre_attn_scalar": 24},
    "gemma3-stretched": {
        "query_pre_attn_scalar": 24, "layer_types": ["sliding_attention"] * 3,
    },
}  # fmt: skip
METADATA = {"qwen2-moe-renormed": {"expert_weights_norm": True}}


@pytest.fixture(scope="module", params=GGUF_CASES, ids=lambda case: "-".join(case))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(a GGUF file, its format, logits of the same weights by transformers)."""
    case, quant = request.param
    folder = tmp_path_factory.mktemp(case)
    config = CASES[case]()
    for name, value in UNSTATED.get(case, {}).items():
        setattr(config, name, value)
    random_model(config).save_pretrained(folder)
    write_gguf(folder, folder / "tiny.gguf", quant, **METADATA.get(case, {}))
    return folder / "tiny.gguf", quant, reference(reloaded(folder))


@pytest.mark.parametrize("machine", ["numpy", *_native.simd_paths()])
def test_gguf(file: tuple[Path, str, np.ndarray], machine: str) -> None:
    path, quant, want = file
    ours = assemble(path, cache="f32")
    assert quant in {w.format for w in ours.program.weights}
    name, options = MACHINES[machine]
    assert_parity(ours, want, name, **options)
    if quant == "f32" or name == "array":
        return
    # Rounded activations: the same program on both machines, which round alike.
    rounded = replace(ours, program=optimise(ours.program, 2, invariant=True))
    acts = {i["act"] for i in rounded.program.section("step").instructions if "act" in i.row.attrs}
    assert "q8_32" in acts
    got, other = (prefilled(rounded, m, **o) for m, o in ((name, options), ("array", {})))
    assert arithmetic_error(got, other) < 1e-4
