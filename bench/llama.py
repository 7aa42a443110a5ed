"""llama.cpp through the C interface of llama-cpp-python: one context, its forward passes only.

Where the processor has AMX it keeps weights in buffers of their own for it. A build by an older GCC
crashes with these (tile_config.h says why, and mends it), so they are tried in another process
first: `python -m bench.llama FILE`.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import llama_cpp as c
import numpy as np

# Silences the log; kept here because the library does not keep it alive.
_QUIET = c.llama_log_callback(lambda level, text, data: None)
SLOWER = (
    "llama.cpp crashes here with its own buffers for weights (AMX, repacking), so it runs without "
    "them, which is NOT its best: build it as `make bench` does"
)


@cache
def whole(path: str) -> bool:
    """Whether this build can run the file with all it has."""
    command = [sys.executable, "-m", "bench.llama", path]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Llama:
    """A model and a context for one sequence; keys and values in f16, as is its default."""

    def __init__(
        self, path: str, threads: int, flash: bool, context: int, batch: int, probe: bool = True
    ) -> None:
        c.llama_log_set(_QUIET, ctypes.c_void_p(0))
        c.llama_backend_init()
        loading = c.llama_model_default_params()
        loading.use_extra_bufts = not probe or whole(path)
        self.notes = [f"llama.cpp: {c.llama_print_system_info().decode().strip()}"]
        if not loading.use_extra_bufts:
            self.notes.append(SLOWER)
        self.model = c.llama_model_load_from_file(path.encode(), loading)
        assert self.model, f"llama.cpp cannot load {path}"
        options = c.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = batch
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = c.llama_init_from_model(self.model, options)
        assert self.context, "llama.cpp cannot make a context"
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forget every position, without touching the memory that held them."""
        c.llama_memory_clear(c.llama_get_memory(self.context), False)

    def decode(self, tokens: Any, count: int) -> None:
        """Go on with a ctypes array of ids; logits of the last one are computed."""
        done = c.llama_decode(self.context, c.llama_batch_get_one(tokens, count))
        assert done == 0, f"llama_decode returned {done}"
        c.llama_synchronize(self.context)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """(tokens, vocabulary) of a sequence of its own."""
        count = len(ids)
        batch = c.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.logits[n] = token, n, 1
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
        self.clear()
        done = c.llama_decode(self.context, batch)
        assert done == 0, f"llama_decode returned {done}"
        found = np.ctypeslib.as_array(c.llama_get_logits(self.context), (count, self.vocabulary))
        copy = found.copy()
        c.llama_batch_free(batch)
        return copy


if __name__ == "__main__":
    Llama(sys.argv[1], 1, False, 64, 32, probe=False).decode((ctypes.c_int32 * 32)(), 32)
