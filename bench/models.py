"""The demonstration model in the formats other engines take, each made here from the packaged file.

`requantised("Q4_0")` is llama.cpp's own quantiser at work on the packaged weights;
`ctranslate2_int8` and `onnx_int4` are the engines' own converters at work on the weights that
transformers reads from that file. Nothing is fetched. Results are kept in the user's cache folder,
so a converter runs once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from bench.common import MODEL, Skipped, transformers_model
from lmclock import settings
from lmclock.files.pull import pull

# llama.cpp's file types. F32 is the packaged file dequantised: the others are made from it.
TYPES = {
    "F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q4_K_M": 15, "Q6_K": 18,
}  # fmt: skip
PACKAGED = "Q4_1"


def folder() -> Path:
    """Where the files lie."""
    return settings.cache_folder() / "bench" / MODEL


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The path of `name`, made under another name first so that half a file is never found."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Workers of two engines may ask for the same one at the same time.
    with FileLock(path.with_name(f"{name}.lock")):
        if not path.exists():
            part = path.with_name(f"{os.getpid()}.{name}")
            try:
                make(part)
            except BaseException:
                if part.is_dir():
                    shutil.rmtree(part)
                part.unlink(missing_ok=True)
                raise
            part.replace(path)
    return path


def requantised(kind: str) -> Path:
    """A GGUF file of TYPES; the packaged one where that is what it is."""
    if kind == PACKAGED:
        return pull(MODEL)
    source = pull(MODEL) if kind == "F32" else requantised("F32")
    return _made(f"{kind}.gguf", lambda path: _quantise(source, path, kind))


def _quantise(source: Path, target: Path, kind: str) -> None:
    import llama_cpp as c

    from bench.llama import QUIET

    c.llama_log_set(QUIET, ctypes.c_void_p(0))
    c.llama_backend_init()
    options = c.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = TYPES[kind], True
    options.nthread = settings.threads()
    done = c.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if done:
        raise Skipped(f"llama.cpp's quantiser ended with {done} for {kind}")


def transformers_folder() -> Path:
    """A Hugging Face folder of the packaged weights in fp32, tokenizer included."""

    def make(path: Path) -> None:
        import transformers

        source = pull(MODEL)
        read = transformers_model(settings.threads(), "float32")
        # A model that came from a GGUF file refuses to be saved; one like it does not.
        config = type(read.config)(**{
            name: value for name, value in read.config.to_dict().items()
            if name != "quantization_config"
        })  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(source.parent), gguf_file=source.name
        )
        tokenizer.save_pretrained(path)

    return _made("transformers", make)


def ctranslate2_int8() -> Path:
    """ctranslate2's folder, weights in int8 by its own converter."""

    def make(path: Path) -> None:
        import ctranslate2

        converter = ctranslate2.converters.TransformersConverter(str(transformers_folder()))
        _or_skip("ctranslate2", lambda: converter.convert(str(path), quantization="int8"))

    return _made("ctranslate2-int8", make)


def onnx_int4() -> Path:
    """onnxruntime-genai's folder, weights in int4 for the CPU by its own model builder."""

    def make(path: Path) -> None:
        import onnxruntime_genai  # noqa: F401 - so that what is missing is named

        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e",
                   "cpu", "-m", str(transformers_folder()), "-o", str(path),
                   "-c", str(folder() / "onnx-work")]  # fmt: skip
        done = subprocess.run(builder, capture_output=True, text=True, check=False)
        if done.returncode or not (path / "genai_config.json").exists():
            raise Skipped(f"onnxruntime-genai's model builder failed: {_last_line(done.stderr)}")

    return _made("onnx-int4", make)


def _or_skip(name: str, work: Callable[[], object]) -> None:
    try:
        work()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Skipped(f"{name}'s converter failed: {_last_line(str(error))}") from error


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
