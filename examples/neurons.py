"""Loads a program written by hand, runs it on two machines, and steps through one of them.

python examples/neurons.py
"""

from pathlib import Path

import numpy as np

from lmclock.batch import Batch, Rows
from lmclock.listing import assembly, read
from lmclock.machines import Capacity, create
from lmclock.verify import verify

program = verify(read(str(Path(__file__).with_name("neurons.lmc"))))
x = np.array([[1, 0], [0.5, -2]], np.float32)  # two rows of one sequence
batch = Batch({"tok": Rows.of([(0, len(x))])}, {"x": x}, slots=np.zeros(1, np.int32))

for name in ("array", "native"):
    machine = create(name)
    machine.load(program, {}, Capacity(rows=8, slots=1), keep=("h", "a"))
    machine.bind(batch)
    print(f"\n{name}")
    for number, instruction in enumerate(program.section("step").instructions):
        machine.run("step", number, number + 1)  # one instruction: this is single-stepping
        value = machine.read(instruction.outs[0]).astype(float).round(4)
        print(f"  {assembly(instruction):<34} {value.tolist()}")
    machine.close()
