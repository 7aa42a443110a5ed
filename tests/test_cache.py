"""The page allocator: nothing is lost or shared by accident, and what is shared is equal."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from lmclock.cache import Cache, Held
from lmclock.errors import UnsupportedError

PAGE = 4


def opened(cache: Cache, tokens: list[int], **options: object) -> Held:
    """A sequence whose tokens are all written."""
    held = cache.open(tokens, **options)
    assert held is not None
    cache.commit(held, tokens, len(tokens))
    return held


def test_equal_prefixes_share_full_pages_and_the_last_token_is_computed() -> None:
    cache = Cache(4, PAGE, 16)
    first = opened(cache, list(range(8)))
    again = cache.open(list(range(8)))
    assert again is not None and again.length == 4  # page 1 holds the last token
    longer = cache.open([*range(8), 99])
    assert longer is not None and longer.length == 8
    assert again.pages[0] == longer.pages[0] == first.pages[0] and longer.pages[1] == first.pages[1]
    assert again.pages[1] != first.pages[1]
    cache.check()


def test_pages_outlive_their_sequence_and_go_least_recently_used_first() -> None:
    cache = Cache(4, PAGE, 6)
    for start in (0, 100, 200):
        cache.close(opened(cache, list(range(start, start + 8))))
    assert cache.room == 6
    cache.close(opened(cache, list(range(8))))  # the oldest is used again
    cache.close(opened(cache, list(range(300, 308))))  # takes two pages: those from 100 on
    for start, length in ((200, 8), (100, 0)):
        held = cache.open([*range(start, start + 8), 1])
        assert held is not None and held.length == length
        cache.close(held)
    cache.check()


def test_of_one_sequence_the_last_pages_go_first() -> None:
    cache = Cache(2, PAGE, 4)
    cache.close(opened(cache, list(range(16))))
    cache.close(opened(cache, [50, 51, 52, 53, 54]))  # two pages are needed
    held = cache.open(list(range(16)))
    assert held is not None and held.length == 8


def test_salts_and_histories_keep_prefixes_apart() -> None:
    cache = Cache(4, PAGE, 16)
    opened(cache, list(range(1, 10)), salt=b"a")
    for tokens, salt, length in (
        ([1, 2, 3, 4, 5], b"a", 4),
        ([1, 2, 3, 4, 5], b"b", 0),
        ([9, 2, 3, 4, 5], b"a", 0),
        ([5, 6, 7, 8, 9], b"a", 0),  # a page of that content stands elsewhere
    ):
        held = cache.open(tokens, salt=salt)
        assert held is not None and held.length == length
        cache.close(held)


def test_no_reuse_when_it_is_off_or_states_are_fixed() -> None:
    for options in ({"reuse": False}, {"fixed": True}):
        cache = Cache(4, PAGE, 16, **options)
        opened(cache, list(range(9)))
        held = cache.open(list(range(9)))
        assert held is not None and held.length == 0
    cache = Cache(4, PAGE, 16)
    opened(cache, list(range(9)))
    held = cache.open(list(range(9)), reuse=False)
    assert held is not None and held.length == 0


def test_a_fork_copies_only_the_last_partial_page_and_only_when_written() -> None:
    cache = Cache(4, PAGE, 16)
    parent = opened(cache, list(range(6)))
    child = cache.fork(parent)
    assert child is not None and child.pages == parent.pages
    assert cache.take_copies() == []
    assert cache.reserve(child, 7)
    assert cache.take_copies() == [("paged", parent.pages[1], child.pages[1])]
    assert child.pages[0] == parent.pages[0] and child.pages[1] != parent.pages[1]
    assert cache.reserve(parent, 7)  # alone again: nothing to copy
    assert cache.take_copies() == []
    cache.check()


def test_truncating_into_a_registered_page_takes_it_out_of_the_index() -> None:
    cache = Cache(4, PAGE, 16)
    held = opened(cache, list(range(8)))
    cache.truncate(held, 6)
    assert cache.reserve(held, 8)
    cache.commit(held, [0, 1, 2, 3, 4, 5, 60, 70], 8)
    other = cache.open([*range(8), 8])
    assert other is not None and other.length == 4
    cache.check()


def test_a_fixed_state_goes_back_only_to_a_snapshot() -> None:
    cache = Cache(3, PAGE, fixed=True)
    held = opened(cache, [1, 2, 3])
    assert cache.snapshot(held)
    assert cache.reserve(held, 5)
    cache.commit(held, [1, 2, 3, 4, 5], 5)
    with pytest.raises(UnsupportedError, match=r"length 4 .* valid: 3 or 5"):
        cache.truncate(held, 4)
    spare = held.snapshots[3]
    cache.truncate(held, 3)
    assert cache.take_copies() == [("fixed", held.slot, spare), ("fixed", spare, held.slot)]
    child = cache.fork(held)
    assert child is not None and cache.take_copies() == [("fixed", held.slot, child.slot)]
    assert not cache.snapshot(child) and cache.fork(held) is None  # three slots, all in use
    cache.close(held)
    assert cache.snapshot(child)
    cache.check()


def test_frozen_pages_are_shared_by_forks_and_freed_with_the_last() -> None:
    cache = Cache(3, PAGE, 8, 4)
    held = cache.open([1], source=9)
    assert held is not None and len(held.source) == 3 and held.source_length == 9
    assert cache.open([1], source=5) is None  # one page is left, two are needed
    child = cache.fork(held)
    assert child is not None and child.source == held.source
    cache.close(held)
    assert cache.sources.room == 1
    cache.close(child)
    assert cache.sources.room == 4
    cache.check()


def test_a_refusal_changes_nothing() -> None:
    cache = Cache(2, PAGE, 4)
    held = opened(cache, list(range(9)))
    assert cache.open(list(range(20, 25))) is None
    assert cache.open([1], spare=1) is None
    assert not cache.reserve(held, 17)
    assert held.ready == 12 and cache.room == 1
    cache.check()


def test_idle_pages_that_are_found_again_are_not_counted_as_room() -> None:
    cache = Cache(2, PAGE, 4)
    cache.close(opened(cache, list(range(9))))
    assert cache.room == 4 and cache.open(list(range(17))) is None
    held = cache.open(list(range(16)))
    assert held is not None and held.length == 8 and cache.room == 0
    cache.check()


class CacheMachine(RuleBasedStateMachine):
    """A position holds its whole history, on which a machine's bytes depend; every sequence must
    read back its own.
    """

    sequences = Bundle("sequences")

    @initialize(
        pages=st.integers(2, 10), slots=st.integers(1, 5), fixed=st.booleans(), reuse=st.booleans()
    )
    def start(self, pages: int, slots: int, fixed: bool, reuse: bool) -> None:
        self.cache = Cache(slots, PAGE, pages, fixed=fixed, reuse=reuse)
        self.bytes: list[list[object]] = [[None] * PAGE for _ in range(pages)]
        self.slots: dict[int, list[int]] = {}
        self.tokens: dict[Held, list[int]] = {}

    def write(self, held: Held, tokens: list[int], length: int) -> None:
        """What a cycle does: copies, then the rows from held.length on."""
        for kind, source, target in self.cache.take_copies():
            store = self.bytes if kind == "paged" else self.slots
            store[target] = list(store[source])
        for position in range(held.length, length):
            page = held.pages[position // PAGE]
            assert self.cache.pool.references[page] == 1
            self.bytes[page][position % PAGE] = tokens[: position + 1]
        self.slots[held.slot] = tokens[:length]
        self.cache.commit(held, tokens, length)
        self.tokens[held] = tokens[:length]

    @rule(
        target=sequences,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=18),
        salt=st.sampled_from([b"", b"x"]),
    )
    def open(self, tokens: list[int], salt: bytes) -> Held | None:
        held = self.cache.open(tokens, salt=salt)
        if held is not None:
            assert held.length < len(tokens) and held.length % PAGE == 0
            self.write(held, tokens, len(tokens))
        return held

    @rule(held=sequences, more=st.lists(st.integers(0, 1), min_size=1, max_size=9), keep=st.data())
    def extend(self, held: Held | None, more: list[int], keep: st.DataObject) -> None:
        """Rows may be reserved and then discarded, as a rejected proposal is."""
        if held in self.tokens:
            tokens = self.tokens[held] + more
            if self.cache.reserve(held, len(tokens)):
                self.write(held, tokens, keep.draw(st.integers(held.length, len(tokens))))

    @rule(target=sequences, held=sequences)
    def fork(self, held: Held | None) -> Held | None:
        child = self.cache.fork(held) if held in self.tokens else None
        if child is not None:
            self.tokens[child] = list(self.tokens[held])
        return child

    @rule(held=sequences)
    def snapshot(self, held: Held | None) -> None:
        if held in self.tokens:
            self.cache.snapshot(held)

    @rule(held=sequences, where=st.data())
    def truncate(self, held: Held | None, where: st.DataObject) -> None:
        if held in self.tokens:
            valid = list(range(held.length + 1))
            if self.cache.fixed:
                valid = [at for at in valid if at in (*held.snapshots, held.length)]
            self.cache.truncate(held, where.draw(st.sampled_from(valid)))
            del self.tokens[held][held.length :]

    @rule(held=consumes(sequences))
    def close(self, held: Held | None) -> None:
        if held in self.tokens:
            self.cache.close(held)
            del self.tokens[held]

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for kind, source, target in self.cache.take_copies():
            store = self.bytes if kind == "paged" else self.slots
            store[target] = list(store[source])
        for held, tokens in self.tokens.items():
            read = [self.bytes[held.table[p // PAGE]][p % PAGE] for p in range(held.length)]
            assert read == [tokens[: p + 1] for p in range(held.length)]
            assert not self.cache.fixed or self.slots[held.slot] == tokens

    def teardown(self) -> None:
        for held in self.tokens:
            self.cache.close(held)
        assert self.cache.room == self.cache.pool.size
        assert len(self.cache.free_slots) == self.cache.slots
        self.cache.check()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40)
