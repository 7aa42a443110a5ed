"""Which page of the cache holds which positions of which sequence; the machine owns the bytes.

A `Cache` hands each sequence a `Held`: a slot (fixed states), a page table shared by all paged
states, and one shared by all frozen states, so page 7 of one paged state and page 7 of another
hold the same positions of the same sequence.

    held = cache.open(tokens)           # a slot, pages for every token, cached prefix shared
    cache.reserve(held, length)         # pages for positions up to `length`, writable
    cache.commit(held, tokens, length)  # the machine has written them; full pages become reusable
    cache.fork(held), cache.truncate(held, length), cache.close(held)
    cache.take_copies()                 # what Machine.copy must do before the next run, in order

A fork shares every page; whoever first writes into a shared, partly filled page gets a copy.
Pages of a closed sequence stay, least recently used first out, until their room is needed; a page
is found again by a SHA-256 chain over the salt and all token ids up to its end. Calls that need
room return None or False, with nothing changed, when there is none: what to give up is the
scheduler's choice.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

import numpy as np

from lmclock.errors import UnsupportedError, choices

Copy = tuple[Literal["paged", "fixed"], int, int]  # kind of state, from, to: a page or a slot


class Pool:
    """Pages 0..size-1: free, referenced by sequences, or idle (unreferenced, kept for reuse)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = list(range(size - 1, -1, -1))
        self.references = [0] * size
        self.idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.key_of: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}

    @property
    def room(self) -> int:
        """Pages that `take` can give, idle ones included."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page of one reference; the least recently used idle one when none is free."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            self.forget(page)
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference."""
        if self.references[page] == 0:
            del self.idle[page]
        self.references[page] += 1

    def release(self, page: int) -> None:
        """One reference less; the last one frees the page, or leaves it idle if it has a key."""
        self.references[page] -= 1
        if self.references[page] == 0:
            if page in self.key_of:
                self.idle[page] = None
            else:
                self.free.append(page)

    def register(self, page: int, key: bytes) -> None:
        """Make the page findable, unless another one already holds the same."""
        if key not in self.page_of:
            self.page_of[key] = page
            self.key_of[page] = key

    def forget(self, page: int) -> None:
        """The page no longer holds what its key says."""
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.page_of[key]

    def check(self, tables: list[list[int]]) -> None:
        """Every page is in exactly one place, and references are what the tables hold."""
        held = Counter(page for table in tables for page in table)
        assert all(held[page] == count for page, count in enumerate(self.references))
        places = [*self.free, *self.idle, *held]
        assert sorted(places) == list(range(self.size)), "a page is lost or in two places"
        assert {key: page for page, key in self.key_of.items()} == self.page_of
        assert set(self.idle) <= set(self.key_of) and not set(self.free) & set(self.key_of)


def _no_pages() -> np.ndarray:
    return np.empty(0, np.int32)


@dataclass(eq=False, slots=True)
class Held:
    """One sequence's share. `length` positions are written; up to `ready` may be written now."""

    slot: int
    salt: bytes = b""
    length: int = 0
    ready: int = 0
    pages: list[int] = field(default_factory=list)
    # `pages` as int32: replaced, never changed, because the batches of past cycles keep it
    table: np.ndarray = field(default_factory=_no_pages)
    keys: list[bytes] = field(default_factory=list)  # of the full pages, as far as committed
    source: list[int] = field(default_factory=list)
    source_table: np.ndarray = field(default_factory=_no_pages)
    source_length: int = 0
    snapshots: dict[int, int] = field(default_factory=dict)  # length -> slot


