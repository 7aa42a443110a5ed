"""`pull("hf:...")` against a hub of our own making: which files are asked for, and the messages."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lmclock.errors import FileError, OptionError, UnsupportedError
from lmclock.files.pull import pull

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
