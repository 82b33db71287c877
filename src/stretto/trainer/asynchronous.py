"""Pipelined backpropagation: every micro-batch updates at once, with a gradient of weights that are D updates old.

(Kosson et al. 2020, "Pipelined Backpropagation at Scale"; PipeDream, Narayanan et al. 2019, for the order 1F1B and for
weight stashing.)  SGD with momentum m and rate r; D is the stage's delay in the steady state, known from the schedule:

    v <- m v + g          w <- w - r (a v + b g)          g: gradient of the micro-batch's mean loss, plus decay w

    plain            a = 1, b = 0                         forward with w as it is, backward with w as it is then
    stash            a = 1, b = 0                         backward with the weights of its forward
    spike            a = m^D, b = (1 - m^D) / (1 - m)     what g would have contributed, had it come in time, at once
    predict          a = 1, b = 0                         forward with w - r D v, where w will be when g arrives
    predict-spike    a and b of spike                     both

In time, g would count (1 + m + ... + m^D) g by the update that it is late for, and m^(D+1) g, m^(D+2) g, ... in those
behind.  a v brings m^D g of that and b g the rest, and v goes on as it would have: from its arrival on, a late gradient
has moved the weights as far as one in time.  r D v is how far D updates move them while v stays what it is.

Only in ``stash`` do forward and backward of a micro-batch see the same weights; the paper finds the others' mismatch
harmless at small rates and keeps no old weights.  With D = 0 (the last stage, or one rank) all are plain SGD.

A step of the run is a stretch of micro-batches without a flush; the pipeline drains at its end, where records,
evaluation and checkpoints find weights of one age.  Its loss is the mean over its valid tokens, each micro-batch
measured with the weights it met.  There is no gradient of a step, hence no norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from stretto.assemble.rank_model import RankModel
from stretto.parallel.collectives import all_reduce
from stretto.parallel.master import Master
from stretto.parallel.mesh import DATA
from stretto.parallel.pipeline.versions import VersionedStage
from stretto.parallel.unit import settle_all
from stretto.spec.contract import IGNORE, Batch
from stretto.spec.errors import ConfigError
from stretto.spec.plan import Asynchronous
from stretto.trainer.rate import learning_rate
from stretto.trainer.step import StepResult, TrainStep

MOMENTUM = "momentum_buffer"
"""What torch's SGD calls the velocity v."""


class DelayedWeights:
    """The weights of one rank's stage, updated after every micro-batch.

    Args:
        model: whose stages will ask for them, instead of using them as they are.
        optimizer: SGD with momentum.
        method: how the delay is met.
        delay: D.
    """

    def __init__(self, model: RankModel, optimizer: torch.optim.Optimizer, *, method: Asynchronous, delay: int) -> None:
        self._model, self._optimizer, self._method, self.delay = model, optimizer, method, delay
        self._momentum = float(optimizer.defaults["momentum"])
        self._decay = {id(t): group["weight_decay"] for group in optimizer.param_groups for t in group["params"]}
        self._held = [pair for unit in model.units for pair in zip(unit.parameters, unit.masters, strict=True)]
        self._stashed: dict[int, list[Tensor]] = {}
        self._rate = 0.0
        self._counts: list[float] = []
        for index, stage in model.stages.items():
            model.stages[index] = VersionedStage(stage, self)

    def begin(self, rate: float, counts: list[float]) -> None:
        """A stretch begins, with this learning rate and so many valid tokens in each micro-batch."""
        self._rate, self._counts = rate, counts

    @contextmanager
    def for_forward(self, microbatch: int) -> Iterator[None]:
        """Predicted weights where the method predicts; stashed for later where it stashes."""
        if self.delay and self._method == "stash":
            self._stashed[microbatch] = [parameter.detach().clone() for parameter, _ in self._held]
        if self.delay and self._method in ("predict", "predict-spike"):
            ahead = [p.detach() - self._rate * self.delay * self._velocity(m).view_as(p) for p, m in self._held]
            with exchanged([parameter for parameter, _ in self._held], ahead):
                yield
        else:
            yield

    @contextmanager
    def for_backward(self, microbatch: int) -> Iterator[None]:
        """The weights of the forward where they were stashed, else those of now."""
        if microbatch not in self._stashed:
            yield
            return
        with exchanged([parameter for parameter, _ in self._held], self._stashed.pop(microbatch)):
            yield

    def _velocity(self, master: Master) -> Tensor:
        found: Tensor = self._optimizer.state[master.tensor][MOMENTUM]
        return found

    @torch.no_grad()
    def update(self, microbatch: int) -> None:
        """Reduce the micro-batch's gradient over its copies, and update."""
        settle_all(self._model.units)
        kept, added = spike(self._momentum, self.delay) if self._method.endswith("spike") else (1.0, 0.0)
        for _, master in self._held:
            weights, velocity = master.tensor.data, self._velocity(master)
            gradient = master.tensor.grad
            assert gradient is not None
            gradient = gradient / self._counts[microbatch] + self._decay[id(master.tensor)] * weights
            velocity.mul_(self._momentum).add_(gradient)
            weights.add_(kept * velocity + added * gradient, alpha=-self._rate)
        self._model.publish()
        for unit in self._model.units:
            unit.ready()
            unit.begin_step(1)


def spike(momentum: float, delay: int) -> tuple[float, float]:
    """The coefficients a of the velocity and b of the gradient that make up for a delay.

    >>> spike(0.5, 2)
    (0.25, 1.5)
    >>> spike(0.9, 0)
    (1.0, 0.0)
    """
    kept = momentum**delay
    return kept, (1 - kept) / (1 - momentum)


@contextmanager
def exchanged(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold other values, in their own storage, since graphs keep views of that."""
    own = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    try:
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data.copy_(value)


class AsynchronousStep:
    """Runs stretches of micro-batches of one rank.

    Args:
        step: what plays a schedule.
        weights: what the stage's passes see.
    """

    def __init__(self, step: TrainStep, weights: DelayedWeights) -> None:
        self._step, self._weights = step, weights

    def run(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """One stretch, ``step`` from 1, to where the pipeline is empty.  Raises ConfigError where it diverged."""
        inner = self._step
        mesh = inner.model.mesh
        counts = torch.stack([(batch.labels != IGNORE).sum() for batch in inner.model.share(batches)])
        all_reduce(counts, mesh.group(*DATA)).wait()
        self._weights.begin(learning_rate(inner.training, step), counts.clamp(min=1).tolist())
        loss, tokens = inner.play(step, batches, scale=_one(counts))
        inner.updates += len(batches)
        inner.observer.begin("REDUCE_GRAD")
        nothing = torch.zeros((), dtype=torch.float64, device=counts.device)
        totals = inner.sum_up(inner.own(loss, nothing, stop=stop), tokens=tokens)
        inner.observer.end()
        if not math.isfinite(totals.loss):
            raise ConfigError(
                f"The loss of step {step} isn't finite, and updates after every micro-batch can't be left out or taken "
                "back; go on from the last checkpoint with a smaller training.learning_rate or training.momentum, or "
                'with plan.asynchronous = "none".'
            )
        return replace(inner.result(step, totals, updated=True), grad_norm=math.nan)


def _one(like: Tensor) -> Callable[[], Tensor]:
    """The seed of every backward: sums of losses are differentiated as they are, and divided when updating."""
    one = torch.ones((), dtype=torch.float64, device=like.device)
    return lambda: one
