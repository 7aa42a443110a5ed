"""Pages that name what the code has: docs/families.md is held to the tables."""

from __future__ import annotations

import re
from pathlib import Path

from lmclock.assemble import FAMILIES
from lmclock.config import GGUF_TYPES, HF_TYPES
from lmclock.config.mlp import ACTIVATIONS
from lmclock.config.recurrent import POOLINGS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "families.md").read_text()


def rows() -> list[list[str]]:
    """The cells of every table row."""
    return [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]


def quoted(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_every_family_and_type_has_its_place() -> None:
    listed = [row for row in rows() if quoted(row[0]) & FAMILIES.keys() and len(row) > 2]
    families = {name for row in listed for name in quoted(row[0])}
    types = {name for row in listed for name in quoted(row[1])}
    assert families == set(FAMILIES)
    assert set(HF_TYPES) <= types
    architectures = {name for row in listed if len(row) == 4 for name in quoted(row[2])}
    assert architectures == set(GGUF_TYPES)


def test_options_of_our_own_folders_are_listed() -> None:
    for name in (*POOLINGS, *ACTIVATIONS):
        assert re.search(rf"\b{name}\b", PAGE), name


def test_the_shortest_family_is_shown_as_it_is() -> None:
    shown = re.search(r"<!-- mlp -->\n```python\n(.*?)```\n<!-- /mlp -->", PAGE, re.DOTALL)
    assert shown and shown[1] == (ROOT / "lmclock" / "assemble" / "mlp.py").read_text()
    sizes = {p: len(p.read_text().splitlines()) for p in (ROOT / "lmclock/assemble").glob("*.py")}
    family_files = {p: n for p, n in sizes.items() if p.stem in FAMILIES}
    assert min(family_files, key=family_files.__getitem__).stem == "mlp"


def test_links_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
               for line in PAGE.splitlines() if line.startswith("#")}  # fmt: skip
    for target in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert target in anchors, (target, anchors)
    for path in re.findall(r"`((?:tests|lmclock)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists(), path
