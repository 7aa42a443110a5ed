"""Calibration: real measurements kept small, and what is cached of them. No figure must be met."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
from measured import limits as made_up

from lmclock import _native
from lmclock.errors import OptionError
from lmclock.hardware import calibrate
from lmclock.hardware.limits import Limits, Measured

SIZES = (1 << 14, 1 << 16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "FOOTPRINTS", SIZES)
    monkeypatch.setattr(calibrate, "PIECE_NS", 20_000)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_figure_is_measured(small: None, threads: int) -> None:
    rounds: list[str] = []
    found = calibrate.calibrate(threads, "scalar", 3, rounds.append)
    assert rounds == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert (found.threads, found.path) == (threads, "scalar") and found.processor
    assert [size for size, _ in found.bandwidth] == list(SIZES)
    assert {"int8", "f32"} <= found.peaks.keys() <= set(calibrate.KINDS)
    rates = [rate for _, rate in found.bandwidth] + list(found.peaks.values())
    for m in rates:
        assert m.best >= m.median > 0 and m.spread >= 0
    assert 0 < found.step.best <= found.step.median < 1, "a latency: the best is the least"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Limits) == found
    assert not [t for t in threading.enumerate() if "_loop" in t.name]


def test_a_summary_by_hand() -> None:
    assert calibrate._summary([8, 10, 12, 9, 11]) == Measured(12, 10, 0.4)


def test_limits_are_measured_once(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(threads: int | None, path: str | None, progress: object = None) -> Limits:
        asked.append((threads, path))
        return made_up()

    monkeypatch.setattr(calibrate, "calibrate", measure)
    for _ in range(2):
        assert calibrate.limits(2, "scalar") == made_up()
    assert asked == [(2, "scalar")]
    file = calibrate.cache_file(2, "scalar")
    assert [p.name for p in cache_folder.rglob("*.json*")] == [file.name], "and nothing half-done"
    for damaged in (b"", b"{}", b"{\x00", file.read_bytes()[:-20], b'{"threads": "2"}'):
        file.write_bytes(damaged)
        assert calibrate.limits(2, "scalar") == made_up()
        assert calibrate.limits(2, "scalar") == made_up()
    assert len(asked) == 6, "what is damaged is measured anew, and kept"
    calibrate.limits(1, "scalar")
    assert asked[-1] == (1, "scalar")


def test_a_cache_that_cannot_be_used_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMCLOCK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "calibrate", lambda *args, **options: made_up())
    assert calibrate.limits(2) == made_up()
    with pytest.raises(OSError):
        calibrate.save(made_up(), calibrate.cache_file(2))


def test_each_host_thread_count_and_path_has_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _native.simd_paths()
    files = {calibrate.cache_file(t, p) for t in (1, 2) for p in paths}
    assert len(files) == 2 * len(paths)
    assert calibrate.cache_file(1) == calibrate.cache_file(1, paths[0])
    monkeypatch.setenv("LMCLOCK_ISA", "scalar")
    assert calibrate.cache_file(1) == calibrate.cache_file(1, "scalar")
    monkeypatch.setattr(calibrate, "processor", lambda: "another one")
    assert calibrate.cache_file(1, "scalar") not in files


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for repetitions in (0, -1, 1001):
        with pytest.raises(OptionError, match=f"repetitions={repetitions} is out of range"):
            calibrate.calibrate(1, None, repetitions)
    with pytest.raises(OptionError, match="threads=0 is no thread count"):
        calibrate.calibrate(0)
    other = "neon" if "neon" not in _native.simd_paths() else "avx2"
    for ask in (calibrate.calibrate, calibrate.limits, calibrate.cache_file):
        with pytest.raises(OptionError, match=f"path='{other}' is not available .*; valid: .*sca"):
            ask(1, other)
    monkeypatch.setenv("LMCLOCK_ISA", other)
    with pytest.raises(OptionError, match="is not available on this processor"):
        calibrate.limits(1)


def test_a_crew_works_together_and_goes_home() -> None:
    with calibrate._Crew(3) as crew:
        seen: list[int] = []
        assert crew.rate(lambda thread: seen.append(thread) or 5) > 0
        assert sorted(seen) == [0, 1, 2] and [amount for *_, amount in crew.stamps] == [5] * 3
    assert not any(member.is_alive() for member in crew.members)


def test_an_error_of_one_thread_is_told() -> None:
    def work(thread: int) -> int:
        if thread == 1:
            raise MemoryError("no room")
        return 1

    with pytest.raises(MemoryError, match="no room"), calibrate._Crew(2) as crew:
        crew.rate(work)
    assert not any(member.is_alive() for member in crew.members)


def test_the_processor_has_a_name() -> None:
    assert calibrate.processor().strip()
