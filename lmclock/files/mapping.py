"""Files mapped read-only into memory, and what a file that is no weights file turns out to be.

`map_file` opens regular files only, so that a device or a FIFO can neither hang nor flood a reader,
and maps exactly the bytes the file had at that moment. Replacing a mapped file by rename is safe:
the map keeps the old one. A file that another process *shortens* in place is not survivable: the
next access to a lost page ends the process with SIGBUS, as does an I/O error on a page. Every check
of a reader is against the size at map time; `still_whole` asks again, and a loader calls it just
before it copies or repacks the weights.
"""

from __future__ import annotations

import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np

from lmclock.errors import FileError
from lmclock.formats import Array

PICKLE = (
    "is or may be a pickle, which can run code when opened, so lmclock does not open it; "
    "`lmclock convert FOLDER` writes its tensors, and nothing else, to safetensors in a new folder"
)
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")
# How files that people take for weights begin.
FOREIGN = (
    (b"PK\x03\x04", PICKLE),
    (b"\x80", PICKLE),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "is a web page: the download was answered with an error or a log-in page"),
    (b"ggjt"[::-1], "is a GGML file from before GGUF: convert it again from the original"),
    (b"ggml"[::-1], "is a GGML file from before GGUF: convert it again from the original"),
    (b"ggmf"[::-1], "is a GGML file from before GGUF: convert it again from the original"),
    (b"\x89HDF", "is an HDF5 file: convert it to safetensors"),
    (b"\x93NUMPY", "is a NumPy file: convert it to safetensors"),
)


class MappedFile:
    """A regular file's bytes: `data`, uint8 `(size,)`, read-only and zero-copy."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.size = len(mapped)
        self.map = mapped
        self.data: Array = np.frombuffer(mapped, np.uint8)

    def still_whole(self) -> None:
        """FileError when the file has been shortened since it was mapped."""
        now = self.map.size()
        if now < self.size:
            raise FileError(f"{self.path} shrank from {self.size} to {now} bytes while in use")

    def close(self) -> None:
        """Drop the map; views taken from it stay valid, and the last one to go unmaps the file."""
        self.data = self.data[:0].copy()
        with suppress(BufferError):  # raised while views are alive; they keep the map
            self.map.close()


def map_file(path: Path) -> MappedFile:
    """Map the file at `path`; FileError when it is missing, empty, unreadable or not regular."""
    try:
        # O_NONBLOCK: opening a FIFO without a writer would otherwise wait for one.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path} is {_kind(status.st_mode)}, not a regular file")
        if status.st_size == 0:
            raise FileError(f"{path} is empty")
        return MappedFile(path, mmap.mmap(handle, status.st_size, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    finally:
        os.close(handle)


def unreadable(path: Path, error: Exception) -> FileError:
    """The FileError for an operating system's refusal to read `path`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return FileError(f"cannot read {str(path)!r}: {reason}")


def foreign(path: Path, head: bytes) -> str | None:
    """What a file beginning with `head` is instead of weights, to end a sentence with, or None."""
    for magic, meaning in FOREIGN:
        if head.startswith(magic):
            return meaning
    return PICKLE if path.suffix.lower() in PICKLE_ENDINGS else None


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")
