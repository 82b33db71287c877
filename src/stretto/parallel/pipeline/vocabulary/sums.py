"""What S and T sum over the ranks of a pipeline.

S of algorithm 1 makes the softmax whole, that of algorithm 2 the gradient of its input besides; with algorithm 1 T
gives that.  Both run beside the operations of the schedule, which wait where it has an arrow.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from stretto.parallel.collectives import Pending, gather_dim, reduce
from stretto.parallel.pipeline.vocabulary.background import Background, Promise
from stretto.parallel.pipeline.vocabulary.groups import Groups
from stretto.parallel.pipeline.vocabulary.scores import Scores, loss_of


class Sums(Protocol):
    """Sums over the ranks, begun in one order on all, which the verifier has checked (verifier/vocabulary.py)."""

    def of_scores(self, scores: Scores, microbatch: int, target: int | None) -> Promise:
        """Maximum [N], mass [N] and loss over the whole vocabulary.

        On ``target`` also the gradient [N, D] of the input, unscaled.
        """

    def of_gradients(self, dx: Tensor, microbatch: int, target: int) -> Pending:
        """The sum of ``dx`` over the ranks, in place, on ``target``; elsewhere it is undefined afterwards."""


class GroupSums:
    """By collectives, behind the arithmetic.

    Args:
        here: position along pp.
    """

    def __init__(self, groups: Groups, beside: Background, *, here: int) -> None:
        self._groups, self._beside, self._here = groups, beside, here

    def of_scores(self, scores: Scores, microbatch: int, target: int | None) -> Promise:
        """See ``Sums``."""
        return self._beside.submit(partial(summed, scores, self._groups, target, here=self._here))

    def of_gradients(self, dx: Tensor, microbatch: int, target: int) -> Pending:
        """See ``Sums``."""
        return reduce(dx, target, self._groups.inputs_of_t)


def summed(scores: Scores, groups: Groups, target: int | None, *, here: int) -> tuple[Tensor, ...]:
    """Maximum [N], mass [N] and loss of a micro-batch over the whole vocabulary; on ``target`` also the gradient [N, D]
    of the input, unscaled.  Communicates, in the order in which all ranks call it."""
    # Every rank combines what all know of each token, three numbers: one collective, where a maximum and then sums of
    # what it has rescaled would be two, one waiting for the other.
    tops, masses, labels = gather_dim(
        torch.stack([scores.top, scores.mass, scores.label]).unsqueeze(1), 1, groups.scores
    )
    top, label = tops.amax(0), labels.sum(0)
    mass = (masses * (tops - top).exp_()).sum(0)
    loss = loss_of(scores.valid, top, mass, label)
    if target is None:
        return top, mass, loss
    dx = scores.take_input_gradient(top, mass)
    reduce(dx, target, groups.inputs_of_s).wait()
    return (top, mass, loss, dx) if target == here else (top, mass, loss)
