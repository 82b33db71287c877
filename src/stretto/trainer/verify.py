"""Is a plan the same training as one rank?  Asked of the user's own model and plan, answered in seconds.

    run ──shrink──► small run ─┬─► the plan on local processes ──► outputs, loss, gradients, norm, weights ─┐
                               └─► one rank, plain autograd ─────► the same ───────────────────────── compare ─► report

The tolerance is 1e-9 in float64.  A plan adds the same numbers in another order, which costs a few units of 1e-16
per addition, and some hundreds of additions lie between a weight and a gradient; three steps of AdamW carry
that on.  Healthy plans measure 1e-15 to 1e-12; a fault, even in one term of a sum, 1e-6 and far more.  A foreign
model is allowed 1e-4, because many compute norms, rotary positions or softmax in float32 whatever they are
given, and under tp another order of addition then falls on the other side of a float32 rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stretto.spec.check import check
from stretto.spec.errors import UnsupportedError
from stretto.spec.front import fills
from stretto.spec.run import RunSpec
from stretto.trainer.planned import skips
from stretto.trainer.schedules import schedules_of
from stretto.trainer.verify_compare import Finding, StepErrors, compare_step, locate
from stretto.trainer.verify_modules import Key, first_difference
from stretto.trainer.verify_processes import run_on_processes
from stretto.trainer.verify_rank import Around, RankStep, train_on_rank
from stretto.trainer.verify_reference import build_whole, train_reference
from stretto.trainer.verify_sequence import tokens_of_ranks
from stretto.trainer.verify_shrink import STEPS, layers_of, shrink

TOLERANCE = 1e-9
"""Of every figure, relative; the module's docstring says why."""
FOREIGN_TOLERANCE = 1e-4
"""Likewise for a foreign model."""

RunRanks = Callable[..., list[Any]]
"""``run_ranks(function, world, *args)`` calls ``function(rank, world, *args)`` on so many ranks that have a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found.  Errors are those up to the first step that isn't equal."""

    equal: bool
    """Whether outputs, loss, gradients, norm and weights are those of one rank."""
    loss_error: float
    """Largest relative error of the loss."""
    grad_error: float
    """Largest error of a parameter's gradient: max|a - b| / max|b|."""
    worst_parameter: str | None
    """If equal, the parameter with the largest gradient error.  Else the one to look at: the first in model
    order whose gradient differs; where the forward pass went wrong, the one furthest off in the module where it
    did; where only the update is wrong, the first whose weight differs.  None where no parameter differs (a
    wrong norm that clips nothing)."""
    first_output: str | None
    """The first module, in the order of the forward pass, whose input or output differs; None: none does."""
    norm_error: float
    """Largest relative error of the gradient norm."""
    weight_error: float
    """Largest error of a parameter after an update."""
    tolerance: float
    """What counts as equal."""
    steps: int
    """Steps compared."""
    ranks: int
    """Processes that the small plan ran on."""
    finding: str
    """The result in a sentence."""
    notes: tuple[str, ...] = ()
    """What of the user's plan the small one leaves out."""


def to_stderr(line: str) -> None:
    """Progress for people, away from standard output, which may have to be JSON."""
    print(line, file=sys.stderr, flush=True)


def verify(
    run: RunSpec,
    *,
    steps: int = STEPS,
    run_ranks: RunRanks = run_on_processes,
    around: Around | None = None,
    say: Callable[[str], None] = to_stderr,
) -> VerifyReport:
    """Compare the plan of ``run``, made small, with one rank.

    Args:
        steps: optimizer steps to compare.
        run_ranks: what starts the ranks; by default fresh local processes.
        around: a context that each rank enters, for tests that break something there.
        say: shows progress.

    Raises:
        ConfigError, UnsupportedError: the run can't work.
        RankError: a rank raised, died or didn't finish.
    """
    _check_comparable(run)
    shrunk = shrink(run)
    small, foreign = shrunk.run, run.model.family == "foreign"
    world = small.plan.num_ranks
    for line in (describe(small, steps), *shrunk.notes):
        say(f"verify: {line}")
    tolerance = FOREIGN_TOLERANCE if foreign else TOLERANCE
    found: list[list[RankStep]] = run_ranks(train_on_rank, world, small, steps, around)
    with one_thread():
        errors = compare(small, found, tolerance)

    def look_inside(part: str) -> Key | None:
        if small.plan.context_groups == "dynamic" or small.model.video is not None:
            return None  # tokens are elsewhere in each step, or in each part of a layer
        say(f"verify: {part} differs, looking inside")
        again = run_ranks(train_on_rank, world, small, len(errors), around, part)
        with one_thread():
            *_, reference = train_reference(small, len(errors), inside=part)
        heard = [rank_steps[-1].modules for rank_steps in again]
        held = tokens_of_ranks(small)
        return first_difference(reference.modules, heard, tp=small.plan.tp, tolerance=tolerance, tokens=held)

    equal = errors[-1].largest() <= tolerance
    finding = praise(errors, world) if equal else locate(errors[-1], tolerance, look_inside)
    return VerifyReport(
        equal=equal,
        worst_parameter=finding.parameter,
        first_output=finding.output,
        finding=finding.sentence,
        tolerance=tolerance,
        steps=len(errors),
        ranks=world,
        notes=shrunk.notes,
        **figures_of(errors),
    )


def _check_comparable(run: RunSpec) -> None:
    """ConfigError for a run that can't work, UnsupportedError for one that is not comparable with one rank."""
    check(run, data=False)
    if skips(schedules_of(run)[0]) and not fills(run.plan):
        raise UnsupportedError(
            "The schedule leaves out layers for some micro-batches or reorders them, so it is meant to differ from one "
            "plain rank, which is all that verify compares with; verify another plan.schedule."
        )


def describe(small: RunSpec, steps: int) -> str:
    """What is about to run."""
    world = small.plan.num_ranks
    processes = f"{world} local process{'es' if world > 1 else ''}"
    stages = f"{small.model.num_layers} layers in stages of {list(layers_of(small))}"
    return f"{stages} on {processes}, {steps} steps in float64"


def figures_of(errors: list[StepErrors]) -> dict[str, float]:
    """The largest error of each kind over the steps, named as in the report."""
    return {
        "loss_error": max(step.loss for step in errors),
        "grad_error": max(error for step in errors for error in step.gradients.values()),
        "norm_error": max(step.norm for step in errors),
        "weight_error": max(error for step in errors for error in step.weights.values()),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """The reference's tensors are so small that torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(run: RunSpec, found: list[list[RankStep]], tolerance: float) -> list[StepErrors]:
    """Errors step by step until the first that isn't equal; after it nothing can be."""
    tied = build_whole(run).tied
    errors: list[StepErrors] = []
    for index, reference in enumerate(train_reference(run, len(found[0]))):
        ranks = [steps[index] for steps in found]
        errors.append(compare_step(index + 1, reference, ranks, tied=tied, learning_rate=run.training.learning_rate))
        if errors[-1].largest() > tolerance:
            break
    return errors


def praise(errors: list[StepErrors], world: int) -> Finding:
    """What to say of a plan that is equal: how near."""
    error, name = max((error, name) for step in errors for name, error in step.gradients.items())
    ranks = f"{world} rank{'s' if world > 1 else ''}"
    sentence = f"{len(errors)} steps on {ranks} are those of one; no gradient is further off than {error:.1e}."
    return Finding(parameter=name, output=None, sentence=sentence)
