"""Decoders put together at random: every opcode of section `step`, in orders nobody thought of."""

from __future__ import annotations

import numpy as np

from lmclock.listing import parse
from lmclock.program import Program
from lmclock.verify import verify


def random_program(rng: np.random.Generator, length: int = 12, vocab: int = 50) -> Program:
    """A verified decoder of `length` instructions drawn at random, at widths that are not round.

    Input `ids`, states `kv`, value `logits` (pick rows). Every opcode a decoder can use may occur.
    """
    heads, kv_heads, head = ((4, 2, 6), (3, 3, 8), (6, 1, 4))[rng.integers(3)]
    width = heads * head
    writer = _Writer(rng, width, heads, kv_heads, head)
    writer.body.append("embed x0, ids, table")
    for _ in range(length):
        getattr(writer, rng.choice(_Writer.STEPS))()
    last = writer.values[-1]
    text = [
        'program random "random"', "input ids tok ids", f"weight table {vocab}x{width} f32",
        *writer.weights,
        f"state kv[{max(1, writer.attends)}] paged heads={kv_heads} key={head} value={head}",
        f"state hc[{max(1, writer.lstms)}] fixed width={2 * width}",
        "section step", *writer.body,
        f"norm n, {last}", "pick p, n", "linear logits, p, table", "sample next, logits",
    ]  # fmt: skip
    return verify(parse("\n".join(text)))


class _Writer:
    """Lines of `random_program`: each method adds one step over values of one width."""

    STEPS = ("norm", "linear", "attend", "act", "binary", "softmax", "concat", "lstm", "experts",
             "glu")  # fmt: skip

    def __init__(
        self, rng: np.random.Generator, width: int, heads: int, kv_heads: int, head: int
    ) -> None:
        self.rng, self.width = rng, width
        self.heads, self.kv_heads, self.head = heads, kv_heads, head
        self.values, self.weights, self.body = ["x0"], [], []  # type: ignore[var-annotated]
        self.attends = self.lstms = 0

    def any(self) -> str:
        """One of the newest values."""
        return str(self.rng.choice(self.values[-3:]))

    def new(self) -> str:
        self.values.append(f"x{len(self.values)}")
        return str(self.values[-1])

    def weight(self, rows: int, width: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(f"weight {name} {rows}x{width} f32")
        return name

    def square(self) -> str:
        return self.weight(self.width, self.width)

    def norm(self) -> None:
        kind = self.rng.choice(["rms", "layer"])
        w, x = self.weight(1, self.width), self.any()
        bias = f" bias={self.weight(1, self.width)}" if kind == "layer" else ""
        self.body.append(f"norm {self.new()}, {x}, {w}   kind={kind}{bias}")

    def linear(self) -> None:
        x, w, bias = self.any(), self.square(), self.weight(1, self.width)
        self.body.append(f"linear {self.new()}, {x}, {w}   bias={bias} scale=0.5")

    def attend(self) -> None:
        n, x, small = self.attends, self.any(), self.kv_heads * self.head
        self.attends += 1
        pairs = self.rng.choice(["halves", "adjacent"])
        options = self.rng.choice(["", "window=3", "softcap=2.0", "qk_scale=0.3"])
        self.body += [
            f"linear q{n}, {x}, {self.square()}",
            f"linear k{n}, {x}, {self.weight(small, self.width)}",
            f"linear v{n}, {x}, {self.weight(small, self.width)}",
            f"rope qr{n}, q{n}   heads={self.heads} pairs={pairs}",
            f"rope kr{n}, k{n}   heads={self.kv_heads} dims={self.head // 4 * 2} pairs={pairs}",
            f"store kv[{n}], kr{n}, v{n}",
            f"attend {self.new()}, qr{n}, kv[{n}]   heads={self.heads} kv_heads={self.kv_heads} "
            + options,
        ]

    def act(self) -> None:
        kind = self.rng.choice(["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "tanh",
                                "sigmoid", "softcap cap=1.5"])  # fmt: skip
        x = self.any()
        self.body.append(f"act {self.new()}, {x}   kind={kind}")

    def binary(self) -> None:
        a, b, kind = self.any(), self.any(), self.rng.choice(["add", "sub", "mul"])
        self.body.append(f"binary {self.new()}, {a}, {b}   kind={kind}")

    def softmax(self) -> None:
        x, log = self.any(), self.rng.integers(2)
        self.body.append(f"softmax {self.new()}, {x}   groups={self.heads} log={log}")

    def concat(self) -> None:
        a, b, w = self.any(), self.any(), self.weight(self.width, 2 * self.width)
        name = self.new()
        self.body += [f"concat c.{name}, {a}, {b}", f"linear {name}, c.{name}, {w}"]

    def lstm(self) -> None:
        x, n = self.any(), self.lstms
        self.lstms += 1
        a, b = (self.weight(4 * self.width, self.width) for _ in range(2))
        self.body.append(f"lstm {self.new()}, {x}, hc[{n}], {a}, {b}")

    def experts(self) -> None:
        x, count, ffn = self.any(), 5, 7
        kind, renorm = self.rng.choice(["softmax", "sigmoid"]), self.rng.integers(2)
        w, gate, up = (self.weight(rows, self.width) for rows in (count, count * ffn, count * ffn))
        down, name = self.weight(count * self.width, ffn), self.new()
        self.body += [
            f"route p.{name}, e.{name}, {x}, {w}   "
            f"experts={count} top=2 kind={kind} renorm={renorm}",
            f"experts {name}, {x}, p.{name}, e.{name}, {gate}, {up}, {down}   experts={count}",
        ]

    def glu(self) -> None:
        x, name, ffn = self.any(), self.new(), 11
        gate, up = self.weight(ffn, self.width), self.weight(ffn, self.width)
        down, weight = self.weight(self.width, ffn), self.weight(1, self.width)
        self.body += [f"norm n.{name}, {x}, {weight}", f"linear g.{name}, n.{name}, {gate}",
                      f"linear u.{name}, n.{name}, {up}", f"act s.{name}, g.{name}",
                      f"binary m.{name}, s.{name}, u.{name}   kind=mul",
                      f"linear d.{name}, m.{name}, {down}",
                      f"binary {name}, {x}, d.{name}"]  # fmt: skip
