"""Options that several verbs share, declared once, with llama.cpp's short names."""

from __future__ import annotations

import functools
import json
import math
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmclock.assemble import Assembled
from lmclock.engine.sampling import sampling_of
from lmclock.errors import FileError, OptionError
from lmclock.machines import MACHINES
from lmclock.model import Model, load, read
from lmclock.passes import optimise
from lmclock.passes.quantize import TARGETS
from lmclock.program import CACHE_FORMATS, Program

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_MODEL = "smollm2"
Function = Callable[..., Any]


@dataclass(frozen=True)
class Loading:
    """Which model, and how to load it, as the command line says."""

    name: str
    level: int
    cache: str
    weights: str | None = None
    machine: str = "native"
    threads: int | None = None
    context: int = 0
    chunk: int = 512

    def load(self, **changes: Any) -> Model:
        """The model on its machine; `changes` are further options of lmclock.model.load."""
        model = load(
            self.name, machine=self.machine, level=self.level, threads=self.threads,
            context=self.context, chunk=self.chunk, cache=self.cache, weights=self.weights,
            **changes,
        )  # fmt: skip
        _tell(model.assembled)
        return model

    def program(self, invariant: bool = False) -> tuple[Assembled, Program]:
        """What the model's files say, and its optimised program; no machine is needed."""
        assembled = read(self.name, self.cache, self.weights)
        _tell(assembled)
        return assembled, optimise(assembled.program, self.level, invariant=invariant)


def _tell(assembled: Assembled) -> None:
    """What of the model's files is ignored, once, on stderr."""
    for note in assembled.notes:
        click.echo(f"lmclock: {note}", err=True)


def _with(function: Function, *given: Function) -> Function:
    for option in reversed(given):
        function = option(function)
    return function


def program_options(function: Function) -> Function:
    """MODEL, -m, -O, --precise, -ctk and --weights, handed over as one `loading`."""

    @functools.wraps(function)
    def command(
        model_argument: str | None, model_option: str | None, level: int | None, precise: bool,
        cache: str, weights: str | None, **rest: Any,
    ) -> Any:  # fmt: skip
        names = [name for name in (model_argument, model_option) if name is not None]
        if len(set(names)) == 2:
            two = f"{model_argument!r} and {model_option!r}"
            raise click.UsageError(f"two models are named, {two}; give one")
        if precise and level == 2:
            raise click.UsageError("--precise goes with -O0 or -O1, not -O2")
        chosen = level if level is not None else 1 if precise else 2
        loading = Loading(names[0] if names else DEFAULT_MODEL, chosen, cache, weights)
        return function(loading=loading, **rest)

    return _with(
        command,
        click.argument("model_argument", metavar="[MODEL]", required=False),
        click.option(
            "-m", "--model", "model_option", metavar="MODEL",
            help=f"A catalogue name, a path or hf:org/repo[:file]; {DEFAULT_MODEL} if not given.",
        ),
        click.option(
            "-O", "--level", type=click.IntRange(0, 2), metavar="0|1|2", default=None,
            help="0 as assembled, 1 fused, 2 fused and activations rounded (default).",
        ),
        click.option("--precise", is_flag=True, help="Keep activations in f32 (same as -O1)."),
        click.option(
            "-ctk", "--cache-type", "cache", default="f16", show_default=True,
            type=click.Choice(CACHE_FORMATS), help="Number format of keys and values.",
        ),
        click.option(
            "--weights", type=click.Choice(TARGETS), default=None,
            help="Round float weights of products when they are loaded.",
        ),
    )  # fmt: skip


machine_option = click.option(
    "--machine", type=click.Choice(list(MACHINES)), default="native", show_default=True,
    help="What runs the program.",
)  # fmt: skip


def model_options(function: Function) -> Function:
    """`program_options` and what a machine needs: one `loading` that can `load()`."""

    @functools.wraps(function)
    def command(
        loading: Loading, machine: str, threads: int | None, context: int, batch: int, ubatch: int,
        **rest: Any,
    ) -> Any:  # fmt: skip
        if threads and machine != "native":
            raise click.UsageError(f"-t is for --machine native; {machine} runs on one thread")
        chunk = min(batch, ubatch)
        whole = replace(loading, machine=machine, threads=threads, context=context, chunk=chunk)
        return function(loading=whole, **rest)

    return program_options(
        _with(
            command,
            machine_option,
            click.option(
                "-t", "--threads", type=click.IntRange(1, 1024), metavar="N",
                help="Threads of the native machine; as many as it may use if not given.",
            ),
            click.option(
                "-c", "--ctx-size", "context", type=click.IntRange(0), metavar="N", default=0,
                help="Most positions of a sequence; 0: from the model, at most 8192.",
            ),
            click.option(
                "-ub", "--ubatch-size", "ubatch", type=click.IntRange(1), metavar="N", default=512,
                show_default=True, help="Most prompt tokens in one cycle.",
            ),
            click.option(
                "-b", "--batch-size", "batch", type=click.IntRange(1), metavar="N", default=2048,
                show_default=True, help="The same; the smaller of the two counts.",
            ),
        )
    )  # fmt: skip


