"""The documents of a run whose steps place them: their lengths, before any step is made, and what is said of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from stretto.data import Corpus, Loader, Share
from stretto.data.lengths import lengths_of_steps
from stretto.planner.document_portions import placed
from stretto.spec.run import RunSpec
from stretto.trainer.corpus import prepare_corpus, token_cache
from stretto.trainer.prediction import COUNTED, UNCOUNTED, FirstSteps

LOOKED_AT = UNCOUNTED + COUNTED
"""Steps whose documents are looked at beforehand: those that the prediction is held against."""

Lengths = tuple[tuple[int, ...], ...]
"""Tokens of the documents of each step."""


def first_lengths(run: RunSpec, corpus: Corpus, *, done: int = 0) -> Lengths:
    """The documents of the first steps behind step ``done``; none are behind the run's last."""
    training = run.training
    share = Share(
        global_batch_size=training.global_batch_size, micro_batch_size=run.plan.micro_batch_size, seed=run.run.seed
    )
    steps = range(done + 1, min(done + LOOKED_AT, training.steps) + 1)
    return lengths_of_steps(Loader(corpus, share), steps)


class _NotThereError(Exception):
    """Tokens would have to be made first."""


def lengths_at_hand(run: RunSpec) -> Lengths | None:
    """The documents of a run's first steps, if its tokens are there already; None where they aren't."""

    def making(done: int, total: int, what: str, /) -> None:
        raise _NotThereError

    if not token_cache(run).is_dir():
        return None
    try:
        corpus = prepare_corpus(run, making)
    except _NotThereError:
        return None
    return first_lengths(run, corpus) if isinstance(corpus, Corpus) else None


def foresee(run: RunSpec, corpus: object, *, done: int, cuda: bool) -> tuple[FirstSteps | None, str | None]:
    """What measures the first steps behind step ``done`` against a prediction, and what to say before them."""
    if run.plan.context_groups != "dynamic" or not isinstance(corpus, Corpus) or done >= run.training.steps:
        return FirstSteps.of(run, cuda=cuda), None
    documents = first_lengths(run, corpus, done=done)
    first = FirstSteps.of(run, cuda=cuda, documents=documents)
    return first, "; ".join([described(run, documents), *([] if first is None else [first.foretold()])])


def described(run: RunSpec, documents: Sequence[Sequence[int]]) -> str:
    """What some steps hold, and over how many ranks the first of them places it."""
    lengths = [length for step in documents for length in step]
    if not lengths:
        return "no documents"
    sizes = Counter(piece.ranks for piece in placed(run, documents[0]).pieces)
    over = ", ".join(f"{size} ({count})" for size, count in sorted(sizes.items()))
    return (
        f"documents: {len(lengths) / len(documents):.0f} a step, of {min(lengths):,} to {max(lengths):,} tokens, the "
        f"median {statistics.median_low(lengths):,}; ranks that share one, in the first step: {over}"
    )
