"""Every verb with good and bad input. A mistake ends in one clear sentence and a code not 0."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from measured import limits

from lmclock import cli
from lmclock.errors import choices
from lmclock.hardware.calibrate import cache_file, save
from lmclock.listing import parse
from lmclock.model import TextStream

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = re.compile(r"lmclock: [^\n]+\n")


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf and things that are no models or prompts."""
    made = tmp_path_factory.mktemp("cli")
    tiny_gguf.write(made / "tiny.gguf")
    (made / "empty").mkdir()
    (made / "text.gguf").write_text("not a model at all, whatever its name says")
    (made / "short.gguf").write_bytes((made / "tiny.gguf").read_bytes()[:999])
    (made / "prompt.txt").write_text("the clock\n")
    (made / "latin.txt").write_bytes(b"caf\xe9")
    (made / "long.txt").write_text("x" * 300)
    (made / "nothing.txt").write_text("")
    (made / "net.lmc").write_text((ROOT / "examples" / "neurons.lmc").read_text())
    (made / "bad.lmc").write_text('program t "t"\nsection step\nlinaer y, x, w\n')
    return made


@pytest.fixture
def lmclock(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Command:
    """Runs a command line in `folder` within this process; limits are made up."""
    monkeypatch.chdir(folder)
    save(limits(), cache_file(1))

    def command(line: str, stdin: bytes = b"") -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["lmclock", *shlex.split(line)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return command


RUN = "run tiny.gguf --machine array -s 1"

# --- good input


def test_a_prompt_is_continued_on_stdout_alone(lmclock: Command) -> None:
    done = lmclock(f"{RUN} -p 'the clock' -n 12")
    assert (done.code, done.err) == (0, "") and done.out.endswith("\n") and len(done.out) > 5
    assert lmclock(f"{RUN} -f prompt.txt -n 12").out == done.out, "without its last line end"
    assert lmclock(f"{RUN} -f - -n 12", stdin=b"the clock\r\n").out == done.out
    assert lmclock("run -m tiny.gguf --machine array -s 1 -p 'the clock' -n 12").out == done.out
    assert lmclock(f"{RUN} -p 'the clock' -n 0").out == "\n"
    assert lmclock(f"{RUN} -p 'the clock' -n 12 -s 2").out != done.out


def test_every_flag_of_sampling_is_heard(lmclock: Command) -> None:
    plain = lmclock(f"{RUN} -p he -n 20 --ignore-eos").out
    for flag in ("--temp 3", "--top-k 2", "--top-p 0.1", "--min-p 0.9", "--repeat-penalty 5",
                 "--presence-penalty 9", "--frequency-penalty 9", "--logit-bias 70=90",
                 f"--stop '{plain[3]}'", "-n 5", "-s 9"):  # fmt: skip
        assert lmclock(f"{RUN} -p he -n 20 --ignore-eos {flag}").out != plain, flag
    for flag in ("--batch-size 1", "-ub 1", "-c 64", "-ctk f32 -O2"):
        assert lmclock(f"{RUN} -p he -n 3 {flag}").code == 0, flag


def test_run_json(lmclock: Command) -> None:
    done = lmclock(f"{RUN} -p 'the clock' -n 12 --json --ignore-eos")
    found = json.loads(done.out)
    assert found["text"] == lmclock(f"{RUN} -p 'the clock' -n 12 --ignore-eos").out[:-1]
    assert len(found["tokens"]) == 12 and found["finish"] == "length"
    assert found["sampling"]["seed"] == 1 and found["sampling"]["temperature"] == 0.8
    assert found["clock"]["kinds"]["decode"]["retired"] == 11


def test_a_turn_through_the_template(lmclock: Command) -> None:
    plain, chat, system = (
        json.loads(lmclock(f"{RUN} -p hi -n 2 --json {flag}").out)["prompt_tokens"]
        for flag in ("", "--chat", "-sys 'be brief'")
    )
    assert plain < chat < system


def test_piped_lines_are_a_chat(lmclock: Command) -> None:
    stdin = b"hi\n\n  \nhe\n/clear\nhi\n/exit\nnever said\n"
    done = lmclock(f"{RUN} -n 6 --temp 0 --ignore-eos", stdin)
    assert done.code == 0
    clocks = re.findall(r"^prefill (\d+) tokens, .*; decode 5 tokens, .* of the limit", done.err,
                        re.MULTILINE)  # fmt: skip
    assert len(clocks) == 3, done.err
    assert int(clocks[0]) == int(clocks[2]) < int(clocks[1]), "history grows until it is cleared"
    assert len(done.out.split("\n")) >= 4
    assert lmclock(f"{RUN} -n 6", b"").code == 0


def test_stat(lmclock: Command) -> None:
    done = lmclock("stat tiny.gguf --machine array -p 'the clock' -n 8 --ignore-eos -s 1")
    assert (done.code, done.err) == (0, "")
    for part in ("tiny on array, 1 thread", "prefill", "8  prompt tokens", "7  generated tokens",
                 "where the time goes", "wall ticks"):  # fmt: skip
        assert part in done.out, done.out
    found = json.loads(lmclock("stat tiny.gguf --machine array -n 8 --json --ignore-eos").out)
    assert found["kinds"]["prefill"]["prompt_tokens"] == 26, "the prompt it brings along"
    assert found["kinds"]["decode"]["retired"] == 7
    assert sum(found["kinds"]["decode"]["tree"].values()) == pytest.approx(1)
    assert lmclock("stat tiny.gguf --machine array -n 0").code == 0


def test_stat_computes_a_long_prompt_though_it_warms_up_with_it(lmclock: Command) -> None:
    found = lmclock(f"stat tiny.gguf --machine array -p {'x' * 200} -n 1 --json")
    assert json.loads(found.out)["kinds"]["prefill"]["prompt_tokens"] == 200


def test_trace(lmclock: Command, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    done = lmclock(f"trace tiny.gguf --machine array -n 4 -o {file} --ignore-eos")
    events = json.loads(file.read_text())
    assert done.out == f"{file}: 4 cycles, {len(events)} events, {file.stat().st_size:,} bytes\n"
    said = json.loads(lmclock(f"trace tiny.gguf --machine array -n 1 -o {file} --json").out)
    assert said == {"file": str(file), "cycles": 1, "events": len(json.loads(file.read_text()))}


def test_disasm(lmclock: Command) -> None:
    text = lmclock("disasm tiny.gguf -O0").out
    assert parse(text).name == "tiny" and "; native keeps" not in text.splitlines()[0]
    assert parse(lmclock("disasm tiny.gguf --no-comments").out).name == "tiny"
    assert lmclock("disasm net.lmc").out.startswith('program  neurons "2-3-1"')
    assert lmclock("disasm tiny.gguf --mermaid").out.startswith("flowchart")
    found = json.loads(lmclock("disasm tiny.gguf --json").out)
    assert found["context"] == 256 and found["sections"]["step"][0]["op"] == "embed"


def test_diff(lmclock: Command) -> None:
    done = lmclock("diff tiny.gguf --a array --b array -p he")
    assert done.code == 0 and "no instruction diverges (NMSE <= 1e-07)" in done.out
    assert lmclock("diff tiny.gguf --worst 3 --tolerance 1e-6 -n 0").code == 0
    done = lmclock("diff tiny.gguf --b native -p he --tolerance 0 --json -n 0")
    found = json.loads(done.out)
    assert done.code == 1, "another order of sums is a divergence from nothing at all"
    assert found["first_diverging"]["diverges"] and found["first_diverging"]["cycle"] == 0
    text = lmclock("diff tiny.gguf --b native -p he --tolerance 0 -n 0").out
    assert f"instruction {found['first_diverging']['number']}, value" in text


def test_calibrate(lmclock: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def calibrate(threads: Any, path: Any, repeat: Any, progress: Any) -> Any:
        asked.append((threads, repeat))
        return limits(step=2e-6)

    monkeypatch.setattr("lmclock.cli.calibrate.calibrate", calibrate)
    text = lmclock("calibrate -t 2 -r 3").out
    assert "a processor, scalar, 2 threads" in text and re.search(
        r"f32 arithmetic +50.0 Gop/s", text
    )
    assert json.loads(lmclock("calibrate --json").out)["peaks"]["int8"]["best"] == 100e9
    assert asked == [(2, 3), (None, 5)] and cache_file(2).exists()


def test_pull_of_a_path_and_help(lmclock: Command) -> None:
    assert lmclock("pull tiny.gguf").out == "tiny.gguf\n"
    assert json.loads(lmclock("pull tiny.gguf --json").out)["path"] == "tiny.gguf"
    for verb in cli.VERBS:
        done = lmclock(f"{verb} -h")
        assert done.code == 0 and done.out.startswith(f"Usage: lmclock {verb} [OPTIONS]"), verb
    assert all(verb in lmclock("--help").out for verb in (*cli.VERBS, "LMCLOCK_ISA"))
    assert "Verbs:" in (bare := lmclock("")).err and bare.code == 2


# --- bad input


A = "--machine array -p hi"
MISTAKES: list[tuple[str, int, str]] = [
    # what is typed, exit code, what is said
    ("rnu", 2, f"there is no verb 'rnu' (did you mean 'run'?); valid: {choices(cli.VERBS)}"),
    ("frobnicate", 2, f"there is no verb 'frobnicate'; valid: {choices(cli.VERBS)}"),
    ("run --tmep 1", 2, "No such option '--tmep'."),
    ("run a b -p hi", 2, "unexpected extra argument"),
    ("run a -m b -p hi", 2, "two models are named, 'a' and 'b'; give one"),
    ("run -p", 2, "Option '-p' requires an argument"),
    ("run tiny.gguf -p a -f prompt.txt", 2, "-p and -f both give a prompt; give one"),
    ("run tiny.gguf --json", 2, "--json needs a prompt (-p or -f)"),
    ("run tiny.gguf --precise -O2 -p hi", 2, "--precise goes with -O0 or -O1, not -O2"),
    ("run tiny.gguf --machine array -t 2 -p hi", 2, "-t is for --machine native"),
    ("run tiny.gguf --machine gpu -p hi", 2, "'gpu' is not one of 'array', 'native'"),
    ("run tiny.gguf -t 0 -p hi", 2, "0 is not in the range 1<=x<=1024"),
    ("run tiny.gguf -O 7 -p hi", 2, "7 is not in the range 0<=x<=2"),
    ("run tiny.gguf -n many -p hi", 2, "'many' is not a valid integer"),
    ("run tiny.gguf -c -1 -p hi", 2, "-1 is not in the range x>=0"),
    ("run tiny.gguf -ub 0 -p hi", 2, "0 is not in the range x>=1"),
    ("run tiny.gguf -ctk f8 -p hi", 2, "'f8' is not one of 'f32', 'f16', 'q8_0'"),
    ("run nowhere.gguf -p hi", 1, "there is no file or folder 'nowhere.gguf'"),
    ("run smollm3 -p hi", 1, "no model or text called 'smollm3' (did you mean 'smollm2'?)"),
    (f"run empty {A}", 1, "empty holds no .safetensors and no .gguf file"),
    (f"run text.gguf {A}", 1, "text.gguf is neither a GGUF nor a safetensors file"),
    (f"run short.gguf {A}", 1, "short.gguf"),
    (f"run prompt.txt {A}", 1, "prompt.txt is neither a GGUF nor"),
    ("run '' -p hi", 1, "no model or text called ''"),
    ("run net.lmc -p hi", 1, "net.lmc is a listing"),
    ("run tiny.gguf --machine array -p ''", 1, "the prompt is empty; it needs at least 1 token"),
    ("run tiny.gguf --machine array -f nothing.txt", 1, "the prompt is empty"),
    ("run tiny.gguf -f nowhere.txt", 1, "cannot read prompt file nowhere.txt: No such file"),
    ("run tiny.gguf -f empty", 1, "cannot read prompt file empty: Is a directory"),
    ("run tiny.gguf -f latin.txt", 1, "prompt file latin.txt is not UTF-8: byte 3 is wrong"),
    ("run tiny.gguf --machine array -f long.txt", 1, "a prompt of 300 tokens does not fit: "),
    (f"run tiny.gguf {A} -n 300", 1, "a prompt of 2 tokens and 300 new ones does not fit"),
    (f"run tiny.gguf {A} -c 999", 1, "context=999 is more than the model was made for, 256"),
    (f"run tiny.gguf {A} -n -5", 1, "-n -5 is out of range; valid: -1 (no limit), 0 or more"),
    ("run nowhere.gguf -p hi --temp nan", 1, "temperature=nan is out of range; valid: 0, or"),
    ("run nowhere.gguf -p hi --top-p 2", 1, "top_p=2.0 is out of range"),
    ("run nowhere.gguf -p hi -s -2", 1, "seed=-2 is out of range"),
    ("run nowhere.gguf -p hi --logit-bias x", 1, "--logit-bias 'x' is not ID=BIAS, such as 42=-5"),
    (f"run tiny.gguf {A} --logit-bias 9999=1", 1, "logit_bias for token 9999: valid ids: 0 to"),
    (f"run tiny.gguf {A} --stop ''", 1, "stop string '' is not valid"),
    ("stat tiny.gguf --machine array -p ''", 1, "the prompt is empty"),
    ("stat tiny.gguf --machine array -p hi --hottest 0", 2, "0 is not in the range x>=1"),
    (f"trace tiny.gguf {A} -o no/where.json", 1, "cannot write no/where.json: there is no folder"),
    (f"trace tiny.gguf {A} -o empty", 1, "cannot write empty: it is a folder"),
    (f"trace tiny.gguf {A} -o /dev/full -n 1", 1, "cannot write /dev/full: No space left"),
    ("disasm bad.lmc", 1, "linaer"),
    ("disasm nowhere.lmc", 1, "nowhere.lmc"),
    ("diff tiny.gguf --b array -p ''", 1, "the prompt is empty"),
    ("diff tiny.gguf --b array --tolerance -1", 2, "-1.0 is not in the range x>=0"),
    ("diff tiny.gguf --b array -n 300", 1, "tokens do not fit the context of 256"),
    ("calibrate -r 0", 2, "0 is not in the range 1<=x<=1000"),
    ("pull nowhere", 1, "there is no model or text called 'nowhere'"),
    ("pull no/where", 1, "there is no file or folder 'no/where'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_clear_sentence(
    lmclock: Command, line: str, code: int, message: str
) -> None:
    done = lmclock(line)
    assert done.code == code and done.out == "", done
    assert message in done.err, done.err
    if code == 1:
        assert SENTENCE.fullmatch(done.err), done.err
    else:
        assert done.err.count("Error: ") == 1 and done.err.startswith(("Usage: lmclock", "Error: "))


@pytest.mark.parametrize(
    ("variable", "value", "line", "message"),
    [
        ("LMCLOCK_ISA", "bogus", "run tiny.gguf -p hi", "LMCLOCK_ISA='bogus' is not a SIMD path"),
        ("LMCLOCK_THREADS", "0", "run tiny.gguf -p hi", "LMCLOCK_THREADS='0' is no thread count"),
        ("LMCLOCK_THREADS", "two", "calibrate", "LMCLOCK_THREADS='two' is no thread count"),
        ("LMCLOCK_ISA", "bogus", f"stat tiny.gguf {A} -n 1", "LMCLOCK_ISA='bogus'"),
    ],
)
def test_a_wrong_variable_is_named(
    lmclock: Command, monkeypatch: pytest.MonkeyPatch,
    variable: str, value: str, line: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    done = lmclock(line)
    assert done.code == 1 and message in done.err and SENTENCE.fullmatch(done.err)


def test_a_chat_that_is_not_text_is_said(lmclock: Command) -> None:
    done = lmclock(f"{RUN} -n 2", b"caf\xe9\n")
    assert done.code == 1 and "the input is not UTF-8" in done.err


def test_a_turn_that_does_not_fit_ends_a_piped_chat(lmclock: Command) -> None:
    done = lmclock(f"{RUN} -n 2", b"x" * 300 + b"\n")
    assert done.code == 1 and "does not fit" in done.err


def test_limits_that_cannot_be_kept(
    lmclock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMCLOCK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("lmclock.cli.calibrate.calibrate", lambda *args: limits())
    done = lmclock("calibrate")
    assert done.code == 1 and "f32 arithmetic" in done.out, "what was measured is shown"
    assert "LMCLOCK_CACHE names another folder" in done.err


# --- interruptions


def test_ctrl_c_while_loading(lmclock: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmclock.cli.options.load", interrupted)
    done = lmclock(f"{RUN} -p hi")
    assert done.code == 130 and (done.out + done.err).strip() == ""


def interrupting(monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
    """Press Ctrl-C when so many tokens have come, over all streams."""
    take, count = TextStream._take, []

    def takes(self: TextStream, token: int) -> bool:
        count.append(token)
        if len(count) in at:
            signal.raise_signal(signal.SIGINT)
        return take(self, token)

    monkeypatch.setattr(TextStream, "_take", takes)


def test_ctrl_c_stops_a_reply_and_keeps_the_chat(
    lmclock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(monkeypatch, 3, 10)
    done = lmclock(f"{RUN} -n 6 --ignore-eos", b"hi\nhe\nhi\n")
    assert done.code == 0
    # The reply ends after the cycle in which Ctrl-C came: three tokens, six, then the first of six.
    assert re.findall(r"decode (\d+) tokens", done.err) == ["2", "5"]
    assert done.err.count("prefill") == 3


def test_ctrl_c_of_a_continuation_ends_with_130(
    lmclock: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(monkeypatch, 3)
    done = lmclock(f"{RUN} -p hi -n 20 --json --ignore-eos")
    found = json.loads(done.out)
    assert (done.code, found["finish"], len(found["tokens"])) == (130, "cancelled", 3)


def test_ctrl_c_twice_ends_the_chat(lmclock: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    take = TextStream._take

    def takes(self: TextStream, token: int) -> bool:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return take(self, token)

    monkeypatch.setattr(TextStream, "_take", takes)
    done = lmclock(f"{RUN} -n 6", b"hi\nhe\n")
    assert done.code == 130 and "Traceback" not in done.err
