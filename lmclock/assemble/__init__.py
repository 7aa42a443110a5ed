"""From a model's files to a program: one file per family, found by name through FAMILIES.

    model = assemble("folder-or-file")          # GGUF, or config.json and safetensors
    model.program, model.weights, model.config, model.notes

A family file gives `names(config)`, the Hugging Face name of every weight it uses, `HARMLESS`, a
pattern of tensors that may be ignored, and `build(config, builder, cache)`, which declares inputs,
appends the instructions of each section and returns the states. Nothing is decoded or copied: the
weights are views of the file.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmclock.assemble.blocks import Builder
from lmclock.assemble.weights import Stored, View
from lmclock.config import ModelConfig, from_gguf, from_hf
from lmclock.errors import FileError, OptionError, choices
from lmclock.files import GGUF, Reader, open_weights
from lmclock.files.mapping import map_file
from lmclock.program import CACHE_FORMATS, Program, Section
from lmclock.verify import verify

FAMILIES = {
    "llama": "Llama, Mistral, Mixtral, SmolLM2, Qwen2 and Qwen3, Qwen-MoE, Gemma, Phi-3, OLMo-2, "
    "Granite",
    "gpt": "GPT-2, StarCoder, GPT-NeoX (Pythia)",
}
MAX_CONFIG = 1 << 24


@dataclass(frozen=True, eq=False)
class Assembled:
    """A verified program at -O0 and what it was made of; `weights` maps each declared name that the
    program does not hold itself. The views stay valid when `reader` is closed.
    """

    program: Program
    weights: Mapping[str, View]
    config: ModelConfig
    reader: Reader
    notes: tuple[str, ...] = ()


def assemble(source: Reader | str | Path, cache: str = "f16") -> Assembled:
    """The program of a model's folder or file, keys and values cached in format `cache`.

    FileError for files that are damaged, incomplete or contradict themselves, UnsupportedError for
    models and options lmclock lacks.
    """
    if cache not in CACHE_FORMATS:
        raise OptionError(f"cache={cache!r} is unknown; valid: {choices(CACHE_FORMATS)}")
    reader = source if isinstance(source, Reader) else open_weights(source)
    config = read_config(reader)
    family = importlib.import_module(f"lmclock.assemble.{config.family}")
    stored = Stored(reader.tensors, family.names(config) if config.source == "hf" else None)
    builder = Builder(stored)
    states = family.build(config, builder, cache)
    notes = config.notes + stored.refuse_leftovers(family.HARMLESS, config.model)
    program = Program(
        family=config.family,
        name=title(config.name),
        inputs=tuple(builder.inputs),
        weights=tuple(builder.declared.values()),
        states=states,
        sections=tuple(Section(n, tuple(code)) for n, code in builder.sections.items()),
        context=config.context,
    )
    return Assembled(verify(program), builder.views, config, reader, notes)


def read_config(reader: Reader) -> ModelConfig:
    """The configuration in a GGUF file, or in the config.json beside safetensors files."""
    if isinstance(reader, GGUF):
        return from_gguf(reader.metadata, reader.tensors)
    path = reader.path.parent / "config.json"
    return from_hf(_json_object(path), _model_name(path.absolute().parent))


def _model_name(folder: Path) -> str:
    """The folder's name; ORG/NAME in a hub's cache, models--ORG--NAME/snapshots/REVISION."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; duplicate keys and NaN are refused."""
    if not path.exists():
        raise FileError(f"{path} is missing: safetensors alone do not say what model they are of")
    file = map_file(path)
    try:
        if file.size > MAX_CONFIG:
            raise FileError(f"{path} has {file.size} bytes; valid: at most {MAX_CONFIG}")
        text = bytes(file.data).decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}") from None
    finally:
        file.close()
    if not isinstance(found, dict):
        raise FileError(f"{path} holds no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def title(name: str) -> str:
    """`name` as a listing can hold it: one line without quotes and semicolons."""
    kept = re.sub(r"[^\w .,:+/()@-]", " ", name[:80])
    return " ".join(kept.split()) or "model"
