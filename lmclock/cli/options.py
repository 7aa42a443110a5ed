"""Options that several verbs share, declared once, with llama.cpp's short names."""

from __future__ import annotations

import functools
import json
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from lmclock.assemble import Assembled, assemble
from lmclock.errors import FileError, OptionError
from lmclock.files.pull import pull
from lmclock.machines import MACHINES
from lmclock.model import Model, load
from lmclock.passes import optimise
from lmclock.program import CACHE_FORMATS, Program

DEFAULT_MODEL = "smollm2"
DEFAULT_PROMPT = "The clock of a processor is"
Function = Callable[..., Any]


@dataclass(frozen=True)
class Loading:
    """Which model, and how to load it, as the command line says."""

    name: str
    level: int
    cache: str
    machine: str = "native"
    threads: int | None = None
    context: int = 0
    chunk: int = 512

    def load(self, **changes: Any) -> Model:
        """The model on its machine; `changes` are further options of lmclock.model.load."""
        return load(
            self.name, machine=self.machine, level=self.level, threads=self.threads,
            context=self.context, chunk=self.chunk, cache=self.cache, **changes,
        )  # fmt: skip

    def program(self) -> tuple[Assembled, Program]:
        """What the model's files say, and its optimised program; no machine is needed."""
        assembled = assemble(pull(self.name), self.cache)
        return assembled, optimise(assembled.program, self.level)


def _with(function: Function, *given: Function) -> Function:
    for option in reversed(given):
        function = option(function)
    return function


def program_options(function: Function) -> Function:
    """MODEL, -m, -O, --precise and -ctk, handed over as one `loading`."""

    @functools.wraps(function)
    def command(
        model_argument: str | None, model_option: str | None, level: int | None, precise: bool,
        cache: str, **rest: Any,
    ) -> Any:  # fmt: skip
        if model_argument and model_option and model_argument != model_option:
            two = f"{model_argument!r} and {model_option!r}"
            raise click.UsageError(f"two models are named, {two}; give one")
        if precise and level == 2:
            raise click.UsageError("--precise goes with -O0 or -O1, not -O2")
        chosen = level if level is not None else 1 if precise else 2
        loading = Loading(model_argument or model_option or DEFAULT_MODEL, chosen, cache)
        return function(loading=loading, **rest)

    return _with(
        command,
        click.argument("model_argument", metavar="[MODEL]", required=False),
        click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL."),
        click.option(
            "-O", "--level", type=click.IntRange(0, 2), default=None,
            help="0 as assembled, 1 fused, 2 fused and activations rounded (default).",
        ),
        click.option("--precise", is_flag=True, help="Keep activations in f32 (same as -O1)."),
        click.option(
            "-ctk", "--cache-type", "cache", default="f16", show_default=True,
            type=click.Choice(CACHE_FORMATS), help="Number format of keys and values.",
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
        loading: Loading, machine: str, threads: int | None, context: int, chunk: int, **rest: Any
    ) -> Any:
        whole = replace(loading, machine=machine, threads=threads, context=context, chunk=chunk)
        return function(loading=whole, **rest)

    return program_options(
        _with(
            command,
            machine_option,
            click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads."),
            click.option(
                "-c", "--ctx-size", "context", type=click.IntRange(0), default=0,
                help="Most positions of a sequence; 0: from the model, at most 8192.",
            ),
            click.option(
                "-b", "--batch-size", "chunk", type=click.IntRange(1), default=512,
                show_default=True, help="Most prompt tokens in one cycle.",
            ),
        )
    )  # fmt: skip


def prompt_options(function: Function) -> Function:
    """-p and -f, handed over as one `prompt` (None when neither is given)."""

    @functools.wraps(function)
    def command(prompt: str | None, prompt_file: str | None, **rest: Any) -> Any:
        if prompt is not None and prompt_file is not None:
            raise click.UsageError("-p and -f both give a prompt; give one")
        return function(prompt=prompt if prompt_file is None else _read(prompt_file), **rest)

    return _with(
        command,
        click.option("-p", "--prompt", help="The text to continue."),
        click.option("-f", "--file", "prompt_file", metavar="FILE", help="Read it (-: stdin)."),
    )


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read prompt file {name}: {error}") from None


def sampling_options(function: Function) -> Function:
    """-n, -s, --temp and the rest, handed over as `sampling`: keyword options of Model.stream."""

    @functools.wraps(function)
    def command(count: int, seed: int, logit_bias: tuple[str, ...], **rest: Any) -> Any:
        if count < -1:
            raise OptionError(f"-n {count} is out of range; valid: -1 (no limit), 0 or more")
        sampling = {name: rest.pop(name) for name in _SAMPLING}
        sampling["max_new_tokens"] = None if count == -1 else count
        sampling["seed"] = secrets.randbits(32) if seed == -1 else seed
        sampling["logit_bias"] = dict(_bias(item) for item in logit_bias)
        return function(sampling=sampling, **rest)

    return _with(
        command,
        click.option("-n", "--n-predict", "count", type=int, default=-1, show_default=True,
                     help="Most new tokens; -1: until the end token or the context."),
        click.option("-s", "--seed", type=int, default=-1, help="-1: another one each time."),
        click.option("--temp", "temperature", type=float, default=0.8, show_default=True,
                     help="0: greedy."),
        click.option("--top-k", type=int, default=40, show_default=True, help="0: off."),
        click.option("--top-p", type=float, default=0.95, show_default=True, help="1: off."),
        click.option("--min-p", type=float, default=0.05, show_default=True, help="0: off."),
        click.option("--repeat-penalty", "repetition", type=float, default=1.0, show_default=True),
        click.option("--presence-penalty", "presence", type=float, default=0.0, show_default=True),
        click.option("--frequency-penalty", "frequency", type=float, default=0.0,
                     show_default=True),
        click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="May be repeated."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before TEXT."),
        click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
    )  # fmt: skip


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency",
             "stop", "ignore_eos")  # fmt: skip


def _bias(item: str) -> tuple[int, float]:
    token, _, value = item.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise OptionError(f"--logit-bias {item!r} is not ID=BIAS, such as 42=-5") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def console(stderr: bool = False) -> Console:
    """Plain when piped or under NO_COLOR; tables keep their width when not on a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 120, soft_wrap=True)


def print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))
