"""Compares what the ranks recorded with the one-rank reference, and says where they part.

Where a fault lies in the forward pass, everything after it differs and, through the backward pass, every gradient
before it too; then the first module whose input or output differs is where to look.  Where the forward pass is
right, the first parameter whose gradient differs is; and where the gradients are right, the first whose
weight differs after the update (a wrong clip, a wrong decay).

Errors are max|a - b| / max|b| per array.  Two kinds of b are too small to divide by:

* a gradient that vanishes but for rounding (a key bias without rotary positions adds the same to all scores of a
  query, and softmax takes it away again): it is measured against the model's largest gradient;
* a weight much smaller than a step (a bias that started at 0): measured against the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stretto.trainer.verify_modules import Key
from stretto.trainer.verify_rank import Patch, RankStep
from stretto.trainer.verify_reference import Arrays, ReferenceStep

VANISHING = 1e-13
"""A gradient of at most this part of the model's largest is rounding."""
INFINITE = 1e300
"""Stands for an error that isn't finite, so that reports stay JSON."""

Errors = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepErrors:
    """How far one step of the plan is from the reference."""

    step: int
    """From 1."""
    loss: float
    """Relative, of the rank that is furthest off."""
    norm: float
    """Likewise, of the gradient norm."""
    tokens: bool
    """Whether the number of valid tokens differs on any rank."""
    outputs: Errors
    """By part, in model order."""
    gradients: Errors
    """By parameter, in model order."""
    weights: Errors
    """By parameter, in model order."""

    def largest(self) -> float:
        """The largest error of all."""
        numbers = [self.loss, self.norm, *self.outputs.values(), *self.gradients.values(), *self.weights.values()]
        return INFINITE if self.tokens else max(numbers)


def compare_step(
    step: int, reference: ReferenceStep, ranks: Sequence[RankStep], *, tied: Mapping[str, str], learning_rate: float
) -> StepErrors:
    """Errors of one step; ``tied`` gives the original's name of each tied copy."""
    largest = max(float(np.abs(g).max(initial=0.0)) for g in reference.gradients.values())
    scales = {n: float(np.abs(g).max(initial=0.0)) for n, g in reference.gradients.items()}
    gradient_scales = {n: s if s > VANISHING * largest else largest for n, s in scales.items()}
    weight_scales = {n: max(learning_rate, float(np.abs(w).max(initial=0.0))) for n, w in reference.weights.items()}
    return StepErrors(
        step=step,
        loss=max(relative(r.loss, reference.loss) for r in ranks),
        norm=max(relative(r.grad_norm, reference.grad_norm) for r in ranks),
        tokens=any(r.tokens != reference.tokens for r in ranks),
        outputs=output_errors(reference.outputs, [p for r in ranks for p in r.outputs]),
        gradients=errors_of(
            reference.gradients, originals([p for r in ranks for p in r.gradients], tied), gradient_scales
        ),
        weights=errors_of(reference.weights, originals([p for r in ranks for p in r.weights], tied), weight_scales),
    )


def originals(patches: Iterable[Patch], tied: Mapping[str, str]) -> list[Patch]:
    """The patches with tied copies under the name of their original."""
    return [Patch(tied.get(p.name, p.name), p.offset, p.values) for p in patches]


def output_errors(expected: Arrays, patches: Sequence[Patch]) -> Errors:
    """Errors of the parts' outputs; the loss of a micro-batch is compared with the sum over its rows."""
    losses = expected["outputs"]
    largest = float(np.abs(losses).max())
    parts = {name: array for name, array in expected.items() if name != "outputs"}
    scales = {name: float(np.abs(array).max()) for name, array in parts.items()}
    errors = errors_of(parts, [p for p in patches if p.name != "outputs"], scales)
    found = [
        abs(float(p.values) - float(losses[p.offset[0] : p.offset[0] + p.offset[1]].sum())) / largest
        for p in patches
        if p.name == "outputs"
    ]
    return {**errors, "outputs": finite(max(found, default=math.inf))}


