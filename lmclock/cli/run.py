"""`lmclock run`: continue a prompt, or chat.

With -p or -f the continuation, and nothing else, goes to stdout. Without, it is a chat: a line is
a turn, `/clear` forgets what was said, Ctrl-C stops a reply, `/exit` or Ctrl-D ends it; piped lines
are turns too. After each reply the clock says in one line how fast it was and how near to the
limit.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lmclock.cli import options
from lmclock.errors import LmclockError

if TYPE_CHECKING:
    from lmclock.model import Model, Reply, TextStream

INTERRUPTED = 130  # exit code, as shells have it


@click.command(
    "run",
    help="Continue a prompt (-p, -f), or chat with the model: Ctrl-C stops a reply, /clear starts "
    "afresh, /exit or Ctrl-D ends.",
)
@options.model_options
@options.prompt_options
@click.option("--chat", is_flag=True, help="With -p: one turn through the chat template.")
@click.option("-sys", "--system", help="System message of a chat.")
@options.sampling_options
@options.json_option
def command(
    loading: options.Loading,
    prompt: str | None,
    chat: bool,
    system: str | None,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    if as_json and prompt is None:
        raise click.UsageError("--json needs a prompt (-p or -f)")
    options.check_text("--system", system or "")
    with loading.load() as model:
        if prompt is None:
            _chat(model, system, sampling)
            return
        turn = _messages([], system, prompt) if chat or system else prompt
        reply = _print(model.stream(turn, **sampling), quiet=as_json)
        if as_json:
            options.measure_limits(model)
            options.print_json(_as_dict(reply, sampling))
        if reply.finish == "cancelled":
            raise click.exceptions.Exit(INTERRUPTED)


def _messages(history: list[dict[str, str]], system: str | None, text: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *history, {"role": "user", "content": text}]


def _print(stream: TextStream, quiet: bool = False) -> Reply:
    """Write the pieces as they come. The first Ctrl-C ends the sequence between two cycles."""

    def stop(number: int, frame: FrameType | None) -> None:
        stream.cancel()
        signal.signal(signal.SIGINT, before)  # a second one is not ours

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in stream:
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        signal.signal(signal.SIGINT, before)
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return stream.reply


def _chat(model: Model, system: str | None, sampling: dict[str, Any]) -> None:
    """Turns until the input ends; at a terminal an error ends its turn only."""
    terminal = sys.stdin.isatty()
    errors = options.console(stderr=True)
    if terminal:
        help = "Ctrl-C stops a reply; /clear starts afresh; /exit or Ctrl-D ends"
        errors.print(help, style="dim", highlight=False)
    history: list[dict[str, str]] = []
    for line in _turns(terminal):
        if line == "/clear":
            history = []
            continue
        messages = _messages(history, system, line)
        try:
            reply = _print(model.stream(messages, **sampling))
        except LmclockError as error:
            if not terminal:
                raise
            errors.print(f"lmclock: {error}", style="red", highlight=False, markup=False)
            continue
        answer = {"role": "assistant", "content": reply.text}
        history += [{"role": "user", "content": line}, answer]
        options.measure_limits(model)
        errors.print(str(reply.clock), style="dim", highlight=False, markup=False)


def _turns(terminal: bool) -> Iterator[str]:
    """The lines of the user that say something, until `/exit` or the end."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401, input() can then edit and recall lines
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return
        except UnicodeDecodeError as error:
            raise LmclockError(f"the input is not UTF-8: byte {error.start} is wrong") from None
        options.check_text("the input", line)
        if (not terminal and not line) or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _as_dict(reply: Reply, sampling: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": reply.text,
        "tokens": list(reply.tokens),
        "finish": reply.finish,
        "prompt_tokens": reply.prompt_tokens,
        "sampling": sampling,
        "clock": reply.clock.summary,
    }
