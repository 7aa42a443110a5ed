"""The promises a machine keeps: imports flow one way, budgets hold, generated files are current.

Each rule is a function from source text to complaints, shown to complain before it is applied.
"""

from __future__ import annotations

import ast
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES, COLUMNS = 400, 60, 100

# Import ranks (docs/architecture.md): a file imports lower ranks, or its own rank and folder.
RANKS = {
    "errors": 0,
    **dict.fromkeys(("settings", "formats", "shapes", "fields", "folding"), 1),
    **dict.fromkeys(("isa", "batch", "packing"), 2),
    **dict.fromkeys(("program", "config"), 3),
    **dict.fromkeys(("listing", "cost", "files", "text"), 4),
    **dict.fromkeys(("flowchart", "verify"), 5),
    **dict.fromkeys(("assemble", "passes", "cache", "_native"), 6),
    "machines": 7,
    **dict.fromkeys(("hardware", "cycle"), 8),
    **dict.fromkeys(("roofline", "clock", "engine"), 9),
    **dict.fromkeys(
        (
            "reports",
            "debug",
            "encode",
            "translate",
            "capacity",
            "reading",
            "train",
            "serve",
            "tune",
        ),
        10,
    ),
    **dict.fromkeys(("model", "probe"), 11),
    "cli": 12,
    **dict.fromkeys(("__init__", "__main__"), 13),
}
HEAVY = ("torch", "transformers", "starlette", "scipy", "huggingface_hub", "gguf")
UNSAFE_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")


def module_name(path: Path) -> str:
    """`lmclock.files.gguf` for lmclock/files/gguf.py, `lmclock.files` for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PYTHON = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in ("lmclock", "tools", "bench")}
NATIVE = sorted(path for path in (ROOT / "native").rglob("*") if path.suffix in (".cc", ".h"))
MODULES = {module_name(path): path for path in PYTHON["lmclock"]}


def top(module: str) -> str:
    """The file or folder of the package that holds `module`, as RANKS spells it."""
    return module.split(".")[1] if "." in module else "__init__"


def rank(module: str) -> int:
    """Import rank of a module of the package; KeyError when its file has none."""
    return RANKS[top(module)]


def imports(source: str, module: str, known: set[str], is_package: bool) -> set[str]:
    """Modules of `known` that `source` imports anywhere, or names in a string (lazy tables)."""
    found: set[str] = set()
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner in known else str(origin))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found.add(node.value)
    return found & known - {module}


def upward(graph: dict[str, set[str]]) -> Iterator[str]:
    """Imports of a higher rank, or of the same rank in another folder."""
    for module, targets in graph.items():
        for target in sorted(targets):
            folders = {name.rpartition(".")[0] for name in (target, module)}
            siblings = len(folders) == 1 or top(target) == top(module)
            if rank(target) > rank(module) or (rank(target) == rank(module) and not siblings):
                yield f"{module} ({rank(module)}) imports {target} ({rank(target)})"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        return seen

    return [module for module in graph if module in reached(module)]


def over_budget(source: str, is_python: bool) -> Iterator[str]:
    """Files longer than the budget; in Python functions and lines too."""
    lines = source.splitlines()
    if len(lines) > FILE_LINES:
        yield f"file of {len(lines)} lines"
    if not is_python:
        return
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield f"line {number} of {len(line)} columns"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"function {node.name} of {length} lines"


def reads_environment(source: str) -> Iterator[str]:
    """Uses of environment variables."""
    names = {"environ", "environb", "getenv", "putenv", "getenvb"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"line {node.lineno}: {node.attr}"
        if isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names}:
            yield f"line {node.lineno}: imports from {node.module}"


def runs_data(source: str) -> Iterator[str]:
    """Ways in which a file or a string could run as code. torch.load may stand where weights_only
    is written beside it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if any(str(name).split(".")[0] in UNSAFE_MODULES for name in named):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords):
                continue
            if called in ("eval", "exec", "compile", "torch.load") or any(
                word.arg in ("allow_pickle", "trust_remote_code") for word in node.keywords
            ):
                yield f"line {node.lineno}: {called}"


