"""Tiny programs for tests, written out in core instructions."""

from __future__ import annotations

from lmclock.isa import Instruction, make
from lmclock.program import Input, Program, Section, State, Weight


def llama(
    layers: int = 3,
    width: int = 64,
    ffn: int = 96,
    vocab: int = 100,
    heads: int = 4,
    kv_heads: int = 2,
    formats: tuple[str, ...] = (),
    cache: str = "f16",
) -> Program:
    """A Llama-like decoder; `formats`: the number format of each layer's matrices (default f32)."""
    head = width // heads
    weights = [Weight("token_embd", (vocab, width), "q8_0")]
    body = [make("embed", "x.0", "ids", "token_embd")]
    for n in range(layers):
        form = formats[n] if formats else "f32"
        shapes = {
            "attn_norm": (1, width), "attn_q": (width, width), "attn_k": (kv_heads * head, width),
            "attn_v": (kv_heads * head, width), "attn_output": (width, width),
            "ffn_norm": (1, width), "ffn_gate": (ffn, width), "ffn_up": (ffn, width),
            "ffn_down": (width, ffn),
        }  # fmt: skip
        for name, shape in shapes.items():
            weights.append(Weight(f"blk.{n}.{name}", shape, "f32" if "norm" in name else form))
        body += _layer(n, heads, kv_heads)
    weights.append(Weight("output_norm", (1, width)))
    body += [
        make("norm", "n", f"x.{layers}", "output_norm"),
        make("pick", "last", "n"),
        make("linear", "logits", "last", "token_embd"),
        make("sample", "next", "logits"),
    ]
    state = State("kv", layers, "paged", kv_heads, head, head, format=cache)
    section = Section("step", tuple(body))
    return Program(
        "llama", "tiny", (Input("ids", "tok"),), tuple(weights), (state,), (section,), 128
    )


def _layer(n: int, heads: int, kv_heads: int) -> list[Instruction]:
    def w(name: str) -> str:
        return f"blk.{n}.{name}"

    return [
        make("norm", f"h.{n}", f"x.{n}", w("attn_norm")),
        make("linear", f"q.{n}", f"h.{n}", w("attn_q")),
        make("linear", f"k.{n}", f"h.{n}", w("attn_k")),
        make("linear", f"v.{n}", f"h.{n}", w("attn_v")),
        make("rope", f"qr.{n}", f"q.{n}", heads=heads),
        make("rope", f"kr.{n}", f"k.{n}", heads=kv_heads),
        make("store", (), (f"kr.{n}", f"v.{n}"), state=f"kv[{n}]"),
        make("attend", f"a.{n}", f"qr.{n}", state=f"kv[{n}]", heads=heads, kv_heads=kv_heads),
        make("linear", f"o.{n}", f"a.{n}", w("attn_output")),
        make("binary", f"y.{n}", (f"x.{n}", f"o.{n}")),
        make("norm", f"g.{n}", f"y.{n}", w("ffn_norm")),
        make("linear", f"gate.{n}", f"g.{n}", w("ffn_gate")),
        make("linear", f"up.{n}", f"g.{n}", w("ffn_up")),
        make("act", f"s.{n}", f"gate.{n}"),
        make("binary", f"m.{n}", (f"s.{n}", f"up.{n}"), kind="mul"),
        make("linear", f"d.{n}", f"m.{n}", w("ffn_down")),
        make("binary", f"x.{n + 1}", (f"y.{n}", f"d.{n}")),
    ]
