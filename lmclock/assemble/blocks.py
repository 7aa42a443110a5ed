"""What model families share: `Builder`, which grows a program, and the blocks most of them are made
of. A family file says in which order, and with which sizes and options.

    b = Builder(stored)
    b.section("step")
    b.input("ids", "tok")
    x = b.embed("x.0", "token_embd", vocab, width)
    x = b.residual("x'.0", x, attention(b, x, self_attention, Place(0)))

Weights have GGUF's names without their endings. Values: x the residual stream, h normalised, q k v,
a attended, o projected, g and u gate and up, d down; a quote marks the second of a kind in a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmclock.assemble.edited import shift
from lmclock.assemble.rope import frequencies
from lmclock.assemble.weights import Stored, View, computed
from lmclock.config import Rope
from lmclock.errors import FileError
from lmclock.fields import shortest
from lmclock.formats import Array
from lmclock.isa import Instruction, make
from lmclock.program import Input, Weight

LEAST_FACTOR = 1e-6  # of a frequency: published ones are 1 to 64


@dataclass(frozen=True)
class Place:
    """Where a block stands: its layer, and what precedes the names of its weights and values."""

    layer: int
    weights: str = "blk"
    values: str = ""

    def weight(self, name: str) -> str:
        return f"{self.weights}.{self.layer}.{name}"

    def value(self, name: str, later: int = 0) -> str:
        return f"{self.values}{name}.{self.layer + later}"


@dataclass(frozen=True)
class Norm:
    """Which normalisation a model uses throughout."""

    eps: float
    kind: str = "rms"
    offset: float = 0.0  # added to the weights that are stored
    biased: bool = True  # a layer norm may have no bias

    @property
    def bias(self) -> bool:
        return self.kind == "layer" and self.biased


@dataclass(frozen=True)
class Rotation:
    """The attributes of `rope` that queries and keys share."""

    dims: int
    base: float
    pairs: str
    freqs: str | None
    scale: float


@dataclass(frozen=True)
class Attention:
    """One attention block. Without `state` it attends to its own rows' keys and values only."""

    width: int
    heads: int
    kv_heads: int
    key: int
    value: int
    state: str | None = None
    norm: Norm | None = None  # of each head of q and k
    norm_whole: bool = False  # of q and k as a whole instead
    rotation: Rotation | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mask: str = "causal"
    window: int = 0
    qk_scale: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0  # of the output
    rel_bias: str | None = None  # the weight of relative positions, (buckets, heads)
    max_distance: int | None = None


class Builder:
    """Grows a program's sections, and declares each weight when it is first used."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.inputs: list[Input] = []
        self.sections: dict[str, list[Instruction]] = {}
        self.instructions: list[Instruction] = []  # of the section that grows
        self.declared: dict[str, Weight] = {}
        self.views: dict[str, View] = {}

    def section(self, name: str) -> None:
        """What is added from here on belongs to section `name`."""
        self.instructions = self.sections.setdefault(name, [])

    def input(self, name: str, space: str) -> str:
        """Declare an input of ids, one for each row of `space`."""
        self.inputs.append(Input(name, space))
        return name

    def add(self, op: str, out: Any, ins: Any = (), weights: Any = (), **attrs: Any) -> Any:
        """Append an instruction with one result, several, or none where `out` is empty; returns
        `out`.
        """
        self.instructions.append(make(op, out or (), ins, weights, **attrs))
        return out

    def weight(self, name: str, rows: int, width: int) -> str:
        if name not in self.declared:
            view = self.stored.get(name, (rows, width))
            self.declared[name] = Weight(name, (rows, width), view.format.name)
            self.views[name] = view
        return name

    def constant(self, name: str, row: Array) -> str:
        """A weight of one row that is part of the program, not of the file."""
        values = tuple(shortest(float(v)) for v in row)
        self.declared[name] = Weight(name, (1, len(row)), values=values)
        return name

    def table(self, name: str, values: Array) -> str:
        """A matrix (rows, width) that follows from the configuration and stands in no file."""
        if name not in self.declared:
            self.views[name] = computed(name, values)
            self.declared[name] = Weight(name, values.shape, self.views[name].format.name)
        return name

    def embed(
        self, out: str, name: str, vocab: int, width: int, ids: str = "ids", scale: float = 1.0
    ) -> str:
        return self.add("embed", out, ids, self.weight(name, vocab, width), scale=scale)

    def linear(
        self, out: str, x: str, name: str, rows: int, width: int, bias: bool = False,
        scale: float = 1.0,
    ) -> str:  # fmt: skip
        """out = scale x w^T (+ bias): from `width` to `rows` elements."""
        w = self.weight(name, rows, width)
        extra = self.weight(f"{name}.bias", 1, rows) if bias else None
        return self.add("linear", out, x, w, bias=extra, scale=scale)

    def norm(self, out: str, x: str, name: str, width: int, kind: Norm, groups: int = 1) -> str:
        """Each of `groups` parts of the row, `width` elements wide, is normalised on its own."""
        shift(self.stored, name, width, kind.offset)
        w = self.weight(name, 1, width)
        bias = self.weight(f"{name}.bias", 1, width) if kind.bias else None
        return self.add("norm", out, x, w, kind=kind.kind, eps=kind.eps, bias=bias, groups=groups)

    def residual(self, out: str, x: str, y: str) -> str:
        return self.add("binary", out, (x, y), kind="add")

    def rotation(
        self, rope: Rope, head: int, factors: str = "rope_freqs", name: str = "rope_freqs"
    ) -> Rotation:
        """Declares the frequencies, as `name`, where `base` alone does not say them; `factors`
        names the tensor that divides them, if the file has it.
        """
        divide = None
        if self.stored.has(factors):
            divide = self.stored.get(factors, (1, rope.dims // 2)).unpack()
            if not (divide > LEAST_FACTOR).all():
                raise FileError(f"tensor {factors} holds a factor that is not above {LEAST_FACTOR}")
        row = frequencies(rope, divide)
        freqs = None if row is None else self.constant(name, row)
        dims = 0 if rope.dims == head else rope.dims
        return Rotation(dims, rope.base, rope.pairs, freqs, rope.gain)

    def rotate(self, out: str, x: str, heads: int, r: Rotation) -> str:
        base = None if r.freqs else r.base
        return self.add("rope", out, x, heads=heads, dims=r.dims, pairs=r.pairs, base=base,
                        freqs=r.freqs, scale=r.scale)  # fmt: skip


def attention(b: Builder, h: str, a: Attention, at: Place) -> str:
    """q, k and v of h, rotated and cached where the block says so, attended and projected back."""
    q, k, v = (
        b.linear(at.value(n), h, at.weight(f"attn_{n}"), rows, a.width, a.qkv_bias)
        for n, rows in (("q", a.heads * a.key), ("k", a.kv_heads * a.key),
                        ("v", a.kv_heads * a.value))
    )  # fmt: skip
    if a.norm:
        for_q, for_k = (1, 1) if a.norm_whole else (a.heads, a.kv_heads)
        q = b.norm(at.value("qn"), q, at.weight("attn_q_norm"), a.heads * a.key // for_q, a.norm,
                   for_q)  # fmt: skip
        k = b.norm(at.value("kn"), k, at.weight("attn_k_norm"), a.kv_heads * a.key // for_k,
                   a.norm, for_k)  # fmt: skip
    if a.rotation:
        q = b.rotate(at.value("q'"), q, a.heads, a.rotation)
        k = b.rotate(at.value("k'"), k, a.kv_heads, a.rotation)
    if a.state:
        b.add("store", "", (k, v), state=a.state)
    y = b.add(
        "attend", at.value("a"), q if a.state else (q, k, v), state=a.state, heads=a.heads,
        kv_heads=a.kv_heads if a.kv_heads != a.heads else 0, mask=a.mask, window=a.window,
        qk_scale=a.qk_scale, softcap=a.softcap, rel_bias=a.rel_bias, max_distance=a.max_distance,
    )  # fmt: skip
    return b.linear(
        at.value("o"), y, at.weight("attn_output"), a.width, a.heads * a.value, a.output_bias,
        a.scale,
    )  # fmt: skip


def cross_keys(b: Builder, x: str, a: Attention, at: Place) -> None:
    """Stores the keys and values that one decoder layer reads of the encoder's rows x."""
    k, v = (
        b.linear(at.value(f"c{n}"), x, at.weight(f"cross_attn_{n}"), rows, a.width, a.qkv_bias)
        for n, rows in (("k", a.kv_heads * a.key), ("v", a.kv_heads * a.value))
    )
    b.add("store", "", (k, v), state=a.state)


