"""Every line of what is to be reached, with what the last run of each script measured.

    python -m bench.summary

Nothing is measured here: the figures are those the scripts left in build/bench.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from bench.common import SECTIONS, publish, table
from bench.stages import Goal, Plan, Store, options


@click.command(help=__doc__)
@options()
def main(plan: Plan) -> None:
    found = {name: Store(name).goals for name in SECTIONS}
    publish("summary", report({name: goals for name, goals in found.items() if goals}), plan.dry)


def report(goals: dict[str, Sequence[Goal]]) -> str:
    """The section of the document."""
    every = [goal for some in goals.values() for goal in some]
    counts = [sum(goal.reached is state for goal in every) for state in (True, False, None)]
    rows = [[name, *goal.cells()] for name, some in goals.items() for goal in some]
    return "\n\n".join([
        "## What is to be reached",
        f"{counts[0]} of {len(every)} reached, {counts[1]} not, {counts[2]} not measured.",
        table(["section", "to reach", "measured", "wanted", "reached"], rows),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