def prompt_options(function: Function) -> Function:
    """-p and -f, handed over as one `prompt` (None when neither is given)."""

    @functools.wraps(function)
    def command(prompt: str | None, prompt_file: str | None, **rest: Any) -> Any:
        if prompt is not None and prompt_file is not None:
            raise click.UsageError("-p and -f both give a prompt; give one")
        check_text("-p", prompt or "")
        return function(prompt=prompt if prompt_file is None else _read(prompt_file), **rest)

    return _with(
        command,
        click.option("-p", "--prompt", help="The text to continue."),
        click.option("-f", "--file", "prompt_file", metavar="FILE", help="Read it (-: stdin)."),
    )


def check_text(what: str, text: str) -> None:
    """Refuse what is not UTF-8: Python has surrogates for it in arguments, and in standard input
    under locale C.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = len(text[: error.start].encode())
        raise FileError(f"{what} is not UTF-8: byte {at} is wrong") from None


def texts_options(function: Function) -> Function:
    """TEXT... and -f, handed over as `texts`; without either, the lines of stdin."""

    @functools.wraps(function)
    def command(texts: tuple[str, ...], texts_file: str | None, **rest: Any) -> Any:
        if texts and texts_file is not None:
            raise click.UsageError("texts are given, and -f; give one of the two")
        lines = list(texts) or _read(texts_file or "-").splitlines()
        found = [line for line in lines if line.strip()]
        for text in texts:
            check_text("a text", text)
        if not found:
            raise click.UsageError("no text is given: TEXT..., -f FILE, or lines on stdin")
        return function(texts=found, **rest)

    return _with(
        command,
        click.argument("texts", metavar="[TEXT]...", nargs=-1),
        click.option("-f", "--file", "texts_file", metavar="FILE",
                     help="A text a line (-: stdin)."),
    )  # fmt: skip


def _read(name: str) -> str:
    """The text of a file, without the line end an editor leaves at its end."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise FileError(f"cannot read prompt file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"prompt file {name} is not UTF-8: byte {error.start} is wrong") from None


def sampling_options(function: Function) -> Function:
    """-n, -s, --temp and the rest, handed over as `sampling`: keyword options of Model.stream."""

    @functools.wraps(function)
    def command(count: int, seed: int, logit_bias: tuple[str, ...], **rest: Any) -> Any:
        if count < -1:
            raise OptionError(f"-n {count} is out of range; valid: -1 (no limit), 0 or more")
        settings = {name: rest.pop(name) for name in _SETTINGS}
        settings["seed"] = secrets.randbits(32) if seed == -1 else seed
        settings["logit_bias"] = dict(_bias(item) for item in logit_bias)
        sampling_of(settings)  # what is out of range is said before a model is loaded
        others = {name: rest.pop(name) for name in ("stop", "ignore_eos")}
        most = None if count == -1 else count
        return function(sampling={**settings, **others, "max_new_tokens": most}, **rest)

    return _with(
        command,
        click.option("-n", "--n-predict", "count", type=int, metavar="N", default=-1,
                     show_default=True,
                     help="Most new tokens; -1: until the end token or the context."),
        click.option("-s", "--seed", type=int, metavar="N", default=-1, show_default=True,
                     help="-1: another one each time."),
        _number("--temp", "temperature", 0.8, "Temperature; 0: greedy."),
        click.option("--top-k", type=int, metavar="N", default=40, show_default=True,
                     help="Draw from the N most likely tokens; 0: off."),
        _number("--top-p", "top_p", 0.95, "Draw from the most likely X of probability; 1: off."),
        _number("--min-p", "min_p", 0.05, "Draw above X of the largest probability; 0: off."),
        _number("--repeat-penalty", "repetition", 1.0, "Against tokens that came; 1: off."),
        _number("--presence-penalty", "presence", 0.0, "The same, once for each; 0: off."),
        _number("--frequency-penalty", "frequency", 0.0, "The same, each time; 0: off."),
        click.option("--logit-bias", multiple=True, metavar="ID=BIAS",
                     help="Added to a token's logit; may be repeated."),
        click.option("--stop", multiple=True, metavar="TEXT",
                     help="Stop before TEXT; may be repeated."),
        click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
    )  # fmt: skip


def _number(flag: str, name: str, default: float, about: str) -> Function:
    return click.option(flag, name, type=float, metavar="X", default=default, show_default=True,
                        help=about)  # fmt: skip


_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency")


def _bias(item: str) -> tuple[int, float]:
    token, _, value = item.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise OptionError(f"--logit-bias {item!r} is not ID=BIAS, such as 42=-5") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def console(stderr: bool = False) -> Console:
    """Plain when piped or under NO_COLOR; lines keep their width when not on a terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 120, soft_wrap=True)


def measure_limits(model: Model) -> None:
    """Have the limits of the model's machine ready, and say so when that takes its time."""

    def heard(what: str) -> None:
        if what.startswith("round 1 "):
            click.echo("measuring the limits of this machine, once, some seconds ...", err=True)

    model.limits(heard)


def print_json(data: object) -> None:
    """What JSON cannot hold, an infinity or NaN, as null."""
    click.echo(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(data: object) -> object:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data
