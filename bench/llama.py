"""llama.cpp through the C interface of llama-cpp-python: contexts of a model, forward passes only.

Where the processor has AMX it keeps weights in buffers of their own for it. A build by an older GCC
crashes with these (tile_config.h says why, and mends it), so they are tried in another process
first: `python -m bench.llama FILE`.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp as c
import numpy as np

# Silences the log; kept here because the library does not keep it alive.
QUIET = c.llama_log_callback(lambda level, text, data: None)
SLOWER = (
    "llama.cpp crashes here with its own buffers for weights (AMX, repacking), so it runs without "
    "them, which is NOT its best: build it as `make bench` does"
)
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
UBATCH = 512  # rows of one pass, llama.cpp's default and its best for long prompts


@cache
def whole(path: str) -> bool:
    """Whether this build can run the file with all it has."""
    command = [sys.executable, "-m", "bench.llama", path]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Weights:
    """A model, shared by contexts."""

    def __init__(self, path: str, probe: bool = True) -> None:
        c.llama_log_set(QUIET, ctypes.c_void_p(0))
        c.llama_backend_init()
        loading = c.llama_model_default_params()
        loading.use_extra_bufts = not probe or whole(path)
        self.notes = [f"llama.cpp: {c.llama_print_system_info().decode().strip()}"]
        if not loading.use_extra_bufts:
            self.notes.append(SLOWER)
        self.model = c.llama_model_load_from_file(path.encode(), loading)
        assert self.model, f"llama.cpp cannot load {path}"
        self.vocabulary: int = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))


class Llama:
    """A context of some weights (or of a file's); keys and values in f16, as is its default."""

    def __init__(
        self, source: str | Weights, threads: int, flash: bool, context: int, batch: int,
        cache: str = "f16", sequences: int = 1, probe: bool = True, shared: bool = False,
    ) -> None:  # fmt: skip
        """`shared`: sequences share the positions of one, so that they can be joined."""
        weights = Weights(source, probe) if isinstance(source, str) else source
        self.notes, self.vocabulary, self.weights = weights.notes, weights.vocabulary, weights
        self.flash = flash
        options = c.llama_context_default_params()
        options.n_ctx, options.n_seq_max = context * (1 if shared else sequences), sequences
        options.kv_unified = shared
        options.n_batch, options.n_ubatch = batch, min(batch, UBATCH)
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = CACHE_TYPES[cache]
        options.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = c.llama_init_from_model(weights.model, options)
        assert self.context, "llama.cpp cannot make a context"

    def clear(self) -> None:
        """Forget every position, without touching the memory that held them."""
        c.llama_memory_clear(c.llama_get_memory(self.context), False)

    def keep(self, positions: int) -> None:
        """Forget all but the first positions of the only sequence."""
        c.llama_memory_seq_rm(c.llama_get_memory(self.context), 0, positions, -1)

    def decode(self, tokens: Any, count: int) -> None:
        """Go on with a ctypes array of ids; logits of the last one are computed."""
        self._run(c.llama_batch_get_one(tokens, count))
        c.llama_synchronize(self.context)

    def one_by_one(self, tokens: Iterable[Any]) -> None:
        """Go on with ctypes arrays of one id each, a call for every one."""
        for token in tokens:
            self.decode(token, 1)

    def prompt(self, ids: Sequence[int], at_once: int) -> None:
        """Go on with many ids, so many in a call."""
        for first in range(0, len(ids), at_once):
            some = ids[first : first + at_once]
            self.decode((ctypes.c_int32 * len(some))(*some), len(some))

    def repeat(self, ids: Sequence[int], positions: int) -> None:
        """Put so many positions into the cache of sequence 0, of which only `ids` are computed: the
        rest are copies of them further on, which take as long to read. Needs `shared` sequences.
        """
        memory, size = c.llama_get_memory(self.context), len(ids)
        self.prompt(ids, size)
        data = (ctypes.c_uint8 * c.llama_state_seq_get_size(self.context, 0))()
        c.llama_state_seq_get_data(self.context, data, len(data), 0)
        for number, first in enumerate(range(size, positions, size), 1):
            assert c.llama_state_seq_set_data(self.context, data, len(data), number)
            c.llama_memory_seq_rm(memory, number, positions - first, -1)
            c.llama_memory_seq_add(memory, number, 0, -1, first)
            c.llama_memory_seq_cp(memory, number, 0, -1, -1)

    def steps(self, ids: Sequence[Sequence[int]], first: int) -> None:
        """One token of each sequence in every call: `ids` (calls, sequences), from position
        `first` on.
        """
        count = len(ids[0])
        batch = c.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for position, tokens in enumerate(ids, first):
            for n, token in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.logits[n] = token, position, 1
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, n
            self._run(batch)
            c.llama_synchronize(self.context)
        c.llama_batch_free(batch)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(tokens, vocabulary) of a sequence of its own."""
        count = len(ids)
        batch = c.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.logits[n] = token, n, 1
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
        self.clear()
        self._run(batch)
        found = np.ctypeslib.as_array(c.llama_get_logits(self.context), (count, self.vocabulary))
        copy = found.copy()
        c.llama_batch_free(batch)
        return copy

    def save_state(self, path: Path) -> None:
        """Keep the cache of the only sequence in a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        c.llama_state_seq_save_file(self.context, str(path).encode(), 0, None, 0)

    def load_state(self, path: Path) -> bool:
        """Take the cache of the only sequence from a file; False if there is none that fits."""
        found, none = ctypes.c_size_t(), (ctypes.c_int32 * 1)()
        return path.exists() and bool(
            c.llama_state_seq_load_file(
                self.context, str(path).encode(), 0, none, 1, ctypes.byref(found)
            )
        )

    def free(self) -> None:
        """Free the context; its weights stay."""
        c.llama_free(self.context)

    def close(self) -> None:
        """Free the context and its weights."""
        self.free()
        c.llama_model_free(self.weights.model)

    def _run(self, batch: Any) -> None:
        done = c.llama_decode(self.context, batch)
        assert done == 0, f"llama_decode returned {done}"


if __name__ == "__main__":
    Llama(sys.argv[1], 1, False, 64, 32, probe=False).decode((ctypes.c_int32 * 32)(), 32)
