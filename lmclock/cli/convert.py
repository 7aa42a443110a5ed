"""`lmclock convert`: PyTorch's pytorch_model.bin to safetensors, in a new folder."""

from __future__ import annotations

from pathlib import Path

import click

from lmclock.cli import options
from lmclock.files.convert import convert


@click.command(
    "convert",
    help="Write a new folder with the weights of pytorch_model.bin (one file, or shards) as "
    "safetensors and a copy of every other file. PyTorch reads the pickle with weights_only: what "
    "holds more than tensors is refused.",
)
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", metavar="DST",
              help="The new folder; SRC-safetensors if not given.")  # fmt: skip
@options.json_option
def command(source: str, output: str | None, as_json: bool) -> None:
    folder = Path(source).absolute()
    folder = folder if folder.is_dir() else folder.parent
    done = convert(source, output or f"{folder}-safetensors")
    if as_json:
        options.print_json(
            {"folder": str(done.folder), "files": done.files, "tensors": done.tensors,
             "bytes": done.bytes, "notes": done.notes}
        )  # fmt: skip
        return
    for note in done.notes:
        click.echo(f"lmclock: {note}", err=True)
    click.echo(f"{done.folder}: {done.files} files, {done.tensors} tensors, {done.bytes:,} bytes")
