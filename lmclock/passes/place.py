"""`place`: values share registers when their lives do not overlap. Adds a map, changes no
instruction.

A register belongs to one row space and kind (ids or f32) and is as wide as its widest value. A
value lives from its
definition to its last use; one read and one written by the same instruction never share, so that a
machine may stream its
operands. What `route` chose stays readable to the end: the clock counts the experts really used.
"""

from __future__ import annotations

from dataclasses import replace

from lmclock.program import Program


def place(program: Program, keep: tuple[str, ...] = ()) -> Program:
    """A copy with `registers`: (value, register) of every value each section defines. `keep` never
    share.
    """
    registers: list[tuple[str, int]] = []
    count = 0
    keep += tuple(i.outs[1] for s in program.sections for i in s.instructions if i.op == "route")
    for section in program.sections:
        types = program.types(section.name)
        last = {name: k for k, i in enumerate(section.instructions) for name in i.reads()}
        free: dict[tuple[str, bool], list[int]] = {}
        held: dict[str, int] = {}
        for k, i in enumerate(section.instructions):
            for name in i.outs:
                pool = free.setdefault((types[name].space, types[name].ids), [])
                if pool and name not in keep:
                    held[name] = pool.pop()
                else:
                    held[name], count = count, count + 1
                registers.append((name, held[name]))
            # A result nobody reads is what the caller wants: it stays until the section ends.
            for name in {n for n in i.reads() if last[n] == k and n in held and n not in keep}:
                free[(types[name].space, types[name].ids)].append(held[name])
    return replace(program, registers=tuple(registers))
