"""Any order of arrivals, forks, cancellations and cycles: no leak, no deadlock, the same tokens."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from lmclock.engine import Request, Sampling
from tests.hash_machine import KINDS, engine, expected


class EngineMachine(RuleBasedStateMachine):
    """Sequences come, fork, are cancelled; whatever happens, tokens are those of a lone run."""

    sequences = Bundle("sequences")

    @initialize(
        kind=st.sampled_from(KINDS),
        room=st.integers(6, 14),
        rows=st.integers(4, 12),
        chunk=st.integers(1, 12),
        invariant=st.booleans(),
        reuse=st.booleans(),
    )
    def start(
        self, kind: str, room: int, rows: int, chunk: int, invariant: bool, reuse: bool
    ) -> None:
        self.kind = kind
        self.of = engine(
            kind, tokens=room * 4, rows=rows, chunk=chunk, invariant=invariant,
            prefix_reuse=reuse, eos=frozenset({0}),
        )  # fmt: skip
        self.asked: dict[int, tuple[Request, list[int]]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}

    @rule(
        target=sequences,
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        new=st.integers(0, 8),
        seed=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        repetition=st.sampled_from([1.0, 1.3]),
        window=st.sampled_from([0, 3]),
    )
    def add(
        self, prompt: list[int], new: int, seed: int, temperature: float, repetition: float,
        window: int,
    ) -> int:  # fmt: skip
        sampling = Sampling(temperature, seed=seed, repetition=repetition, window=window)
        source = prompt[:4] if self.kind == "encoder" else ()
        r = Request(prompt, new, sampling, source=source)
        number = self.of.add(r)
        self.asked[number] = (r, prompt)
        self.tokens[number] = []
        return number

    @rule(target=sequences, number=sequences, seed=st.integers(4, 9))
    def fork(self, number: int | None, seed: int) -> int | None:
        if number not in self.of.live:
            return None
        r, _ = self.asked[number]
        sampling = Sampling(1.0, seed=seed, frequency=9)
        child = self.of.fork(number, sampling)
        assert child is not None
        start = list(self.of.live[child].tokens)
        forked = Request(r.prompt, r.max_new_tokens, sampling, source=r.source)
        self.asked[child] = (forked, start)
        self.tokens[child] = []
        return child

    @rule(number=sequences)
    def cancel(self, number: int | None) -> None:
        if number is not None:
            live = number in self.of.live
            assert self.of.cancel(number) == live

    @rule(cycles=st.integers(1, 6))
    def step(self, cycles: int) -> None:
        for _ in range(cycles):
            self.of.step()
            self.hear()

    def hear(self) -> None:
        for event in self.of.events:
            assert event.sequence not in self.finish
            self.tokens[event.sequence] += event.tokens
            if event.finish:
                self.finish[event.sequence] = event.finish

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "of"):
            self.of.cache.check()

    def teardown(self) -> None:
        if not hasattr(self, "of"):
            return
        for _ in range(3000):
            if not self.of.busy:
                break
            self.of.step()
            self.hear()
        assert not self.of.busy and not self.of.cache.open_sequences
        assert self.of.cache.room == self.of.cache.pool.size
        for number, (asked, start) in self.asked.items():
            tokens, finish = expected(asked, frozenset({0}), start)
            if self.finish[number] == "cancelled":
                assert self.tokens[number] == tokens[: len(self.tokens[number])]
            else:
                assert (self.tokens[number], self.finish[number]) == (tokens, finish)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=50, stateful_step_count=30)
