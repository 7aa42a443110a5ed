"""A program as a Mermaid flowchart, identical layers folded: the listing's folds become boxes.

Solid arrows carry values, dotted ones go through a state or to the next layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lmclock.folding import fill, fold
from lmclock.isa import Instruction
from lmclock.listing import assembly
from lmclock.program import Program, Section


@dataclass
class _Chart:
    """Lines of the chart, and which node defines each value."""

    lines: list[str] = field(default_factory=list)
    source: dict[str, str] = field(default_factory=dict)
    edges: list[str] = field(default_factory=list)
    states: set[str] = field(default_factory=set)

    def add(self, node: str, i: Instruction, rename: dict[str, str], indent: str) -> None:
        """The node of one instruction, its incoming edges, and what it defines."""
        weights = "<br/>" + ", ".join(rename.get(w, w) for w in i.weights) if i.weights else ""
        kind = (
            f" {i['kind']}" if "kind" in i.row.attrs and i.op in ("act", "binary", "pool") else ""
        )
        self.lines.append(f'{indent}{node}["{i.op}{kind}{weights}"]')
        for name in i.reads():
            if name in self.source:
                self.edges.append(f"{self.source[name]} --> {node}")
        if i.state:
            state = i.state.partition("[")[0]
            if state not in self.states:
                self.states.add(state)
                self.edges.append(f'state_{state}[("{state}")]')
            a, b = (node, f"state_{state}") if i.op == "store" else (f"state_{state}", node)
            self.edges.append(f"{a} -.-> {b}")
        self.source.update(dict.fromkeys(i.outs, node))


def mermaid(program: Program) -> str:
    """The chart of every section as text that Mermaid draws."""
    chart = _Chart(["flowchart TD"])
    for value in program.inputs:
        chart.lines.append(f'  in_{value.name}(["{value.name}"])')
        chart.source[value.name] = f"in_{value.name}"
    for section in program.sections:
        chart.lines.append(f'  subgraph {section.name}["{section.name}"]')
        _section(chart, section)
        chart.lines.append("  end")
    unique = dict.fromkeys(chart.edges)
    return "\n".join([*chart.lines, *(f"  {edge}" for edge in unique), ""])


def _section(chart: _Chart, section: Section) -> None:
    """Walks the folded listing beside the instructions it stands for."""
    lines = fold([assembly(i) for i in section.instructions])
    at, k = 0, 0
    while k < len(lines):
        if not lines[k].startswith(".repeat"):
            chart.add(f"{section.name}_{at}", section.instructions[at], {}, "    ")
            at, k = at + 1, k + 1
            continue
        first, last = (int(n) for n in lines[k].split("=")[1].split(".."))
        end = lines.index(".end", k)
        body = lines[k + 1 : end]
        _layers(chart, section, at, body, first, last)
        at, k = at + len(body) * (last - first + 1), end + 1


def _layers(
    chart: _Chart, section: Section, at: int, body: list[str], first: int, last: int
) -> None:
    """One box for layers first..last: the nodes of the first, edges back for what each hands on."""
    count = last - first + 1
    box = f"{section.name}_layers_{at}"
    chart.lines.append(f'    subgraph {box}["layers {first} to {last} ({count} times)"]')
    size = len(body)
    for offset, i in enumerate(section.instructions[at : at + size]):
        names = dict(zip(i.weights, _weights(body[offset], first, i), strict=True))
        chart.add(f"{section.name}_{at + offset}", i, names, "      ")
    chart.lines.append("    end")
    made = {}  # what the first layer defines, hence what the second may take from it
    for offset in range(size):
        made.update(dict.fromkeys(section.instructions[at + offset].outs, offset))
    for offset in range(size):
        for name in section.instructions[at + size + offset].reads():
            if name in made:
                a, b = (f"{section.name}_{at + k}" for k in (made[name], offset))
                chart.edges.append(f"{a} -. next layer .-> {b}")
        for repeat in range(1, count):
            outs = section.instructions[at + repeat * size + offset].outs
            chart.source.update(dict.fromkeys(outs, f"{section.name}_{at + offset}"))


def _weights(template: str, number: int, i: Instruction) -> list[str]:
    """The weight names of a folded line, with their holes."""
    holes = {fill(word, number): word for word in template.replace(",", " ").split()}
    return [holes.get(name, name) for name in i.weights]
