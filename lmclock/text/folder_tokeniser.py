"""A tokeniser from a Hugging Face folder: `tokenizer.json`, and the small files beside it. Older
folders have the vocabulary in other files (classic.py), those of word-level models too (words.py).

`tokenizer.json` holds the vocabulary and the pipeline; `tokenizer_config.json` and
`special_tokens_map.json` say which tokens begin and end a text, `generation_config.json` (or
`config.json`) which end a reply, `chat_template.jinja` or the config how turns are written. Nothing
else is opened, and no code of the folder is run. Special tokens are found in the text as written,
never in what a normaliser made of it.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lmclock.text.classic as classic
import lmclock.text.marian as marian
import lmclock.text.words as words
from lmclock.errors import FileError, UnsupportedError, choices
from lmclock.text.pipeline import (
    MODELS,
    build_model,
    build_pipelines,
    ids_around,
    pair_around,
    spelling_of,
)
from lmclock.text.specials import Special, Specials
from lmclock.text.tokeniser import Tokeniser
from lmclock.text.vocabulary import (
    MAX_TOKENS,
    Vocabulary,
    add_tokens,
    check_pieces,
    end_ids,
)

MAX_JSON_BYTES = 128 << 20
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def from_folder(folder: str | Path) -> Tokeniser:
    """The tokeniser of a model folder; FileError names the file and what is wrong with it."""
    folder = Path(folder)
    source = folder / "tokenizer.json"
    document = _read(source)
    config = _read(folder / "tokenizer_config.json") or {}
    config = {**(_read(folder / "special_tokens_map.json") or {}), **config}
    generation = _read(folder / "generation_config.json") or {}
    if generation.get("eos_token_id") is None:
        generation = _read(folder / "config.json") or {}
    if document is None:
        found = _from_pieces(folder, config, generation)
        if found is not None:
            return found
        source, document = _from_vocabulary(folder, config)
    jinja = _text(folder / "chat_template.jinja")
    if jinja is not None:
        config["chat_template"] = jinja
    try:
        return _build(document, config, generation)
    except (FileError, UnsupportedError) as error:
        raise type(error)(f"{source}: {error}") from None
    except RecursionError:
        raise FileError(f"{source} is nested too deeply") from None


def _from_vocabulary(folder: Path, config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file and what a tokenizer.json would say, for folders that have none."""
    path = folder / "vocab.txt"
    model = (_read(folder / "config.json") or {}).get("model_type")
    try:
        if model in words.MODEL_TYPES:
            text = _text(path)
            found = None if text is None else words.document(text, config)
        else:
            path = path if path.exists() else folder / "vocab.json"
            found = classic.document(
                lambda name: _text(folder / name), lambda name: _read(folder / name), config
            )
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    if found is None:
        raise FileError(f"{folder} has no tokenizer.json, {classic.FILES}, or {marian.FILES}")
    return path, found


def _from_pieces(
    folder: Path, config: dict[str, Any], generation: Mapping[str, Any]
) -> Tokeniser | None:
    """The tokeniser of a folder that has SentencePiece files only, None where it has none."""
    path = folder / "source.spm"
    try:
        found = marian.from_files(
            lambda name: _bytes(folder / name),
            lambda name: _read(folder / name),
            config,
            generation,
        )
        path = folder / "spiece.model"
        data = None if found else _bytes(path)
        return (
            found if data is None else _build(marian.t5_document(data, config), config, generation)
        )
    except (FileError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def _text(path: Path) -> str | None:
    """A text file, whole, None if there is none."""
    data = _bytes(path)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} cannot be read: {error}") from None


def _bytes(path: Path) -> bytes | None:
    """A file, whole, None if there is none; only regular files are opened."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FileError(f"{path} is not a regular file")
        if found.st_size > MAX_JSON_BYTES:
            raise FileError(f"{path} has {found.st_size} bytes; valid: at most {MAX_JSON_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error}") from None


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None if there is no such file."""
    text = _text(path)
    if text is None:
        return None
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} holds a {type(found).__name__}; valid: an object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys; a vocabulary with one would lose a token."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counted = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counted.items() if count > 1)
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return found