def errors_of(expected: Arrays, patches: Iterable[Patch], scales: Mapping[str, float]) -> Errors:
    """Largest error per array; what no patch covers counts as zeros."""
    worst = dict.fromkeys(expected, 0.0)
    covered = {name: np.zeros(array.shape, dtype=bool) for name, array in expected.items()}
    for patch in patches:
        window = tuple(slice(o, o + n) for o, n in zip(patch.offset, patch.values.shape, strict=True))
        if patch.name not in expected or expected[patch.name][window].shape != patch.values.shape:
            worst[patch.name] = math.inf
            continue
        covered[patch.name][window] = True
        worst[patch.name] = largest_of(worst[patch.name], np.abs(patch.values - expected[patch.name][window]))
    for name, array in expected.items():
        worst[name] = largest_of(worst[name], np.abs(array[~covered[name]]))
    return {name: ratio(error, scales.get(name, 0.0)) for name, error in worst.items()}


def largest_of(so_far: float, values: np.ndarray) -> float:
    """The largest of all; NaN counts as infinite."""
    found = float(values.max(initial=0.0))
    return math.inf if math.isnan(found) else max(so_far, found)


def ratio(error: float, scale: float) -> float:
    """error / scale; of two zeros, zero."""
    return 0.0 if error == 0.0 else finite(error / scale if scale else math.inf)


def relative(found: float, expected: float) -> float:
    """|a - b| / |b|."""
    return ratio(abs(found - expected), abs(expected))


def finite(error: float) -> float:
    """The error as a number that JSON can hold."""
    return error if error <= INFINITE else INFINITE


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Where the plan and the reference part."""

    parameter: str | None
    """The parameter to look at."""
    output: str | None
    """The first part of the model, or module inside it, whose output differs; None: the forward pass is right."""
    sentence: str
    """What was found."""


def locate(errors: StepErrors, tolerance: float, look_inside: Callable[[str], Key | None]) -> Finding:
    """Name what differs first in a step that is not equal.

    ``look_inside(part)`` gives the first input or output of a module inside a part that differs.
    """
    part = first_above(errors.outputs, tolerance)
    if part is not None:
        return locate_forward(errors, tolerance, part, look_inside(part))
    wrong = [n for n, e in errors.gradients.items() if e > tolerance]
    where = f"Step {errors.step}: "
    if wrong:
        share = f"{len(wrong)} of {len(errors.gradients)} parameters' gradients differ, the first is {wrong[0]}'s"
        return Finding(parameter=wrong[0], output=None, sentence=f"{where}the forward pass is equal, but {share}.")
    name = first_above(errors.weights, tolerance)
    if name is not None:
        norm = " and the gradient norm is wrong" if errors.norm > tolerance else ""
        told = f"all gradients are equal{norm}, but after the update {name} differs"
    elif errors.norm > tolerance:
        told = "all gradients are equal, but their norm is wrong"
    else:
        told = "the loss or the number of valid tokens is wrong"
    return Finding(parameter=name, output=None, sentence=f"{where}{told}.")


def locate_forward(errors: StepErrors, tolerance: float, part: str, key: Key | None) -> Finding:
    """The parameter that is furthest off in the smallest piece of the model that holds the fault."""
    told, scope = f"the output of {part} differs", part
    if key is not None:
        module, side = key
        told = f"the {side} of {module} differs"
        scope = module if side == "output" else module.rpartition(".")[0]
    wrong = {n: e for n, e in errors.gradients.items() if e > tolerance}
    inside = {n: e for n, e in wrong.items() if n.startswith(f"{scope}.")} or wrong
    name = max(inside, key=inside.__getitem__) if inside else None
    sentence = f"Step {errors.step}: {told} first in the forward pass"
    if name is not None:
        sentence += f"; near it the gradient of {name} is furthest off"
    return Finding(parameter=name, output=key[0] if key is not None else part, sentence=f"{sentence}.")


def first_above(errors: Errors, tolerance: float) -> str | None:
    """The first name with an error above ``tolerance``."""
    return next((name for name, error in errors.items() if error > tolerance), None)
