"""A model of transformers beside its program: the same tokens in one causal pass, and in chunks and
single rows over a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers import Runner

from lmclock import _native
from lmclock.assemble import Assembled

torch.set_num_threads(1)  # for matrices this small a second thread only waits for a processor
TOLERANCE = 1e-4
TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, 96, 23)]
CHUNKS = (1, 6, 9)  # then one by one: pages of the test's machine hold four positions

# Every machine and path there is here: (name of the machine, its options).
MACHINES: dict[str, tuple[str, dict[str, Any]]] = {
    "numpy": ("array", {}),
    "torch": ("array", {"namespace": "torch"}),
    **{path: ("native", {"path": path}) for path in _native.simd_paths()},
}


def random_model(config: Any) -> Any:
    """The transformers model of a configuration, with weights that keep activations near one."""
    torch.manual_seed(3)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval().float()
    added = "gemma" in config.model_type  # its norms add one to their weights
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim > 1:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(0.2 * noise + (0 if name.endswith("bias") or added else 1))
    return model


def reloaded(folder: Path) -> Any:
    """The transformers model of a folder, in fp32."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def reference(model: Any) -> np.ndarray:
    """(tokens, vocab): logits of TOKENS in one causal pass."""
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()


def prefilled(model: Assembled, machine: str, **options: Any) -> np.ndarray:
    runner = Runner(model.program, model.weights, machine, **options)
    return runner.cycle({"a": TOKENS}, pick="all")["a"]


def decoded(model: Assembled, machine: str, **options: Any) -> np.ndarray:
    """The same logits from chunks and then single rows, another sequence running beside."""
    runner = Runner(model.program, model.weights, machine, **options)
    rows, at = [], 0
    for size in [*CHUNKS, *[1] * (len(TOKENS) - sum(CHUNKS))]:
        work = {"a": TOKENS[at : at + size], "b": TOKENS[:size]}
        rows.append(runner.cycle(work, pick="all")["a"])
        at += size
    return np.concatenate(rows)


def assert_parity(
    model: Assembled, want: np.ndarray, machine: str = "array", **options: Any
) -> None:
    assert 0.5 < want.std() < 5
    for run in (prefilled, decoded):
        worst = float(np.abs(run(model, machine, **options) - want).max())
        assert worst <= TOLERANCE, f"{run.__name__} on {machine} {options}: {worst}"
