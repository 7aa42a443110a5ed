"""From a model's files to a program: one file per family, found by name through FAMILIES.

    model = assemble("folder-or-file")          # GGUF, or config.json and safetensors
    model.program, model.weights, model.config, model.notes

A family file gives `names(config)`, the Hugging Face name of every weight it uses, `HARMLESS`, a
pattern of tensors that may be ignored, and `build(config, builder, cache)`, which declares inputs,
appends the instructions of each section and returns the states; `prefix(config)`, if it is there,
is what may stand before those names. Nothing is decoded or copied: the
weights are views of the file.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
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
    "bert": "BERT, MiniLM, RoBERTa, XLM-RoBERTa and DistilBERT",
    "lstm": "LSTM language model and classifier, as torch.nn computes them",
    "mlp": "feed-forward net",
    "seq2seq": "the classic encoder-decoder Transformer, Marian, BART and mBART",
    "t5": "T5, its version 1.1, flan-T5 and mT5",
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


def assemble(
    source: Reader | str | Path,
    cache: str = "f16",
    change: Callable[[ModelConfig], ModelConfig] | None = None,
    checked: bool = True,
) -> Assembled:
    """The program of a model's folder or file, keys and values cached in format `cache`; `change`
    may put in what the files leave open. Not `checked`: the program is still to be verified, as
    `optimise` does with what it makes of it.

    FileError for files that are damaged, incomplete or contradict themselves, UnsupportedError for
    models and options lmclock lacks.
    """
    if cache not in CACHE_FORMATS:
        raise OptionError(f"cache={cache!r} is unknown; valid: {choices(CACHE_FORMATS)}")
    reader = source if isinstance(source, Reader) else open_weights(source)
    config = read_config(reader)
    if change is not None:
        config = change(config)
    family = importlib.import_module(f"lmclock.assemble.{config.family}")
    before = family.prefix(config) if hasattr(family, "prefix") else ""
    names = family.names(config) if config.source == "hf" else None
    stored = Stored(reader.tensors, names, before)
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
    return Assembled(verify(program) if checked else program, builder.views, config, reader, notes)


def read_config(reader: Reader) -> ModelConfig:
    """The configuration in a GGUF file, or in the config.json beside safetensors files."""
    if isinstance(reader, GGUF):
        return from_gguf(reader.metadata, reader.tensors)
    folder = reader.path.parent
    data = _json(folder / "config.json")
    if not isinstance(data, dict):
        what = "is missing" if data is None else "holds no JSON object"
        path = folder / "config.json"
        raise FileError(f"{path} {what}: safetensors alone do not say what model they are of")
    return from_hf(data, _model_name(folder.absolute()), lambda name: _json(folder / name))


def _model_name(folder: Path) -> str:
    """The folder's name; ORG/NAME in a hub's cache, models--ORG--NAME/snapshots/REVISION."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _json(path: Path) -> Any:
    """What a JSON file holds, None where there is none; duplicate keys and NaN are refused."""
    if not path.exists():
        return None
    file = map_file(path)
    try:
        if file.size > MAX_CONFIG:
            raise FileError(f"{path} has {file.size} bytes; valid: at most {MAX_CONFIG}")
        text = bytes(file.data).decode()
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}") from None
    finally:
        file.close()


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
