"""`calibrate`: measures what this machine can do at best, with the native machine's own kernels.

Every figure is repeated in rounds that visit all of them, so that a slow moment of the machine
spoils one repetition of each
and not all of one; the best, the median and the spread are kept. Results are cached per host,
processor, thread count and
SIMD path as JSON.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

import lmclock.settings as settings
from lmclock.batch import Batch, Rows
from lmclock.errors import OptionError, choices
from lmclock.hardware.limits import Limits, Measured
from lmclock.listing import parse
from lmclock.machines import Capacity, Machine, create
from lmclock.passes import optimise

FOOTPRINTS = tuple(1 << k for k in range(18, 30))  # 256 KiB to 512 MiB
KINDS = ("int8", "int16", "bf16", "f32")
PIECE_NS = 4_000_000  # a timed piece lasts about this long, so that starting threads is noise
SETTLE_NS = 200_000_000  # the longest time that a footprint is read before it is timed
VERSION = 2
Work = Callable[[int], int]  # thread number -> amount done
Job = Callable[[int], Work]  # repeats -> work


def calibrate(
    threads: int | None = None,
    path: str | None = None,
    repetitions: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Limits:
    """Measure now, about three seconds; `progress` hears what is being measured."""
    import lmclock._native as _native

    if not 1 <= repetitions <= 1000:
        raise OptionError(f"repetitions={repetitions} is out of range; valid: 1 to 1000")
    count, path = _set_up(threads, path)
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2
    sizes = [size for size in FOOTPRINTS if size <= room] or [FOOTPRINTS[0]]
    buffer = _huge_buffer(sizes[-1])
    jobs: dict[int | str, Job] = {}
    for size in sizes:
        share = size // count // 64 * 64
        parts = [buffer[t * share : (t + 1) * share] for t in range(count)]
        jobs[size] = _job(lambda t, n, parts=parts: _native.stream(parts[t], n, path))
    for kind in KINDS:
        if _native.peak(kind, 1, path):
            jobs[kind] = _job(lambda t, n, kind=kind: _native.peak(kind, n, path))
    samples: dict[int | str, list[float]] = {name: [] for name in jobs}
    with _Crew(count) as crew:
        scale = {name: crew.fit(job) for name, job in jobs.items()}
        for number in range(repetitions):
            if progress:
                progress(f"round {number + 1} of {repetitions}")
            for name, job in jobs.items():
                crew.settle(job(1))
                samples[name].append(crew.rate(job(scale[name])))
    measured = {name: _summary(rates) for name, rates in samples.items()}
    return Limits(
        threads=count,
        path=path,
        processor=processor(),
        when=time.strftime("%Y-%m-%dT%H:%M:%S"),
        bandwidth=tuple((size, measured[size]) for size in sizes),
        peaks={kind: measured[kind] for kind in KINDS if kind in measured},
        step=_step(count, path, repetitions),
    )


def _set_up(threads: int | None, path: str | None) -> tuple[int, str]:
    """The threads and the SIMD path that are meant; OptionError for what is not to be had."""
    import lmclock._native as _native

    count = settings.threads() if threads is None else threads
    if not 1 <= count <= 1024:
        raise OptionError(f"threads={count} is no thread count; valid: 1 to 1024")
    valid = _native.simd_paths()
    path = path or settings.simd_path() or valid[0]
    if path not in valid:
        raise OptionError(
            f"path={path!r} is not available on this processor; valid: {choices(valid)}"
        )
    return count, path


def limits(
    threads: int | None = None,
    path: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Limits:
    """The cached limits of this host. Where there are none, or no sound ones, they are measured,
    which `progress` hears, and cached if the cache can be written.
    """
    file = cache_file(threads, path)
    try:
        return msgspec.json.decode(file.read_bytes(), type=Limits)
    except (OSError, msgspec.DecodeError):
        found = calibrate(threads, path, progress=progress)
    with suppress(OSError):
        save(found, file)
    return found


def save(found: Limits, file: Path) -> Limits:
    """Write atomically, so that a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    part.replace(file)
    return found


def cache_file(threads: int | None = None, path: str | None = None) -> Path:
    """Where the limits of this host are cached."""
    count, path = _set_up(threads, path)
    host = hashlib.sha256(f"{platform.node()} {processor()} {os.cpu_count()}".encode()).hexdigest()
    name = f"v{VERSION}-{host[:12]}-{path}-{count}.json"
    return settings.cache_folder() / "calibration" / name


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _summary(rates: Sequence[float]) -> Measured:
    middle = statistics.median(rates)
    return Measured(max(rates), middle, (max(rates) - min(rates)) / middle)


