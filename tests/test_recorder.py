"""tests/recorder.py stands for the native machine: nothing the machine can do may bypass it."""

from __future__ import annotations

import io

import numpy as np
import pytest

from lmclock import _native
from lmclock.hardware.calibrate import idle_machine
from tests import recorder


def test_every_method_of_the_machine_is_recorded_or_refused() -> None:
    there = {name for name in dir(_native.Machine) if not name.startswith("_")}
    stands = {name for name in dir(recorder.RecordedMachine) if not name.startswith("_")}
    assert there <= stands | {"path", "threads"}, "record it, or skip tests that need it"


def test_a_run_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(recorder.RECORDING, "file", file)
    monkeypatch.setattr(_native, "Machine", recorder.RecordedMachine)
    machine = idle_machine(threads=1, path="scalar", count=2)
    machine.run("step")
    assert machine.read("x.2").tolist() == [[1.0] * 16]
    machine.close()
    numbers = np.frombuffer(file.getvalue()[: len(file.getvalue()) // 8 * 8], np.int64)
    assert numbers[0] == recorder.MAKE
    assert file.getvalue().endswith(np.ones(16, np.float32).tobytes()), "what was read, last"
    core = recorder.RecordedMachine(1, "scalar")
    with pytest.raises(pytest.skip.Exception, match="one call"):
        core.run_many(0, 1, (), None, None, None)
