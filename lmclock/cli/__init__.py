"""The command line: `lmclock VERB`. One file per verb, loaded when it is called.

An error a user can cause is one sentence on stderr and exit code 1 (2 for wrong usage, as click
has it). When whoever reads the output has gone, the command ends quietly with 1, as click has it;
Ctrl-C exits with 130. A standard stream that was closed reads as empty and swallows what is
written.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from lmclock import settings
from lmclock.errors import LmclockError, choices

VERBS = {
    "run": "generate text, or chat",
    "stat": "where the time goes, like perf stat",
    "trace": "write a trace that Perfetto opens",
    "embed": "one vector for each text",
    "classify": "classes of texts, entities in them, answers to questions",
    "translate": "texts through a model with an encoder, by beam search",
    "disasm": "print a model as a program",
    "diff": "run two machines in lockstep and compare",
    "bench": "prefill and decode speed, in llama-bench's columns",
    "calibrate": "measure the limits of this machine",
    "pull": "fetch a model",
    "convert": "pytorch_model.bin to safetensors",
}


class _Verbs(click.Group):
    """Verbs listed from the table and imported only when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"lmclock.cli.{name}").command
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see __main__.py
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))
        with formatter.section("Environment"):
            formatter.write_dl(list(settings.VARIABLES.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from difflib import get_close_matches

            close = get_close_matches(args[0], VERBS, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise click.UsageError(
                f"there is no verb {args[0]!r}{hint}; valid: {choices(VERBS)}", ctx
            ) from None


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lmclock", prog_name="lmclock")
def group() -> None:
    """An LLM is a program: assemble it, clock it, step it, and make it faster."""


def main() -> None:
    """Run what the command line says, and exit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, until the end
    try:
        code = group.main(prog_name="lmclock", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        code = 130
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except LmclockError as error:
        click.echo(f"lmclock: {error}", err=True)
        code = 1
    except MemoryError:
        click.echo("lmclock: there is not enough memory for this", err=True)
        code = 1
    except OSError as error:
        if error.filename is not None:  # no output: something that should have had its own sentence
            raise
        click.echo(f"lmclock: cannot write the output: {error.strerror}", err=True)
        # What is left of it would fail again at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