def _build(
    document: dict[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Tokeniser:
    added = [_added(entry) for entry in _list(document, "added_tokens")]
    special = {token.text: token for token, flags in added if flags["special"]}
    user = [(token, flags["normalized"]) for token, flags in added if not flags["special"]]
    model = _field(document, "model", dict)
    ids = _ids(model)
    for token, _ in added:
        if ids.setdefault(token.text, token.id) != token.id:
            raise FileError(f"{token.text!r:.60} is token {ids[token.text]} and {token.id}")
    pieces: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for piece, token_id in ids.items():
        if pieces[token_id] is not None:
            raise FileError(f"token {token_id} is {pieces[token_id]!r:.60} and {piece!r:.60}")
        pieces[token_id] = piece
    first, later = build_pipelines(document, build_model(model, ids, pieces, special.keys()))
    for tokenizer in {id(first): first, id(later): later}.values():
        add_tokens(tokenizer, user)
    names = {name: text for name in NAMED if (text := _name(config.get(name))) in ids}
    specials = Specials(special.values(), names)
    prefix, suffix = ids_around(first)
    if not {*prefix, *suffix} <= set(ids.values()):
        raise FileError(f"post_processor adds token ids {prefix} and {suffix} that do not exist")
    bos = names.get("bos_token")
    ends = [ids[names["eos_token"]]] if "eos_token" in names else []
    vocabulary = Vocabulary(
        pieces=pieces,
        verbatim=frozenset(token.id for token, _ in added),
        specials=specials,
        bos_id=ids[bos] if bos is not None else None,
        eos_ids=end_ids([*ends, *_ends(generation, len(pieces))], specials),
        prefix=prefix,
        suffix=suffix,
        pair=pair_around(first),
        chat_template=_chat_template(config.get("chat_template")),
        **spelling_of(document.get("decoder")),
    )
    return Tokeniser(vocabulary, first, later)


def _field(found: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = found.get(key)
    value = default if value is None else value
    if type(value) is not kind:
        raise FileError(f"{key} is {value!r:.60}; valid: {kind.__name__}")
    return value


def _list(found: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects, empty if missing."""
    entries = _field(found, key, list, [])
    if any(not isinstance(entry, dict) for entry in entries):
        raise FileError(f"{key} holds something that is not an object")
    return list(entries)


def _added(entry: dict[str, Any]) -> tuple[Special, dict[str, bool]]:
    """One entry of `added_tokens`."""
    flags = {flag: _field(entry, flag, bool, flag == "normalized") for flag in FLAGS}
    token, text = _field(entry, "id", int), _field(entry, "content", str)
    _check_id(text, token)
    return Special(token, text, flags["lstrip"], flags["rstrip"], flags["single_word"]), flags


def _check_id(piece: str, token: object) -> None:
    if type(token) is not int or not 0 <= token < MAX_TOKENS:
        raise FileError(f"token {piece!r:.60} has id {token!r}; valid: 0 to {MAX_TOKENS - 1}")


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Piece to id, from a vocabulary that is an object or a list of [piece, score] (Unigram)."""
    if model.get("type") not in MODELS:
        raise UnsupportedError(
            f"the model type {model.get('type')!r} is not supported; valid: {choices(MODELS)}"
        )
    if model["type"] != "Unigram":
        found = dict(_field(model, "vocab", dict))
        check_pieces([*found])
        wrong = {int} != set(map(type, found.values())) or min(found.values()) < 0
        if wrong or max(found.values()) >= MAX_TOKENS:
            for piece, token in found.items():
                _check_id(piece, token)
        return found
    entries = _field(model, "vocab", list)
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and type(entry[1]) in (float, int)):
            raise FileError(f"vocab holds {entry!r:.60}; valid: [piece, score]")
    pieces = [piece for piece, _ in entries]
    check_pieces(pieces)
    found = {piece: at for at, piece in enumerate(pieces)}
    if len(found) != len(pieces):
        raise FileError("the vocabulary holds a piece twice")
    return found


def _chat_template(found: object) -> str | None:
    """The template, or the one called `default` of several."""
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise FileError(f"chat_template is {found!r:.60}; valid: text")
    return found or None


def _name(found: object) -> str:
    """A special token's text: given as it stands, or as an object with its flags."""
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else ""


def _ends(generation: Mapping[str, Any], size: int) -> list[int]:
    """`eos_token_id`: one id or a list of them."""
    found = generation.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    for token in ends:
        if type(token) is not int or not 0 <= token < size:
            raise FileError(f"eos_token_id holds {token!r:.60}; valid: 0 to {size - 1}")
    return ends
