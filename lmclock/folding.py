"""Lines that differ only by a counting number, folded into `.repeat` blocks and back.

    .repeat i = 0..29                               layers that are alike
    .repeat j = 0..18 step 6                        kinds of layers that alternate: five of one,
      .repeat i = {j}..{j+4}                        which fold among themselves, and one of another

`{i}` and `{i+1}` stand for numbers inside names, and a block may hold blocks of the other letter.
A fold is only shorthand: unfolded it is the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lmclock.errors import ProgramError

MAX_LINES = 1_000_000  # of the unfolded text: a fold bomb is refused, not expanded
_NUMBER = re.compile(
    r"(?<=[A-Za-z_\]']\.)\d+(?![\w])|(?<=\[)\d+(?=\])|(?<== )\d+(?=\.\.)|(?<=\d\.\.)\d+"
)
_REPEAT = re.compile(r"\.repeat\s+([ij])\s*=\s*(\d{1,6})\.\.(\d{1,6})(?:\s+step\s+(\d{1,6}))?")
_HOLE = {letter: re.compile(rf"\{{{letter}(?:\+(\d+))?\}}") for letter in "ij"}


def fold(lines: list[str]) -> list[str]:
    """Runs of at least two groups of lines that differ only by a number that counts by one."""
    return _fold(lines, most_step=1, most=64)


def fold_twice(lines: list[str]) -> list[str]:
    """Runs by any step, whichever covers most lines; what repeats within a group is folded too."""
    return _fold(lines, most_step=64, most=512)


@dataclass(frozen=True)
class _Run:
    """`count` groups of lines that are `body` for the numbers first, first + step, ..."""

    first: int
    step: int
    count: int
    body: list[str]

    @property
    def lines(self) -> int:
        return self.count * len(self.body)

    def block(self, group: list[str]) -> list[str]:
        """The lines of the block; `group` is the first group, which may fold by itself."""
        last = self.first + (self.count - 1) * self.step
        if self.step == 1:
            head, body = f".repeat i = {self.first}..{last}", self.body
        else:
            head = f".repeat j = {self.first}..{last} step {self.step}"
            body = [_template(line, self.first, self.step, "j") for line in fold(group)]
        return [head, *(f"  {line}" for line in body), ".end"]


def _fold(lines: list[str], most_step: int, most: int) -> list[str]:
    bare = [_NUMBER.sub("#", line) for line in lines]
    numbers = [[int(n) for n in _NUMBER.findall(line)] for line in lines]
    folded, at = [], 0
    while at < len(lines):
        best: _Run | None = None
        left = len(lines) - at
        for period in range(1, min(most, left // 2) + 1):
            covers = left - left % period  # at most
            if bare[at] != bare[at + period] or (best and covers <= best.lines):
                continue
            steps = {b - a for a, b in zip(numbers[at], numbers[at + period], strict=True)} - {0}
            if len(steps) != 1 or not 0 < min(steps) <= most_step:
                continue
            if bare[at : at + period] == bare[at + period : at + 2 * period]:
                run = _run(lines, at, period, min(steps), numbers)
                if run.count > 1 and (best is None or run.lines > best.lines):
                    best = run
        if best is None:
            folded.append(lines[at])
            at += 1
            continue
        folded += best.block(lines[at : at + len(best.body)])
        at += best.lines
    return folded


def _run(lines: list[str], at: int, period: int, step: int, numbers: list[list[int]]) -> _Run:
    """How often the group from line `at` repeats; its first number is the least that counts."""
    first = min(a for a, b in zip(numbers[at], numbers[at + period], strict=True) if b - a == step)
    body = [_template(line, first, step, "i") for line in lines[at : at + period]]
    count = 1
    while _matches(lines, at + count * period, body, first + count * step):
        count += 1
    return _Run(first, step, count, body)


def _template(line: str, first: int, step: int, letter: str) -> str:
    holes = {str(first + k): f"{{{letter}+{k}}}" if k else f"{{{letter}}}" for k in range(step + 1)}
    return _NUMBER.sub(lambda m: holes.get(m[0], m[0]), line)


def _matches(lines: list[str], at: int, body: list[str], i: int) -> bool:
    if at + len(body) > len(lines):
        return False
    return all(fill(t, i) == lines[at + k] for k, t in enumerate(body))


def fill(template: str, number: int, letter: str = "i") -> str:
    """A folded line for layer `number`."""
    return _HOLE[letter].sub(lambda m: str(number + int(m[1] or 0)), template)


# --- back

Lines = list[tuple[int, str]]


def unfold(text: str) -> Iterator[tuple[int, str]]:
    """(line number, line) without comments and blank lines, `.repeat` blocks unrolled."""
    stripped = ((n, raw.split(";", 1)[0].strip()) for n, raw in enumerate(text.splitlines(), 1))
    return _unroll([(n, line) for n, line in stripped if line], "", [0])


def _unroll(lines: Lines, outer: str, total: list[int]) -> Iterator[tuple[int, str]]:
    """`outer`: the letters of the blocks around these lines; `total`: lines unrolled so far."""
    at = 0
    while at < len(lines):
        number, line = lines[at]
        at += 1
        if line == ".end":
            raise ProgramError(f"line {number}: .end without .repeat")
        if not line.startswith(".repeat"):
            yield number, line
            continue
        match = _REPEAT.fullmatch(line)
        if not match or match[1] in outer or int(match[4] or 1) < 1:
            raise ProgramError(
                f"line {number}: not `.repeat i = A..B` or `.repeat j = A..B step C`, or within a "
                f"block of the same letter: {line!r}"
            )
        end = _end(lines, at)
        block = lines[at:end]
        numbers = range(int(match[2]), int(match[3]) + 1, int(match[4] or 1))
        total[0] += len(numbers) * max(1, len(block))
        if total[0] > MAX_LINES:
            raise ProgramError(f"line {number}: it unfolds to over {MAX_LINES} lines")
        for i in numbers:
            filled = [(n, fill(t, i, match[1])) for n, t in block]
            yield from _unroll(filled, outer + match[1], total)
        at = end + 1


def _end(lines: Lines, at: int) -> int:
    """Where the block that begins at `at` ends."""
    depth = 1
    for k in range(at, len(lines)):
        depth += lines[k][1].startswith(".repeat") - (lines[k][1] == ".end")
        if depth == 0:
            return k
    raise ProgramError("a .repeat has no .end")
