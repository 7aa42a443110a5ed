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