def test_the_rules_complain() -> None:
    known = {"lmclock", "lmclock.isa", "lmclock.files", "lmclock.files.gguf", "lmclock.text.bpe"}

    def seen(source: str) -> set[str]:
        return imports(source, "lmclock.files.gguf", known, is_package=False)

    assert seen("def f():\n    from ..text import bpe") == {"lmclock.text.bpe"}
    assert seen("from lmclock.files import Reader") == {"lmclock.files"}
    assert seen("from . import x") == {"lmclock.files"}
    assert seen("import lmclock.isa, os\nT = {'a': 'lmclock.text.bpe'}\n'lmclock.isa is text'") == {
        "lmclock.isa",
        "lmclock.text.bpe",
    }
    assert list(upward({"lmclock.isa": {"lmclock.program"}}))
    assert list(upward({"lmclock.files.gguf": {"lmclock.text.bpe"}}))
    assert not list(upward({"lmclock.files.pull": {"lmclock.files.gguf", "lmclock.errors"}}))
    assert not list(upward({"lmclock.settings": {"lmclock.errors"}}))
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert len(list(over_budget("x = 1\n" * 401 + "y" * 101, is_python=True))) == 2
    assert len(list(over_budget("x = 1;\n" * 401, is_python=False))) == 1
    assert list(over_budget("def f():\n" + "    x = 1\n" * 60, is_python=True))
    assert list(reads_environment("import os\nos.environ['A']"))
    assert list(reads_environment("from os import getenv"))
    for source in ("import pickle", "from pickle import loads", "eval('1')", "torch.load(p)"):
        assert list(runs_data(source)), source
    assert list(runs_data("numpy.load(p, allow_pickle=True)"))
    assert list(runs_data("torch.load(p, weights_only=False)"))
    assert not list(runs_data("torch.load(p, weights_only=True)"))
    assert not list(runs_data("model.eval()"))


def each_source() -> Iterator[tuple[str, str]]:
    """(name, source) of every Python file of the package."""
    for path in PYTHON["lmclock"]:
        yield str(path.relative_to(ROOT)), path.read_text()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module of the package -> modules of the package it imports, lazy ones included."""
    return {
        module: imports(
            path.read_text(), module, set(MODULES) | {"lmclock._native"}, path.stem == "__init__"
        )
        for module, path in MODULES.items()
    }


def test_every_file_has_a_rank() -> None:
    unknown = [module for module in MODULES if top(module) not in RANKS]
    assert not unknown, (
        f"give these a rank in {Path(__file__).name} and docs/architecture.md: {unknown}"
    )


def test_imports_flow_one_way(graph: dict[str, set[str]]) -> None:
    assert len(graph) > 5
    assert not list(upward(graph))


def test_no_import_circles(graph: dict[str, set[str]]) -> None:
    assert not circles(graph)


def test_budgets() -> None:
    assert NATIVE
    complaints = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in [*PYTHON["lmclock"], *PYTHON["tools"], *PYTHON["bench"], *NATIVE]
        for complaint in over_budget(path.read_text(), path.suffix == ".py")
    ]
    assert not complaints, "\n".join(complaints)


def test_every_file_says_what_it_is() -> None:
    silent = [
        n for n, source in each_source() if source and not ast.get_docstring(ast.parse(source))
    ]
    assert not silent


def test_environment_variables_are_read_in_settings_only() -> None:
    complaints = [
        f"{name}: {complaint}"
        for name, source in each_source()
        if name != "lmclock/settings.py"
        for complaint in reads_environment(source)
    ]
    complaints += [str(path) for path in NATIVE if re.search(r"\bgetenv\b", path.read_text())]
    assert not complaints


def test_no_data_runs_as_code() -> None:
    assert not [f"{name}: {c}" for name, source in each_source() for c in runs_data(source)]
    readers = [name for name, source in each_source() if "torch.load" in source]
    assert readers == ["lmclock/files/convert.py"]


def test_generated_files_are_current() -> None:
    command = [sys.executable, "-m", "tools.generate", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"run `make docs`:\n{done.stdout}{done.stderr}"


def python(code: str, folder: Path = ROOT) -> str:
    """Standard output of `code` in a fresh interpreter started in `folder`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    code = f"import lmclock, sys; print(sorted(set(sys.modules) & set({HEAVY})))"
    assert python(code).strip() == "[]"


def test_import_is_quick() -> None:
    seconds: dict[str, list[float]] = {"pass": [], "import numpy": [], "import lmclock": []}
    for _ in range(5):
        for code, times in seconds.items():
            start = time.perf_counter()
            python(code)
            times.append(time.perf_counter() - start)
    bare, numpy, own = (statistics.median(times) for times in seconds.values())
    # 150 ms is for a quiet machine; on a busy one numpy, which is most of it, is the measure.
    limit = max(0.150, 1.5 * (numpy - bare))
    assert own - bare < limit, f"{own - bare:.3f} s beside numpy's {numpy - bare:.3f} s"


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_the_extension_is_found(place: str, tmp_path: Path) -> None:
    """From the root, where ./lmclock shadows an installed package, and from anywhere else."""
    folder = ROOT if place == "root" else tmp_path
    assert "_native" in python("from lmclock import _native; print(_native.__file__)", folder)


def test_only_loopback_is_reachable() -> None:
    with pytest.raises(AssertionError, match="mark the test `network`"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)  # an address kept for documentation
    with pytest.raises(AssertionError, match="mark the test `network`"):
        socket.getaddrinfo("example.org", 443)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()
