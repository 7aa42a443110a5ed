"""`pull("hf:org/repo")`: model files from a Hugging Face hub, through huggingface_hub.

    hf:org/repo                  the safetensors of a repository, or its only GGUF
    hf:org/repo:model.gguf       one file, with all shards of its set
    hf:org/repo@REVISION         a branch, tag or commit; a commit's hash pins it

Only weights, configuration and tokeniser files are ever asked for: no pickles and no code. The
files lie in huggingface_hub's own cache. What was pulled once is used again without network, a
moved branch included; `check=True` asks the hub again.
"""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path
from types import ModuleType

from lmclock.errors import FileError, OptionError, UnsupportedError, choices
from lmclock.files.catalogue import Progress, models_folder

SPEC = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?(?::(?P<file>[A-Za-z0-9][\w./ +-]*))?",
    re.ASCII,
)
WEIGHTS = (".safetensors", ".gguf")
BESIDE = re.compile(
    r"[^/]+\.json|[^/]+\.jinja|tokenizer\.model|spiece\.model|vocab\.txt|merges\.txt"
    r"|1_Pooling/config\.json"
)
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5}\.\w+)")
SHOWN = 20  # files named in an error message


def pull_repository(spec: str, progress: Progress, check: bool) -> Path:
    """The folder or file that `spec` names, from the hub or from an earlier call."""
    parts = SPEC.fullmatch(spec)
    if parts is None or ".." in spec:
        raise OptionError(f"{spec!r} is no hub model; valid: hf:org/repo[@revision][:file]")
    note = models_folder() / "hub" / (re.sub(r"[^\w.@+-]", "--", spec[3:]) + ".path")
    if not check and note.exists():
        known = Path(note.read_text())
        if known.exists():
            return known
    hub = _huggingface_hub()
    # It warns of each of its attempts; what came of them is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    progress(f"pulling {spec[3:]}", 0, None)
    # Network errors are those of the HTTP library in use, which is a base of the hub's own error.
    failures = (*hub.errors.HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        path = _fetch(hub, parts["repository"], parts["revision"], parts["file"])
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(path))
    except failures as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileError(f"cannot pull {spec}: {reason}") from error
    return path


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        message = "hf: models need huggingface_hub; install it with: pip install 'lmclock[hub]'"
        raise UnsupportedError(message) from error
    return huggingface_hub


def _fetch(hub: ModuleType, repository: str, revision: str | None, file: str | None) -> Path:
    names = hub.HfApi().list_repo_files(repository, revision=revision)
    chosen = _one_file(names, repository, file) if file else _whole_model(names, repository)
    patterns = [glob.escape(name) for name in chosen]
    folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    weights = [name for name in chosen if name.endswith(WEIGHTS)]
    if file or weights[0].endswith(".gguf"):
        return folder / (file or weights[0])
    return folder


def _one_file(names: list[str], repository: str, file: str) -> list[str]:
    """`file` and, where it is one of a set of shards, the others."""
    if not file.endswith(WEIGHTS) and not BESIDE.fullmatch(file):
        raise UnsupportedError(f"{file} is not pulled; valid: {choices(WEIGHTS)} files")
    if file not in names:
        raise FileError(f"{repository} has no file {file!r}; {_offered(names)}")
    return [name for name in names if _set_of(name) == _set_of(file)]


def _whole_model(names: list[str], repository: str) -> list[str]:
    """The safetensors beside config.json, or the only GGUF, with what belongs to it."""
    beside = [name for name in names if BESIDE.fullmatch(name)]
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    # Some repositories hold the weights twice, in the layout of transformers and in another.
    found = [name for name in found if name.startswith("model")] or found
    if not found:
        found = [name for name in names if name.endswith(".gguf")]
        if len({_set_of(name) for name in found}) > 1:
            raise FileError(f"{repository} holds several models, name one; {_offered(found)}")
    if not found:
        raise FileError(f"{repository} holds no {choices(WEIGHTS)} files; {_offered(names)}")
    return sorted(found) + beside


def _set_of(name: str) -> str:
    """A name that all shards of one set share."""
    parts = SHARD.fullmatch(name)
    return f"{parts['stem']}-of-{parts['count']}" if parts else name


def _offered(names: list[str]) -> str:
    shown = [name for name in names if name.endswith(WEIGHTS)] or names
    rest = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"it has {', '.join(shown[:SHOWN])}{rest}" if shown else "it has no files"
