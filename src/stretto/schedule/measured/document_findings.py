"""What a step of placed documents says, in sentences."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stretto.spec.units import format_seconds

if TYPE_CHECKING:
    from stretto.schedule.measured.document_diagnosis import MicroBatch, PlacedStep

WORTH = 0.02
"""Shares of the span below this are not worth a sentence."""
EVEN = 1.03
"""Computing of the fullest rank over the mean's, up to which ranks have equally much."""
SHOWN = 2
"""Micro-batches of the fullest rank that are told."""


def findings(placed: PlacedStep, steps: Sequence[PlacedStep], *, device: str, num_hosts: int) -> Iterator[str]:
    """Sentences, the most important first."""
    yield _balance(placed, steps)
    yield from _longest(placed)
    yield _groups(placed)
    yield from _messages(placed)
    yield from _idle(placed)
    yield from _around(placed)
    if device != "cpu":
        yield (
            "The run was on GPUs: times are those at which the host launched operations, not those of the kernels, and "
            "waiting for attention's messages isn't seen."
        )
    if num_hosts > 1:
        yield f"The run was on {num_hosts} machines, whose clocks may differ."


def _balance(placed: PlacedStep, steps: Sequence[PlacedStep]) -> str:
    rank, usual = placed.fullest, statistics.median(step.imbalance for step in steps)
    others = f"; {usual:.2f} x in the median of {len(steps)} steps" if len(steps) > 1 else ""
    if placed.imbalance <= EVEN:
        return f"All ranks compute equally long, the fullest {placed.imbalance:.2f} x the mean{others}."
    seconds = format_seconds(placed.ranks[rank].computing)
    return f"Rank {rank} computes longest: {seconds}, {placed.imbalance:.2f} x the mean of all ranks{others}."


def _longest(placed: PlacedStep) -> Iterator[str]:
    """Which documents the fullest rank's time goes to."""
    own = [one for one in placed.micro_batches if one.rank == placed.fullest]
    total = sum(one.seconds for one in own)
    for one in own[:SHOWN]:
        yield (
            f"Rank {one.rank}'s micro-batch {one.number} takes {format_seconds(one.seconds)} "
            f"({one.seconds / total:.0%} of what it computes): {_contents(one)}."
        )


def _contents(one: MicroBatch) -> str:
    if not one.documents:
        return "no document, since others have more micro-batches"
    first, number = one.documents[0], len(one.documents)
    over = f" over {first.ranks} ranks, {first.tokens:,} of them here" if first.ranks > 1 else ""
    away = f", {first.away} blocks on the host" if first.away else ""
    more = f", and {number - 1} not longer" if number > 1 else ""
    return f"a document of {first.length:,} tokens{over}{away}{more}"


def _groups(placed: PlacedStep) -> str:
    """How many documents over how many ranks."""
    sizes: Counter[int] = Counter()
    for (_, ranks, _), number in placed.documents.items():
        sizes[ranks] += number
    over = ", ".join(f"{number} over {size}" for size, number in sorted(sizes.items()))
    lengths = [length for (_, _, length), number in placed.documents.items() for _ in range(number)]
    if not lengths:
        return "The step has no documents."
    return (
        f"{sum(sizes.values())} documents of {min(lengths):,} to {max(lengths):,} tokens, by the ranks that share one: "
        f"{over}; {max(one.number for one in placed.micro_batches) + 1} micro-batches."
    )


def _messages(placed: PlacedStep) -> Iterator[str]:
    """What cutting costs."""
    rank = max(range(len(placed.ranks)), key=lambda number: placed.ranks[number].messages)
    most = placed.ranks[rank].messages
    if most > WORTH * placed.span:
        mean = statistics.fmean(one.messages for one in placed.ranks)
        yield (
            f"Ranks wait {format_seconds(mean)} on average for keys, values and gradients of the documents that they "
            f"share, most of all rank {rank}: {format_seconds(most)}, {most / placed.span:.0%} of the time."
        )


def _idle(placed: PlacedStep) -> Iterator[str]:
    if placed.idle_share > WORTH:
        rank = max(range(len(placed.ranks)), key=lambda number: placed.ranks[number].idle)
        yield (
            f"Ranks have nothing to do for {placed.idle_share:.0%} of the time, most of all rank {rank} "
            f"({format_seconds(placed.ranks[rank].idle)})."
        )
    rank = max(range(len(placed.ranks)), key=lambda number: placed.ranks[number].pipeline)
    most = placed.ranks[rank].pipeline
    if most > WORTH * placed.span:
        yield f"Rank {rank} waits longest for other stages: {format_seconds(most)}."


def _around(placed: PlacedStep) -> Iterator[str]:
    """Before the first operation, and behind the last."""
    least = min(rank.settling for rank in placed.ranks)
    parts = {
        "reading rows and placing documents": max(rank.before for rank in placed.ranks),
        "reducing what is left of the gradients": least,
        "the update": max(rank.optimizer for rank in placed.ranks),
    }
    told = [f"{what} {format_seconds(seconds)}" for what, seconds in parts.items() if seconds > WORTH * placed.whole]
    if told:
        yield f"Beside its operations the step takes for {', '.join(told)}."
