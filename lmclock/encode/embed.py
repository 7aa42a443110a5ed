"""Embeddings: one row for each text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmclock.encode import Encoder
from lmclock.text.segments import owned


def embed(encoder: Encoder, texts: Sequence[str], truncate: bool = False) -> np.ndarray:
    """(texts, width) float32, of length one each where the model says so.

    A text longer than the model takes is cut in overlapping segments, whose embeddings are averaged
    by how many tokens each stands for; `truncate` drops the rest of it instead.
    """
    encoder.need("embed")
    sentence = encoder.config.sentence
    prepared = [sentence.prompt + (text.lower() if sentence.lower else text) for text in texts]
    parts = [encoder.parts(text, whole=truncate) for text in prepared]
    rows = encoder.run([part.marked for text in parts for part in text])
    found = np.empty((len(texts), encoder.width), np.float32)
    at = 0
    for number, text in enumerate(parts):
        own = np.concatenate(rows[at : at + len(text)])
        at += len(text)
        if len(text) == 1:
            found[number] = own[0]
            continue
        weights = [end - first for first, end in owned([part.span for part in text])]
        joined = np.average(own.astype(np.float64), axis=0, weights=weights)
        if sentence.normalise:
            joined /= max(float(np.linalg.norm(joined)), 1e-12)
        found[number] = joined
    return found
