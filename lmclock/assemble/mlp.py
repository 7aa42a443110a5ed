"""The feed-forward net: linear layers with activations between them, over rows of numbers."""

from __future__ import annotations

from collections.abc import Mapping

from lmclock.assemble.blocks import Builder
from lmclock.config.mlp import MlpConfig
from lmclock.program import Input, State

HARMLESS = r"^(criterion|loss|loss_fn)\."


def names(c: MlpConfig) -> Mapping[str, str]:
    """Our names of weights -> those of a torch module's state dict."""
    return {f"layer_{n}": module for n, module in enumerate(c.modules)}


def build(c: MlpConfig, b: Builder, cache: str) -> tuple[State, ...]:
    """Appends section `encode`, which takes any number of rows at once."""
    b.section("encode")
    b.inputs.append(Input("x", "src", c.sizes[0], ids=False))
    y, last = "x", len(c.acts) - 1
    for n, (act, width, rows) in enumerate(zip(c.acts, c.sizes, c.sizes[1:], strict=False)):
        out = "logits" if n == last else f"h.{n}"
        pre = out if act == "none" else f"a.{n}"
        y = b.linear(pre, y, f"layer_{n}", rows, width, c.bias)
        if act != "none":
            y = b.add("act", out, y, kind=act)
    return ()
