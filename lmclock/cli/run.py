"""`lmclock run`: continue a prompt, or chat.

With -p or -f the continuation, and nothing else, goes to stdout. Without, it is a chat: a line is
a turn, Ctrl-C stops a
reply, an empty line or Ctrl-D ends it; piped lines are turns too. After each reply the clock says
in one line how fast it was
and how near to the limit.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import click

from lmclock.cli import options
from lmclock.errors import LmclockError
from lmclock.model import Model, Reply, TextStream


@click.command("run", help="Continue a prompt (-p, -f), or chat with the model.")
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
    with loading.load() as model:
        if prompt is None:
            _chat(model, system, sampling)
            return
        turn = _messages([], system, prompt) if chat or system else prompt
        reply = _print(model.stream(turn, **sampling), quiet=as_json)
        if as_json:
            options.print_json(_as_dict(reply))


def _messages(history: list[dict[str, str]], system: str | None, text: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system and not history else []
    return [*first, *history, {"role": "user", "content": text}]


def _print(stream: TextStream, quiet: bool = False) -> Reply:
    """Write the pieces as they come. The first Ctrl-C ends the sequence between two cycles."""
    stopped = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, before)  # a second one is not ours

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in stream:
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
            if stopped:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return stream.reply


def _chat(model: Model, system: str | None, sampling: dict[str, Any]) -> None:
    """Turns until the input ends; a reply that cannot fit is an error of that turn only."""
    terminal = sys.stdin.isatty()
    errors = options.console(stderr=True)
    if terminal:
        errors.print("[dim]chat: Ctrl-C stops a reply, an empty line or Ctrl-D ends[/]")
    history: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            break
        if not line.strip():
            break
        messages = _messages(history, system, line.rstrip("\n"))
        try:
            reply = _print(model.stream(messages, **sampling))
        except LmclockError as error:
            if not terminal:
                raise
            errors.print(f"lmclock: {error}", style="red", highlight=False)
            continue
        history = [*messages, {"role": "assistant", "content": reply.text}]
        model.recorded.clear()
        errors.print(f"[dim]{reply.clock}[/]", highlight=False)


def _as_dict(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "tokens": list(reply.tokens),
        "finish": reply.finish,
        "prompt_tokens": reply.prompt_tokens,
        "clock": reply.clock.summary,
    }
