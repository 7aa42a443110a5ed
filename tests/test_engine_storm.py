"""Any order of arrivals, forks, cancellations and cycles: no leak, no deadlock, the same tokens."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lmclock.engine import Request, Sampling
from tests.hash_machine import KINDS, HashMachine, engine, expected

EOS = frozenset({0})


class EngineMachine(RuleBasedStateMachine):
    """Sequences come, fork and are cancelled; what ends has the tokens of a lone run."""

    seen: ClassVar[Counter[str]] = Counter()  # what happened over all runs

    @initialize(
        kind=st.sampled_from(KINDS),
        room=st.sampled_from([6, 8]),
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
            prefix_reuse=reuse, eos=EOS,
        )  # fmt: skip
        self.asked: dict[int, tuple[Request, list[int]]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, str] = {}

    @rule(
        length=st.integers(3, 10),
        first=st.integers(0, 1),
        new=st.sampled_from([14, 9, 1, 0]),
        seed=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 1.0]),
        repetition=st.sampled_from([1.0, 1.3]),
        window=st.sampled_from([0, 3]),
        ignore_eos=st.sampled_from([True, True, False]),
        count=st.integers(2, 4),
    )
    def add(
        self, length: int, first: int, new: int, seed: int, temperature: float,
        repetition: float, window: int, ignore_eos: bool, count: int,
    ) -> None:  # fmt: skip
        """Several at once; two beginnings only, so that prefixes meet."""
        for k in range(count):
            prompt = [first, *range(1, length)]
            sampling = Sampling(temperature, repetition=repetition, window=window, seed=seed + k)
            source = prompt[:4] if self.kind == "encoder" else ()
            request = Request(prompt, new, sampling, ignore_eos=ignore_eos, source=source)
            self.expect(self.of.add(request), request, prompt)

    def expect(self, number: int, request: Request, start: list[int]) -> None:
        self.asked[number] = (request, start)
        self.tokens[number] = []

    @precondition(lambda self: self.of.live)
    @rule(which=st.integers(0, 99), seed=st.integers(4, 9))
    def fork(self, which: int, seed: int) -> None:
        parent = list(self.of.live)[which % len(self.of.live)]
        request, _ = self.asked[parent]
        sampling = Sampling(1.0, seed=seed, frequency=9)
        child = self.of.fork(parent, sampling)
        assert child is not None
        forked = Request(
            request.prompt, request.max_new_tokens, sampling, ignore_eos=request.ignore_eos,
            source=request.source,
        )  # fmt: skip
        self.expect(child, forked, list(self.of.live[child].tokens))

    @precondition(lambda self: len(self.of.live) > 5)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        number = list(self.of.live)[which % len(self.of.live)]
        assert self.of.cancel(number) and not self.of.cancel(number)

    @rule(cycles=st.integers(1, 6))
    def step(self, cycles: int) -> None:
        for _ in range(cycles):
            self.of.step()
            for event in self.of.events:
                assert event.sequence not in self.finish
                self.tokens[event.sequence] += event.tokens
                if event.finish:
                    self.finish[event.sequence] = event.finish

    @invariant()
    def sound(self) -> None:
        self.of.cache.check()
        for line in (self.of.scheduler.waiting, self.of.scheduler.running):
            numbers = [sequence.id for sequence in line]
            assert numbers == sorted(numbers), "someone lost the place that arrival gave"

    def teardown(self) -> None:
        if not hasattr(self, "of"):
            return
        for _ in range(3000):
            if not self.of.busy:
                break
            self.step(1)
        assert not self.of.busy and not self.of.cache.open_sequences
        assert self.of.cache.room == self.of.cache.pool.size
        for number, (request, start) in self.asked.items():
            tokens, finish = expected(request, EOS, start)
            if self.finish[number] == "cancelled":
                assert self.tokens[number] == tokens[: len(self.tokens[number])]
            else:
                assert (self.tokens[number], self.finish[number]) == (tokens, finish)
        self.seen.update(self.finish.values())
        assert isinstance(self.of.machine, HashMachine)
        self.seen["preemptions"] += self.of.scheduler.preemptions
        self.seen["copies"] += self.of.machine.copies


def test_whatever_happens_every_sequence_ends_with_its_own_tokens() -> None:
    EngineMachine.seen.clear()
    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=70, stateful_step_count=30)
    )
    seen = EngineMachine.seen
    assert min(seen[what] for what in ("stop", "length", "cancelled", "preemptions", "copies")) > 2
