"""Long texts in overlapping segments, and one result of theirs.

    parts = cut(1000, size=254, overlap=32)      # (first, end) of each segment, in tokens
    owned(parts)                                 # which of its tokens each segment decides

A token near the edge of a segment lacks the words behind the edge; of two segments that hold it,
the one in which it stands further from the edge decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lmclock.errors import OptionError

Span = tuple[int, int]  # first, end


def cut(count: int, size: int, overlap: int | None = None) -> list[Span]:
    """Spans of `size` tokens that cover `count`, as few as there can be, evenly spread, neighbours
    at least `overlap` (an eighth of the size if not given) in common; one span where all fits.
    """
    overlap = size // 8 if overlap is None else overlap
    if size < 1 or not 0 <= overlap < size:
        raise OptionError(f"segments of {size} tokens cannot overlap by {overlap}")
    if count <= size:
        return [(0, count)]
    steps = -(-(count - size) // (size - overlap))
    firsts = [(count - size) * step // steps for step in range(steps + 1)]
    return [(first, first + size) for first in firsts]


def owned(parts: Sequence[Span]) -> list[Span]:
    """The tokens each of `cut`'s spans decides: borders lie in the middle of what two share."""
    borders = [(end + first) // 2 for (_, end), (first, _) in pairwise(parts)]
    return list(zip([parts[0][0], *borders], [*borders, parts[-1][1]], strict=True))
