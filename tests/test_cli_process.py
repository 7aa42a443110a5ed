"""The command line in processes of its own: pipes, terminals, Ctrl-C, a home of no use."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_gguf
from measured import limits

from lmclock.hardware.calibrate import cache_file, save

ROOT = Path(__file__).resolve().parent.parent
RUN = "run tiny.gguf --machine array -s 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("process")
    tiny_gguf.write(made / "tiny.gguf", context=4096)
    return made


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


def environment(folder: Path, **changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    return kept | {"PYTHONPATH": str(ROOT), "LMCLOCK_THREADS": "1"} | changes


def process(line: str, folder: Path, stdin: bytes = b"", **changes: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "lmclock", *shlex.split(line)], cwd=folder, input=stdin,
        env=environment(folder, **changes), capture_output=True, timeout=120,
    )  # fmt: skip
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode())


def test_the_native_machine_says_what_the_reference_says(folder: Path) -> None:
    done = process("run tiny.gguf -p 'the clock' -n 8 --temp 0 -O1 -ctk f32", folder)
    assert (done.code, done.err) == (0, "")
    line = "run tiny.gguf -p 'the clock' -n 8 --temp 0 -O1 -ctk f32 --machine array"
    assert process(line, folder).out == done.out


def test_ctrl_c_while_importing_ends_at_once(folder: Path) -> None:
    code = (
        "import importlib, os, signal, sys, lmclock.__main__ as command\n"
        "load = importlib.import_module\n"
        "importlib.import_module = lambda n: os.kill(os.getpid(), signal.SIGINT) or load(n)\n"
        "sys.argv = ['lmclock', 'disasm', 'tiny.gguf']\n"
        "command.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(folder), capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_a_context_is_no_more_than_was_asked_for(folder: Path) -> None:
    done = process(f"{RUN} -p 'the clock' -n 9 -c 8", folder)
    assert done.code == 1 and "does not fit: the context of the model is 8 tokens" in done.err


def test_a_reader_that_leaves_ends_the_command_quietly(folder: Path) -> None:
    for line in (f"{RUN} -p hi --ignore-eos", "disasm tiny.gguf --json"):
        done = shell(f"$LMCLOCK {line} | head -c 1; exit ${{PIPESTATUS[0]}}", folder)
        assert done.err == "" and len(done.out) == 1 and done.code in (0, 1)


def shell(command: str, folder: Path, **changes: str) -> Done:
    """A line of bash, in which LMCLOCK is the command."""
    changes["LMCLOCK"] = f"{sys.executable} -m lmclock"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment(folder, **changes),
                          capture_output=True, timeout=120)  # fmt: skip
    return Done(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode())


def test_closed_streams_read_as_empty_and_swallow_what_is_written(folder: Path) -> None:
    for verb in ("disasm tiny.gguf", f"{RUN} -p hi -n 2"):
        assert shell(f"$LMCLOCK {verb} >&-", folder) == Done(0, "", "")
    said = shell(f"$LMCLOCK {RUN} -p hi -n 2", folder)
    assert shell(f"$LMCLOCK {RUN} -p hi -n 2 2>&-", folder) == said
    assert shell(f"$LMCLOCK {RUN} <&-", folder) == Done(0, "", "")
    done = shell(f"$LMCLOCK {RUN} -f - <&-", folder)
    assert done == Done(1, "", "lmclock: the prompt is empty; it needs at least 1 token\n")


def test_output_that_cannot_be_written_is_one_sentence(folder: Path) -> None:
    for verb in ("disasm tiny.gguf", f"{RUN} -p hi -n 2", "pull tiny.gguf"):
        done = shell(f"$LMCLOCK {verb} > /dev/full", folder)
        full = "lmclock: cannot write the output: No space left on device\n"
        assert done == Done(1, "", full), verb


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_text_that_is_not_utf8_is_refused(folder: Path, locale: str) -> None:
    for line, what in (
        (f"printf 'caf\\xe9\\n' | $LMCLOCK {RUN}", "the input"),
        (f"printf 'caf\\xe9' | $LMCLOCK {RUN} -f -", "prompt file -"),
        (f"$LMCLOCK {RUN} -p $'caf\\xe9'", "-p"),
        (f"$LMCLOCK {RUN} -p hi -sys $'caf\\xe9'", "--system"),
    ):
        done = shell(line, folder, LC_ALL=locale)
        assert done == Done(1, "", f"lmclock: {what} is not UTF-8: byte 3 is wrong\n"), line


def test_a_home_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = {"HOME": str(tmp_path / "file"), "XDG_CACHE_HOME": "", "LMCLOCK_CACHE": ""}
    assert process(f"{RUN} -p hi -n 2", folder, **home).code == 0, "it needs no cache"
    done = process("run smollm2 -p hi", folder, **home)
    assert done.code == 1 and done.err.count("\n") == 1, done.err
    assert "LMCLOCK_CACHE names another folder" in done.err


class Terminal:
    """A command on a pseudo-terminal: what a person types, and what they see."""

    def __init__(self, line: str, folder: Path) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(
                sys.executable, [sys.executable, "-m", "lmclock", *shlex.split(line)],
                environment(folder, TERM="xterm", COLUMNS="80"),
            )  # fmt: skip

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern has come; what was seen up to its end."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.seen!r}"
            try:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"{pattern!r} did not come: {self.seen!r}") from None
        seen, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return seen

    def code(self, again: str = "") -> int:
        """The exit code once it has ended; `again` is typed every two seconds until then. (What
        comes between a prompt and the wait for keys, Python sees with the next key only.)
        """
        with contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([self.fd], [], [], 2)
                if not ready:
                    self.type(again)
                elif not os.read(self.fd, 65536):
                    break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_at_a_terminal(folder: Path, cache_folder: Path) -> None:
    save(limits(), cache_file(1))
    terminal = Terminal(f"{RUN} --ignore-eos -sys brief -c 2048", folder)
    terminal.wait_for("/exit or Ctrl-D ends.*> ")
    for turn in ("hi", "again"):
        terminal.type(f"{turn}\n")
        terminal.wait_for(f"{turn}\r\n.{{20}}")
        terminal.type("\x03")  # Ctrl-C, or the reply would be of two thousand tokens
        clock = terminal.wait_for("prefill [^\r]*of the limit.*> ")
        assert "decode" in clock and "Traceback" not in clock
    terminal.type("y" * 3000 + "\n")
    terminal.wait_for("lmclock: a prompt of [0-9]* tokens does not fit.*> ")
    terminal.type("\x04")  # Ctrl-D
    assert terminal.code() == 0


def test_ctrl_c_at_the_prompt_of_a_chat_ends_it(folder: Path) -> None:
    terminal = Terminal("run tiny.gguf --machine array", folder)
    terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.code(again="\x03") == 0 and "Traceback" not in terminal.seen


def test_the_examples_run() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        done = subprocess.run(
            [sys.executable, str(path)], env=environment(ROOT), capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("[[1.74], [0.5]]") == 2, "array and native agree"