def _huge_buffer(size: int) -> np.ndarray:
    """Zeroed bytes on huge pages where the system grants them, as the machine keeps its weights."""
    # Private: shared memory, which Python's mmap gives by default, gets no huge pages.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(pages, np.uint8)
    buffer[:] = 1  # an untouched page is the shared zero page and would be read from cache
    return buffer


def _job(work: Callable[..., int]) -> Job:
    """work(thread, repeats) as a job."""
    return lambda repeats: lambda thread: work(thread, repeats)


class _Crew:
    """Threads that start a piece of work together; the calling thread only times.

    They end with the `with` block, however it ends; what a piece of work raises, `rate` raises.
    """

    def __init__(self, threads: int) -> None:
        self.start, self.done = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
        self.work: Work
        self.stamps: list[tuple[int, int, int]] = []
        self.errors: list[Exception] = []
        self.members = [
            threading.Thread(target=self._loop, args=(t,), daemon=True) for t in range(threads)
        ]
        for member in self.members:
            member.start()

    def _loop(self, thread: int) -> None:
        with suppress(threading.BrokenBarrierError):
            while True:
                self.start.wait()
                begin = time.perf_counter_ns()
                try:
                    amount = self.work(thread)
                except Exception as error:  # told to the caller, who would wait for ever otherwise
                    self.errors.append(error)
                    amount = 0
                self.stamps.append((begin, time.perf_counter_ns(), amount))
                self.done.wait()

    def rate(self, work: Work) -> float:
        """Amount per second of all threads together, from the first start to the last end."""
        self.work, self.stamps = work, []
        self.start.wait()
        self.done.wait()
        if self.errors:
            raise self.errors[0]
        spent = max(e for _, e, _ in self.stamps) - min(b for b, _, _ in self.stamps)
        return sum(amount for _, _, amount in self.stamps) * 1e9 / max(spent, 1)

    def fit(self, job: Job) -> int:
        """How many passes make a piece last PIECE_NS."""
        passes = 1
        while True:
            begin = time.perf_counter_ns()
            self.rate(job(passes))
            spent = time.perf_counter_ns() - begin
            if spent > PIECE_NS // 2 or passes >= 1 << 20:
                return max(1, round(passes * PIECE_NS / spent))
            passes *= 2

    def settle(self, work: Work) -> None:
        """Repeat work until it gets no faster: what was read before has to leave the caches, and a
        last-level cache that learns what to keep takes tens of passes over what fits in it.
        """
        end = time.perf_counter_ns() + SETTLE_NS
        best, stale = 0.0, 0
        while stale < 4 and time.perf_counter_ns() < end:
            rate = self.rate(work)
            stale = 0 if rate > 1.02 * best else stale + 1
            best = max(best, rate)

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self.start.abort()
        self.done.abort()
        for member in self.members:
            member.join()


def idle_machine(threads: int, path: str | None = None, count: int = 256) -> Machine:
    """A native machine bound to one small row, whose `step` is `count` instructions that have next
    to nothing to do.
    """
    text = 'program step "step"\ninput x tok f32 width=16\nsection step\n'
    text += "".join(
        f"act x.{k + 1}, {'x' if k == 0 else f'x.{k}'} kind=relu\n" for k in range(count)
    )
    machine = create("native", threads=threads, path=path)
    machine.load(optimise(parse(text), 0), {}, Capacity(rows=1, picks=1, slots=1))
    rows = Rows.of([(0, 1)])
    machine.bind(Batch({"tok": rows}, {"x": np.ones((1, 16), np.float32)}, np.zeros(1, np.int32)))
    return machine


def _step(threads: int, path: str, repetitions: int) -> Measured:
    """Seconds of an instruction that has next to nothing to do: dispatch and one small row. From
    when the last thread is there, since waking one that sleeps takes longer than all of them.
    """
    count = 256
    machine = idle_machine(threads, path, count)
    rates = []
    for _ in range(max(repetitions, 3) * 4):
        table = machine.run("step").table
        spent = int(table[-1, :, 1].max() - table[0, :, 0].max())
        rates.append(count * machine.traits.tick_rate / max(1, spent))
    machine.close()
    kept = sorted(rates)[len(rates) // 4 :]
    middle = statistics.median(kept)
    return Measured(1 / max(kept), 1 / middle, (max(kept) - min(kept)) / middle)
