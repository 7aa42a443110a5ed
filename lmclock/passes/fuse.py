"""`fuse`: fewer instructions for the same arithmetic. A column of rewrites over one section.

    qkv       three linears that follow one another and read one value   -> qkv
    glu       act(linear gate) * (linear up)                             -> glu
    norm      a norm read only by linear, qkv or glu                     -> their norm=
    residual  a linear read only by an add                               -> its add=

A rewrite applies only where the inner values have no other reader, so nothing is computed twice.
Each fused instruction
expands (isa.expand) into what it replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from lmclock.isa import OPCODES, Instruction, make
from lmclock.program import Program, Section

Body = list[Instruction]
PRODUCTS = ("linear", "qkv", "glu")


def fuse(program: Program) -> Program:
    """A copy with every rewrite applied to each section but `train`, whose steps stay visible."""
    sections = []
    for section in program.sections:
        body = list(section.instructions)
        if section.name != "train":
            for rewrite in REWRITES:
                body = rewrite(body)
        sections.append(Section(section.name, tuple(body)))
    return replace(program, sections=tuple(sections), registers=())


def _readers(body: Body) -> Counter[str]:
    return Counter(name for i in body for name in i.reads())


def _plain(i: Instruction) -> bool:
    """A linear with nothing but rounding and bias, so that it may become part of a larger one."""
    return i.op == "linear" and all(name in ("act", "bias") for name, _ in i.attrs)


def _qkv(body: Body) -> Body:
    out: Body = []
    for i in body:
        group = [*out[-2:], i]
        if (
            len(group) == 3
            and all(_plain(g) and g.ins == i.ins and g["act"] == i["act"] for g in group)
            and not {o for g in group for o in g.outs} & {n for g in group for n in g.reads()}
        ):
            del out[-2:]
            q, k, v = group
            i = make(
                "qkv", (*q.outs, *k.outs, *v.outs), i.ins, (*q.weights, *k.weights, *v.weights),
                act=i["act"], bias=q["bias"], bias_k=k["bias"], bias_v=v["bias"],
            )  # fmt: skip
        out.append(i)
    return out


def _glu(body: Body) -> Body:
    readers = _readers(body)
    made = {o: i for i in body for o in i.outs}
    gone: set[str] = set()
    fused: dict[str, Instruction] = {}
    for i in body:
        if i.op != "binary" or i["kind"] != "mul":
            continue
        for a, b in (i.ins, i.ins[::-1]):
            act, up = made.get(a), made.get(b)
            if not act or not up or act.op != "act" or not _plain(up) or up.outs[0] != b:
                continue
            gate = made.get(act.ins[0])
            if not gate or not _plain(gate) or gate.ins != up.ins or gate["act"] != up["act"]:
                continue
            inner = (*gate.outs, *act.outs, *up.outs)
            if act["kind"] not in OPCODES["glu"].kinds or any(readers[name] != 1 for name in inner):
                continue
            gone.update(inner)
            fused[i.outs[0]] = make(
                "glu", i.outs, gate.ins, (*gate.weights, *up.weights), kind=act["kind"],
                act=gate["act"], bias=gate["bias"], bias_k=up["bias"],
            )  # fmt: skip
            break
    return [fused.get(i.outs[0], i) if i.outs else i for i in body if not set(i.outs) & gone]


def _norm(body: Body) -> Body:
    """Every reader of the norm must take it in; each then computes it for itself."""
    users: dict[str, Body] = {}
    for i in body:
        for name in i.reads():
            users.setdefault(name, []).append(i)
    norms = {}
    for i in body:
        if i.op != "norm" or not i.weights or i["groups"] != 1:
            continue
        readers = users.get(i.outs[0], [])
        # One reader only: a norm shared by several products would be computed by each.
        if len(readers) == 1 and readers[0].op in PRODUCTS and readers[0].ins == i.outs:
            norms[i.outs[0]] = i

    def taken(i: Instruction) -> Instruction:
        n = norms.get(i.ins[0]) if i.op in PRODUCTS and i["norm"] is None else None
        if n is None:
            return i
        attrs = {**dict(i.attrs), "norm": n.weights[0], "norm_kind": n["kind"],
                 "norm_bias": n["bias"], "eps": n["eps"]}  # fmt: skip
        return make(i.op, i.outs, n.ins, i.weights, i.state, **attrs)

    return [taken(i) for i in body if not (i.op == "norm" and i.outs[0] in norms)]


def _residual(body: Body) -> Body:
    readers = _readers(body)
    made = {o: (k, i) for k, i in enumerate(body) for o in i.outs}
    defined = {o: k for k, i in enumerate(body) for o in i.outs}
    out = list(body)
    for k, i in enumerate(body):
        if i.op != "binary" or i["kind"] != "add":
            continue
        for inner, other in (i.ins[::-1], i.ins):
            at, linear = made.get(inner, (0, i))
            fits = linear.op == "linear" and linear["add"] is None and readers[inner] == 1
            # The sum must be ready where the linear stands, and the linear must not
            # be its own residual.
            if fits and defined.get(other, -1) < at and inner != other:
                out[at] = make("linear", i.outs, linear.ins, linear.weights,
                               **{**dict(linear.attrs), "add": other})  # fmt: skip
                out[k] = None  # type: ignore[call-overload]
                break
    return [i for i in out if i is not None]


REWRITES: tuple[Callable[[Body], Body], ...] = (_qkv, _glu, _norm, _residual)