class Cache:
    """`pages` and `source_pages` are the pages of the paged and of the frozen states; `fixed` says
    that some state lives in slots, `reuse` that pages of equal prefixes may be shared.
    """

    def __init__(
        self,
        slots: int,
        page_size: int,
        pages: int | None = None,
        source_pages: int | None = None,
        *,
        fixed: bool = False,
        reuse: bool = True,
    ) -> None:
        self.page_size = page_size
        self.slots = slots
        self.paged = pages is not None
        self.fixed = fixed
        self.reuse = reuse and self.paged and not fixed
        self.pool = Pool(pages or 0)
        self.sources = Pool(source_pages or 0)
        self.frozen = source_pages is not None
        self.free_slots = list(range(slots - 1, -1, -1))
        self.open_sequences: dict[int, Held] = {}  # by slot
        self._copies: list[Copy] = []

    @property
    def room(self) -> int:
        """Pages of the paged states that can still be handed out, idle ones included."""
        return self.pool.room

    @property
    def positions(self) -> int | None:
        """Most positions one sequence can hold; None without paged states."""
        return self.pool.size * self.page_size if self.paged else None

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.page_size)

    def open(
        self,
        tokens: Sequence[int],
        *,
        source: int = 0,
        salt: bytes = b"",
        reuse: bool = True,
        spare: int = 0,
    ) -> Held | None:
        """A new sequence with pages for all its tokens and `source` encoder rows.

        Its `length` is how many leading positions were found in the cache: full pages only, and
        never the last token, whose row must be computed. None, and nothing changed, when there is
        no slot, or fewer than `spare` pages would be left.
        """
        found = self._find(tokens, salt) if reuse and self.reuse else []
        need = self.pages_for(len(tokens)) - len(found) if self.paged else 0
        waking = sum(self.pool.references[page] == 0 for page, _ in found)
        need_source = self.pages_for(source) if self.frozen else 0
        short = self.paged and self.pool.room < need + waking + spare
        if not self.free_slots or short or self.sources.room < need_source:
            return None
        for page, _ in found:
            self.pool.share(page)
        length = len(found) * self.page_size
        held = Held(self.free_slots.pop(), salt, length, length)
        held.pages = [page for page, _ in found]
        held.keys = [key for _, key in found]
        held.source = [self.sources.take() for _ in range(need_source)]
        held.source_table = np.array(held.source, np.int32)
        held.source_length = source
        self.open_sequences[held.slot] = held
        enough = self.reserve(held, len(tokens))
        assert enough
        return held

    def reserve(self, held: Held, length: int) -> bool:
        """Make positions up to `length` writable: pages for all of them, the first one private.

        False, and nothing changed, when there is too little room.
        """
        if held.ready >= length:
            return True
        if self.paged:
            first = held.length // self.page_size
            there = first < len(held.pages)
            shared = there and self.pool.references[held.pages[first]] > 1
            new = self.pages_for(length) - len(held.pages)
            if new + shared > self.pool.room:
                return False
            if shared:
                page = self.pool.take()
                self._copies.append(("paged", held.pages[first], page))
                self.pool.release(held.pages[first])
                held.pages[first] = page
            elif there:
                self.pool.forget(held.pages[first])
            held.pages += [self.pool.take() for _ in range(new)]
            held.table = np.array(held.pages, np.int32)
        held.ready = len(held.pages) * self.page_size if self.paged else sys.maxsize
        return True

    def commit(self, held: Held, tokens: Sequence[int], length: int) -> None:
        """The machine has written positions up to `length`, which hold `tokens[:length]`."""
        assert held.length <= length <= held.ready
        held.length = length
        if not self.reuse:
            return
        for index in range(len(held.keys), length // self.page_size):
            key = self._key(held.keys[-1] if held.keys else None, held.salt, tokens, index)
            held.keys.append(key)
            self.pool.register(held.pages[index], key)

    def fork(self, held: Held) -> Held | None:
        """A second sequence of the same content; nothing but fixed states is copied. None without
        a free slot.
        """
        if not self.free_slots:
            return None
        slot = self.free_slots.pop()
        child = Held(slot, held.salt, held.length, held.length)
        child.pages = held.pages[: self.pages_for(held.length)]
        child.table = np.array(child.pages, np.int32)
        child.keys = list(held.keys)
        child.source, child.source_table = list(held.source), held.source_table
        child.source_length = held.source_length
        for page in child.pages:
            self.pool.share(page)
        for page in child.source:
            self.sources.share(page)
        held.ready = held.length  # a partly filled page is shared now
        if self.fixed:
            self._copies.append(("fixed", held.slot, slot))
        self.open_sequences[slot] = child
        return child

    def reorder(self, line: Sequence[Held], parents: Sequence[int]) -> None:
        """Each sequence of a line of equal length becomes what `line[parents[k]]` was: pages are
        shared, and one that has a single heir is handed on as it is. For paged states only.
        """
        assert not self.fixed
        pages, keys = [held.pages for held in line], [held.keys for held in line]
        ready = [held.ready for held in line]
        for parent in parents:
            for page in pages[parent]:
                self.pool.share(page)
        for old in pages:
            for page in reversed(old):
                self.pool.release(page)
        for held, parent in zip(line, parents, strict=True):
            held.pages, held.keys = list(pages[parent]), list(keys[parent])
            held.table = np.array(held.pages, np.int32)
            alone = parents.count(parent) == 1
            held.ready = ready[parent] if alone else held.length

    def snapshot(self, held: Held) -> bool:
        """Keep the fixed states as they are now, so that `truncate` can come back to this length.

        Takes a slot; False without a free one.
        """
        if not self.fixed or held.length in held.snapshots:
            return True
        if not self.free_slots:
            return False
        slot = self.free_slots.pop()
        self._copies.append(("fixed", held.slot, slot))
        held.snapshots[held.length] = slot
        return True

    def truncate(self, held: Held, length: int) -> None:
        """Forget positions from `length` on. With fixed states only to the length of a snapshot,
        otherwise UnsupportedError.
        """
        assert 0 <= length <= held.length
        if length == held.length:
            return
        if self.fixed:
            if length not in held.snapshots:
                valid = choices(sorted({*held.snapshots, held.length}))
                raise UnsupportedError(
                    f"a recurrent state cannot go back to length {length} without a snapshot; "
                    f"valid: {valid}"
                )
            self._copies.append(("fixed", held.snapshots[length], held.slot))
            for later in [at for at in held.snapshots if at > length]:
                self.free_slots.append(held.snapshots.pop(later))
        held.length = held.ready = length
        del held.keys[length // self.page_size :]
        kept = self.pages_for(length)
        for page in reversed(held.pages[kept:]):
            self.pool.release(page)
        del held.pages[kept:]
        held.table = np.array(held.pages, np.int32)

    def close(self, held: Held) -> None:
        """Give everything back. The last pages become idle first, hence are the first to go."""
        for page in reversed(held.pages):
            self.pool.release(page)
        for page in held.source:
            self.sources.release(page)
        del self.open_sequences[held.slot]
        self.free_slots += [*held.snapshots.values(), held.slot]

    def take_copies(self) -> list[Copy]:
        """Copies due since the last call; each may read what an earlier one wrote."""
        copies, self._copies = self._copies, []
        return copies

    def check(self) -> None:
        """Assert that no page or slot is lost, held twice, or shared by accident."""
        holders = list(self.open_sequences.values())
        self.pool.check([held.pages for held in holders])
        self.sources.check([held.source for held in holders])
        used = [slot for held in holders for slot in (held.slot, *held.snapshots.values())]
        assert sorted(used + self.free_slots) == list(range(self.slots))
        for held in holders:
            assert held.length <= held.ready
            assert held.table.tolist() == held.pages
            assert not self.paged or self.pages_for(held.ready) <= len(held.pages)
            assert not self.reuse or len(held.keys) == held.length // self.page_size
            start = held.length // self.page_size
            if held.ready > held.length and self.paged:
                assert all(self.pool.references[page] == 1 for page in held.pages[start:])

    def _find(self, tokens: Sequence[int], salt: bytes) -> list[tuple[int, bytes]]:
        """(page, key) of the longest cached prefix that leaves the last token out."""
        found: list[tuple[int, bytes]] = []
        for index in range((len(tokens) - 1) // self.page_size):
            key = self._key(found[-1][1] if found else None, salt, tokens, index)
            page = self.pool.page_of.get(key)
            if page is None:
                break
            found.append((page, key))
        return found

    def _key(self, last: bytes | None, salt: bytes, tokens: Sequence[int], index: int) -> bytes:
        """Key of page `index`: a hash over the salt and every token up to the page's end."""
        start = index * self.page_size
        ids = np.array(tokens[start : start + self.page_size], np.int32)
        return sha256((sha256(salt).digest() if last is None else last) + ids.tobytes()).digest()
