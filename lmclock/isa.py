"""The instruction set: one table, `OPCODES`, and the `Instruction` its rows describe.

A row gives an opcode's operands, attributes, shape rule, cost rule and meaning. Everything else is
made from it: the
listing, the verifier, docs/isa.md, the C++ header native/isa.h, the clock and the simulator. What
an opcode computes is
written once, in machines/array.py; what it costs is written once, in cost.py, and joined to its
row here.

A fused opcode has no meaning of its own: `expand` rewrites it into core instructions, and that is
what it computes and costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lmclock.shapes as shapes
from lmclock.errors import ProgramError, choices
from lmclock.shapes import Type

SPACES = ("tok", "src", "pick", "seq")
SPACE_MEANING = {
    "tok": "token rows of this cycle",
    "src": "encoder rows",
    "pick": "rows that need logits",
    "seq": "one row per sequence",
}


@dataclass(frozen=True)
class Attr:
    """One attribute: `kind` is int, float, enum, value, weight; operands by name (`add=x`) are
    attributes too.
    """

    name: str
    kind: str
    default: Any = None
    members: tuple[str, ...] = ()
    meaning: str = ""


ROUNDED_ROWS = 16  # rows of a sequence in a cycle from which attend act=bf16 may round

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh", "sigmoid", "softcap")
ATTRS: dict[str, Attr] = {
    row.name: row
    for row in (
        Attr("kind", "enum", None, (), "the variant; members depend on the opcode"),
        Attr(
            "act",
            "enum",
            "none",
            ("none", "q8_32", "bf16"),
            "rounding of the input row before the product; attend: bf16 lets a machine round to 16 "
            "bits where a sequence has many rows",
        ),
        Attr("bias", "weight", None, (), "added to every output row"),
        Attr("bias_k", "weight", None, (), "bias of the second product"),
        Attr("bias_v", "weight", None, (), "bias of the third product"),
        Attr("add", "value", None, (), "residual added to the result (fused)"),
        Attr("norm", "weight", None, (), "norm applied to the input first (fused)"),
        Attr("norm_kind", "enum", "rms", ("rms", "layer"), "kind of the fused norm"),
        Attr("norm_bias", "weight", None, (), "bias of the fused norm"),
        Attr("eps", "float", 1e-5, (), "added to the mean square or variance"),
        Attr("groups", "int", 1, (), "the row is split into this many parts, each treated alone"),
        Attr("heads", "int", 1, (), "query heads"),
        Attr("kv_heads", "int", 0, (), "key/value heads; 0: as many as query heads"),
        Attr("dims", "int", 0, (), "rotated dimensions of each head; 0: all of them"),
        Attr("pairs", "enum", "halves", ("halves", "adjacent"), "which dimensions rotate together"),
        Attr("base", "float", 10000.0, (), "frequency base of the rotation"),
        Attr("freqs", "weight", None, (), "explicit inverse frequencies instead of base"),
        Attr("scale", "float", 1.0, (), "factor on the result"),
        Attr("qk_scale", "float", 0.0, (), "factor on q.k; 0: 1 / sqrt(head width)"),
        Attr("mask", "enum", "causal", ("causal", "full"), "which positions a row sees"),
        Attr("window", "int", 0, (), "a row sees only this many newest positions; 0: all"),
        Attr("softcap", "float", 0.0, (), "c*tanh(s/c) on attention scores; 0: off"),
        Attr("rel_bias", "weight", None, (), "relative position bias, (buckets, heads)"),
        Attr(
            "max_distance", "int", 128, (), "distance from which relative positions share a bucket"
        ),
        Attr("cap", "float", 0.0, (), "bound of kind=softcap"),
        Attr("log", "int", 0, (), "1: logarithm of the result"),
        Attr("offset", "int", 0, (), "added to each id before the look-up"),
        Attr("reverse", "int", 0, (), "1: from the last row of a sequence to its first"),
        Attr("experts", "int", 0, (), "experts to choose from"),
        Attr("top", "int", 0, (), "experts chosen per row"),
        Attr("renorm", "int", 1, (), "1: chosen probabilities sum to one"),
        Attr("ignore", "int", -100, (), "target id that takes no part in the loss"),
        Attr("p", "float", 0.0, (), "probability of dropping an element"),
    )
}


@dataclass(frozen=True)
class Instruction:
    """One instruction. Build it with `make`, which drops default attributes, so that equality is
    equality of meaning.
    """

    op: str
    outs: tuple[str, ...]
    ins: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    state: str | None = None
    attrs: tuple[tuple[str, Any], ...] = ()

    @property
    def row(self) -> Opcode:
        return OPCODES[self.op]

    def __getitem__(self, name: str) -> Any:
        """The attribute `name`, or its default."""
        for key, value in self.attrs:
            if key == name:
                return value
        return self.row.default(name)

    def reads(self) -> tuple[str, ...]:
        """Every value the instruction reads, named operands included."""
        return self.ins + tuple(v for k, v in self.attrs if ATTRS[k].kind == "value")

    def all_weights(self) -> tuple[str, ...]:
        """Every weight the instruction reads, named operands included."""
        return self.weights + tuple(v for k, v in self.attrs if ATTRS[k].kind == "weight")


@dataclass(frozen=True)
class Opcode:
    """One row of the table. Operand names document the order; `[x]` marks one that may be
    missing.
    """

    name: str
    code: int
    outs: tuple[str, ...]
    ins: tuple[str, ...]
    weights: tuple[str, ...]
    state: str  # "", "required" or "optional"
    attrs: tuple[str, ...]
    kinds: tuple[str, ...]  # members of `kind`, the first is the default
    shape: Callable[..., tuple[Type, ...]]
    meaning: str
    rows: str = "the rows of its first input"
    expand: Callable[[Instruction], tuple[Instruction, ...]] | None = field(
        default=None, repr=False
    )

    def default(self, name: str) -> Any:
        if name not in self.attrs:
            raise ProgramError(
                f"{self.name} has no attribute {name!r}; valid: {choices(self.attrs) or 'none'}"
            )
        return self.kinds[0] if name == "kind" else ATTRS[name].default

    def members(self, name: str) -> tuple[str, ...]:
        return self.kinds if name == "kind" else ATTRS[name].members

    def count(self, operands: tuple[str, ...]) -> tuple[int, int]:
        """Least and most operands of one group."""
        return sum(not name.startswith("[") for name in operands), len(operands)


def make(
    op: str,
    outs: tuple[str, ...] | str,
    ins: tuple[str, ...] | str = (),
    weights: tuple[str, ...] | str = (),
    state: str | None = None,
    **attrs: Any,
) -> Instruction:
    """An instruction with its attributes checked, in table order, defaults and None left out."""
    if op not in OPCODES:
        raise ProgramError(f"unknown opcode {op!r}; valid: {choices(OPCODES)}")
    row = OPCODES[op]
    for name in attrs:
        row.default(name)
    kept = []
    for name in row.attrs:
        value = attrs.get(name)
        if value is None or value == row.default(name):
            continue
        members = row.members(name)
        if ATTRS[name].kind == "enum" and value not in members:
            raise ProgramError(f"{op} {name}={value!r} is unknown; valid: {choices(members)}")
        kept.append((name, value))
    parts = ((part,) if isinstance(part, str) else tuple(part) for part in (outs, ins, weights))
    o, n, w = parts
    return Instruction(op, o, n, w, state, tuple(kept))


# --- expansions of fused instructions into core ones
# -------------------------------------------------

_FUSED = ("add", "norm", "norm_kind", "norm_bias", "eps")


def _prenorm(i: Instruction) -> tuple[list[Instruction], str]:
    if i["norm"] is None:
        return [], i.ins[0]
    t = f"{i.outs[0]}~norm"
    norm = make("norm", t, i.ins, i["norm"], kind=i["norm_kind"], eps=i["eps"], bias=i["norm_bias"])
    return [norm], t


def _expand_linear(i: Instruction) -> tuple[Instruction, ...]:
    if i["norm"] is None and i["add"] is None:
        return (i,)
    steps, x = _prenorm(i)
    kept = {k: v for k, v in i.attrs if k not in _FUSED}
    y = i.outs[0] if i["add"] is None else f"{i.outs[0]}~sum"
    steps.append(make("linear", y, x, i.weights, **kept))
    if i["add"] is not None:
        steps.append(make("binary", i.outs, (y, i["add"]), kind="add"))
    return tuple(steps)


def _expand_qkv(i: Instruction) -> tuple[Instruction, ...]:
    steps, x = _prenorm(i)
    biases = (i["bias"], i["bias_k"], i["bias_v"])
    for out, weight, bias in zip(i.outs, i.weights, biases, strict=True):
        steps.append(make("linear", out, x, weight, act=i["act"], bias=bias))
    return tuple(steps)


def _expand_glu(i: Instruction) -> tuple[Instruction, ...]:
    steps, x = _prenorm(i)
    g, u, a = (f"{i.outs[0]}~{name}" for name in ("gate", "up", "act"))
    steps.append(make("linear", g, x, i.weights[0], act=i["act"], bias=i["bias"]))
    steps.append(make("linear", u, x, i.weights[1], act=i["act"], bias=i["bias_k"]))
    steps.append(make("act", a, g, kind=i["kind"]))
    steps.append(make("binary", i.outs, (a, u), kind="mul"))
    return tuple(steps)


def expand(i: Instruction) -> tuple[Instruction, ...]:
    """The core instructions `i` stands for; `(i,)` when it is one itself."""
    return i.row.expand(i) if i.row.expand else (i,)


_N = ("norm", "norm_kind", "norm_bias", "eps")
_GATES = ("silu", "gelu", "gelu_tanh", "relu")
_MASKS = ("mask", "window", "qk_scale", "softcap", "rel_bias", "max_distance")
_ATTEND = ("act", "heads", "kv_heads", *_MASKS)
_ROPE = ("heads", "dims", "pairs", "base", "freqs", "scale")
_T: tuple[tuple[Any, ...], ...] = (
    # name, outs, ins, weights, state, attrs, kinds, shape rule, meaning
    ("embed", "y", "ids", "table", "", ("scale", "offset"), (), shapes.embed,
     "y = scale * table[ids + offset]"),
    ("norm", "y", "x", "[w]", "", ("kind", "eps", "bias", "groups"), ("rms", "layer"), shapes.norm,
     "rms: x / sqrt(mean(x^2) + eps) * w; layer: (x - mean) / sqrt(var + eps) * w + bias"),
    ("linear", "y", "x", "w", "", ("act", "bias", "scale", "add", *_N), (), shapes.products,
     "y = scale * (x w^T) + bias, x rounded as act= says; norm= and add= are fused"),
    ("rope", "y", "x", "", "", _ROPE, (), shapes.rope,
     "rotates pairs of each head by position * base^(-2j/dims), times scale"),
    ("store", "", "k v", "", "required", (), (), shapes.store,
     "writes key and value rows into the state at their positions"),
    ("attend", "y", "q [k] [v]", "", "optional", _ATTEND, (), shapes.attend,
     "y = softmax(qk_scale * q k^T + bias) v per head over the positions the row may see"),
    ("act", "y", "x", "", "", ("kind", "cap"), ACTIVATIONS, shapes.same,
     "the activation function, element by element"),
    ("binary", "y", "a b", "", "", ("kind",), ("add", "sub", "mul"), shapes.same,
     "y = a + b, a - b or a * b"),
    ("pick", "y", "x", "", "", (), (), shapes.pick, "keeps the rows that need logits"),
    ("pool", "y", "x", "", "", ("kind",), ("mean", "first", "last", "max"), shapes.pool,
     "one row per sequence"),
    ("softmax", "y", "x", "", "", ("log", "groups"), (), shapes.same,
     "softmax along the row, or its logarithm"),
    ("concat", "y", "a b", "", "", (), (), shapes.concat, "the two rows side by side"),
    ("lstm", "y", "x", "w_in w_state", "optional", ("act", "bias", "bias_k", "reverse"), (),
     shapes.lstm, "gates i f g o = x w_in^T + h w_state^T + bias + bias_k, x and h rounded as act= "
     "says; c = f c + i tanh(g); y = h = o tanh(c)"),
    ("route", "p e", "x", "w", "", ("experts", "top", "renorm", "kind"), ("softmax", "sigmoid"),
     shapes.route, "the top experts of each row and their probabilities"),
    ("experts", "y", "x p e", "gate up down", "", ("experts", "kind", "act"), _GATES,
     shapes.experts, "y = sum over the row's experts of p * down(act(gate x) * up x)"),
    ("sample", "next", "logits", "", "", (), (), shapes.sample,
     "one token id per row, by the row's sampling settings"),
    ("loss", "l", "y target", "", "", ("kind", "ignore"), ("cross_entropy", "mse"), shapes.loss,
     "mean loss per sequence"),
    ("dropout", "y", "x", "", "", ("p",), (), shapes.same,
     "zeroes elements with probability p and scales the rest by 1/(1-p)"),
    ("qkv", "q k v", "x", "wq wk wv", "", ("act", "bias", "bias_k", "bias_v", *_N), (),
     shapes.products, "three linears of one input (fused)"),
    ("glu", "y", "x", "gate up", "", ("kind", "act", "bias", "bias_k", *_N), _GATES, shapes.glu,
     "act(x gate^T) * (x up^T) (fused)"),
)  # fmt: skip
_ROWS = {
    "embed": "the rows of its ids",
    "pick": "pick rows",
    "pool": "one row per sequence",
    "loss": "one row per sequence",
}
_EXPAND = {"linear": _expand_linear, "qkv": _expand_qkv, "glu": _expand_glu}


def _opcode(code: int, line: tuple[Any, ...]) -> Opcode:
    name, outs, ins, weights, *rest = line
    rows = _ROWS.get(name, "the rows of its first input")
    operands = (outs.split(), ins.split(), weights.split())
    a, b, c = (tuple(part) for part in operands)
    state, attrs, kinds, shape, meaning = rest
    expansion = _EXPAND.get(name)
    return Opcode(name, code, a, b, c, state, attrs, kinds, shape, meaning, rows, expansion)


OPCODES: dict[str, Opcode] = {line[0]: _opcode(code, line) for code, line in enumerate(_T)}
