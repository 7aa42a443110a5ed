"""Every decoder family beside Llama's against transformers in fp32: prefill and cached decode, on
each machine and SIMD path, from Hugging Face folders.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import MACHINES, TOLERANCE, assert_parity, prefilled, random_model, reference
from tiny_decoders import CASES

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
