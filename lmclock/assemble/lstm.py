"""LSTMs of torch.nn: the language model, which goes on token by token from the state it keeps, and
the classifier, which sees a whole text at once, in one direction or in both.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmclock.assemble.blocks import Builder
from lmclock.assemble.weights import Whole
from lmclock.config.recurrent import LstmConfig
from lmclock.program import State

# Ours -> nn.LSTM's, of one layer and direction.
PARTS = {
    "in{way}": "weight_ih", "state{way}": "weight_hh",
    "in{way}.bias": "bias_ih", "state{way}.bias": "bias_hh",
}  # fmt: skip
DIRECTIONS = ("", "_reverse")
# Tensors that are part of training only, and a second copy of a tied output matrix.
HARMLESS = r"^(criterion|loss|loss_fn)\."


def names(c: LstmConfig) -> Mapping[str, str]:
    """Our names of weights -> those of a torch module's state dict."""
    embedding, lstm, output = c.modules
    layers = {
        f"lstm.{{i}}.{ours.replace('{way}', way)}": Whole(f"{lstm}.{theirs}_l{{i}}{way}")
        for ours, theirs in PARTS.items()
        for way in DIRECTIONS
    }
    return {"token_embd": embedding, "output": output, **layers}


def build(c: LstmConfig, b: Builder, cache: str) -> tuple[State, ...]:
    """Section `step` of a language model, or `encode` of a classifier. The state stays f32: what is
    rounded in each cycle would depend on how a text is cut.
    """
    if c.pooling:
        return classifier(c, b)
    b.section("step")
    b.input("ids", "tok")
    x = b.embed("x.0", "token_embd", c.vocab, c.embedding)
    for i in range(c.layers):
        x = layer(c, b, f"x.{i + 1}", x, i, state=f"hc[{i}]")
    last = b.add("pick", "last", x)
    matrix, bias = "token_embd" if c.tied else "output", None
    if c.output_bias:
        bias = b.weight("output.bias", 1, c.vocab)
    w = b.weight(matrix, c.vocab, c.hidden)
    b.add("sample", "next", b.add("linear", "logits", last, w, bias=bias))
    return (State("hc", c.layers, "fixed", width=2 * c.hidden),)


def classifier(c: LstmConfig, b: Builder) -> tuple[State, ...]:
    """One row of logits for each text."""
    b.section("encode")
    b.input("src_ids", "src")
    x = b.embed("x.0", "token_embd", c.vocab, c.embedding, "src_ids")
    ways = DIRECTIONS if c.bidirectional else DIRECTIONS[:1]
    ends = [x]
    for i in range(c.layers):
        ends = [layer(c, b, f"h{way}.{i}", x, i, way) for way in ways]
        if i + 1 < c.layers or c.pooling != "last":
            x = b.add("concat", f"x.{i + 1}", ends) if c.bidirectional else ends[0]
    if c.pooling == "last":
        # The backward direction ends at the first token.
        ends = [b.add("pool", f"end{way}", end, kind="first" if way else "last")
                for way, end in zip(ways, ends, strict=True)]  # fmt: skip
        pooled = b.add("concat", "pooled", ends) if c.bidirectional else ends[0]
    else:
        pooled = b.add("pool", "pooled", x, kind=c.pooling.removesuffix("_row"))
    b.linear("logits", pooled, "output", len(c.labels), len(ways) * c.hidden, c.output_bias)
    return ()


def layer(
    c: LstmConfig, b: Builder, out: str, x: str, i: int, way: str = "", state: str | None = None
) -> str:
    """One layer in one direction."""
    width = c.embedding if i == 0 else c.hidden * (1 + c.bidirectional)
    gates = 4 * c.hidden
    from_input, from_state = f"lstm.{i}.in{way}", f"lstm.{i}.state{way}"
    weights = (b.weight(from_input, gates, width), b.weight(from_state, gates, c.hidden))
    biases = {}
    if c.bias:
        biases = {"bias": b.weight(f"{from_input}.bias", 1, gates),
                  "bias_k": b.weight(f"{from_state}.bias", 1, gates)}  # fmt: skip
    return b.add("lstm", out, x, weights, state=state, reverse=int(bool(way)), **biases)