def cross_attention(b: Builder, h: str, a: Attention, at: Place) -> str:
    """Queries of h, attended to what `cross_keys` stored, and projected back."""
    q = b.linear(at.value("cq"), h, at.weight("cross_attn_q"), a.heads * a.key, a.width, a.qkv_bias)
    y = b.add(
        "attend", at.value("ca"), q, state=a.state, heads=a.heads, mask="full",
        kv_heads=a.kv_heads if a.kv_heads != a.heads else 0, qk_scale=a.qk_scale,
    )  # fmt: skip
    name = at.weight("cross_attn_output")
    return b.linear(at.value("co"), y, name, a.width, a.heads * a.value, a.output_bias)


def feed_forward(
    b: Builder, h: str, width: int, hidden: int, act: str, at: Place, bias: bool = False,
    scale: float = 1.0,
) -> str:  # fmt: skip
    """scale * down(act(up h))."""
    u = b.linear(at.value("u"), h, at.weight("ffn_up"), hidden, width, bias)
    f = b.add("act", at.value("f"), u, kind=act)
    return b.linear(at.value("d"), f, at.weight("ffn_down"), width, hidden, bias, scale)


def gated_feed_forward(
    b: Builder, h: str, width: int, hidden: int, act: str, at: Place, bias: bool = False,
    scale: float = 1.0,
) -> str:  # fmt: skip
    """scale * down(act(gate h) * (up h))."""
    g = b.linear(at.value("g"), h, at.weight("ffn_gate"), hidden, width, bias)
    u = b.linear(at.value("u"), h, at.weight("ffn_up"), hidden, width, bias)
    s = b.add("act", at.value("s"), g, kind=act)
    f = b.add("binary", at.value("f"), (s, u), kind="mul")
    return b.linear(at.value("d"), f, at.weight("ffn_down"), width, hidden, bias, scale)


def logits(
    b: Builder, x: str, width: int, vocab: int, norm: Norm | None, output: str = "output", *,
    scale: float = 1.0, softcap: float = 0.0, norm_name: str = "output_norm",
    bias: str | None = None,
) -> None:  # fmt: skip
    """Of the picked rows only: the last norm, the output matrix, and a token for each. `bias` is
    a weight of its own, because the matrix may be an embedding that others read too.
    """
    z = b.add("pick", "last", x)
    if norm:
        z = b.norm("z", z, norm_name, width, norm)
    w, extra = b.weight(output, vocab, width), b.weight(bias, 1, vocab) if bias else None
    y = b.add("linear", "scores" if softcap else "logits", z, w, bias=extra, scale=scale)
    if softcap:
        y = b.add("act", "logits", y, kind="softcap", cap=softcap)
    b.add("sample", "next", y)
