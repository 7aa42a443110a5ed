"""Fills the marked blocks of both READMEs with real output: `stat`, `disasm` and the peers' table.

    python -m tools.readme          runs the commands and writes README.md and README.zh-CN.md

A block stands between `<!-- name -->` and `<!-- /name -->`. The peers' table is copied from
docs/measurements.md, which bench/peers.py writes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
PROMPT = "The capital of France is"


def output(*arguments: str) -> str:
    """What an lmclock command prints."""
    command = [sys.executable, "-m", "lmclock", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def layer(listing: str) -> str:
    """The step section of a listing, comments dropped and blanks narrowed, to fit a page."""
    body = listing.split("section  step\n")[1]
    lines = (re.sub(r"(?<=\S) {2,}(?=\S)", "  ", line).rstrip() for line in body.splitlines())
    return "\n".join(["section  step", *(line for line in lines if line)])


def peers_table() -> str:
    """The first table of bench/peers.py: engines side by side."""
    text = (ROOT / "docs/measurements.md").read_text()
    block = re.search(r"<!-- peers -->(.*?)<!-- /peers -->", text, re.S)
    if not block:
        raise SystemExit("docs/measurements.md has no peers section: run `make bench` first")
    return next(part for part in block[1].split("\n\n") if part.startswith("|"))


def main() -> None:
    blocks = {
        "stat": f"```\n{output('stat', '-n', '64', '--temp', '0', '-p', PROMPT).rstrip()}\n```",
        "disasm": f"```\n{layer(output('disasm', '--no-comments'))}\n```",
        "peers": peers_table(),
    }
    for name in READMES:
        text = (ROOT / name).read_text()
        for mark, block in blocks.items():
            pattern = f"<!-- {mark} -->.*?<!-- /{mark} -->"
            filled = f"<!-- {mark} -->\n{block}\n<!-- /{mark} -->".replace("\\", r"\\")
            text = re.sub(pattern, filled, text, flags=re.S)
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    main()
