"""Pipelined backpropagation is the recurrence of its paper, computed by one process with gradients written out by hand.

Three stages x + tanh(W x + b), an embedding before and a head behind them.  The emulation knows no autograd, no runtime
and no schedule: of each stage it keeps all versions of its weights, and the delay of stage s of S is S - 1 - s.
Float64, two stretches of micro-batches of unequal numbers of tokens; 1e-9, as in test_plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equivalence.plan_run import batches_of, plain, together
from equivalence.reference import error
from equivalence.test_plans import LLAMA
from ranks import Ranks
from stretto.spec.check import check
from stretto.spec.contract import IGNORE, Batch
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.asynchronous import spike
from stretto.trainer.rate import learning_rate
from stretto.trainer.session import Session

TOLERANCE = 1e-9
STAGES, STEPS, VOCABULARY = 3, 2, 19
MODULE = """
import torch
from torch import nn
from stretto.models.foreign import ForeignStack

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))

def build(spec):
    torch.manual_seed(1)
    blocks = [Layer() for _ in range(3)]
    return ForeignStack(embed=nn.Embedding(19, 6), blocks=blocks, head=nn.Linear(6, 19), tensor_rules={})
"""
TRAINING = TrainingSpec(
    steps=4,
    global_batch_size=6,
    sequence_length=5,
    dtype="float64",
    learning_rate=0.2,
    schedule="cosine",
    optimizer="sgd",
    momentum=0.8,
    weight_decay=0.1,
    clip_norm=0.0,
)
METHODS = ("plain", "stash", "spike", "predict", "predict-spike")
Weights = dict[str, Tensor]


@dataclass
class StageVersions:
    """One stage of the emulation: its weights after every update, and its velocity then."""

    weights: list[Weights]
    velocity: list[Weights]
    delay: int

    def forward_weights(self, updates: int, method: str, rate: float) -> Weights:
        at = self.weights[updates]
        if "predict" not in method:
            return at
        return {name: w - rate * self.delay * self.velocity[updates][name] for name, w in at.items()}

    def update(self, gradient: Weights, method: str, rate: float) -> None:
        m = TRAINING.momentum
        a = m**self.delay if "spike" in method else 1.0
        b = sum(m**i for i in range(self.delay)) if "spike" in method else 0.0
        weights, velocity = {}, {}
        for name, w in self.weights[-1].items():
            g = gradient[name] + (TRAINING.weight_decay * w if w.ndim > 1 else 0.0)
            velocity[name] = m * self.velocity[-1][name] + g
            weights[name] = w - rate * (a * velocity[name] + b * g)
        self.weights.append(weights)
        self.velocity.append(velocity)


def emulate(initial: Weights, steps: list[list[Batch]], method: str) -> tuple[list[float], Weights]:
    """Losses of the stretches and final weights."""
    owner = {
        name: 0 if "inputs" in name else STAGES - 1 if "outputs" in name else int(name.split(".")[1])
        for name in initial
    }
    stages = []
    for s in range(STAGES):
        own = {name: w.clone() for name, w in initial.items() if owner[name] == s}
        stages.append(StageVersions([own], [{n: torch.zeros_like(w) for n, w in own.items()}], STAGES - 1 - s))
    losses = []
    for step, batches in enumerate(steps, 1):
        rate, start, loss = learning_rate(TRAINING, step), len(stages[0].weights) - 1, 0.0
        for m, batch in enumerate(batches):
            early = [s.forward_weights(start + max(0, m - s.delay), method, rate) for s in stages]
            late = [s.weights[-1] if method != "stash" else e for s, e in zip(stages, early, strict=True)]
            found, gradients = by_hand(batch, early, late)
            loss += found
            for stage in stages:
                stage.update({name: gradients[name] for name in stage.weights[-1]}, method, rate)
        losses.append(loss / sum(int((b.labels != IGNORE).sum()) for b in batches))
    return losses, {name: w for stage in stages for name, w in stage.weights[-1].items()}


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_a_compensated_gradient_moves_weights_as_far_as_one_in_time(delay: int) -> None:
    """From its arrival on, and not before; a v alone, as in ``plain``, stays behind for good."""
    m, (a, b) = TRAINING.momentum, spike(TRAINING.momentum, delay)
    moved = {"in time": 0.0, "late": 0.0}
    velocity = dict(moved)
    for update in range(delay + 8):
        for name, arrival, kept, added in (("in time", 0, 1.0, 0.0), ("late", delay, a, b)):
            g = float(update == arrival)
            velocity[name] = m * velocity[name] + g
            moved[name] += kept * velocity[name] + added * g
        assert (moved["late"] == pytest.approx(moved["in time"])) == (update >= delay)


def by_hand(batch: Batch, early: list[Weights], late: list[Weights]) -> tuple[float, Weights]:
    """Summed loss, and gradients of the mean: forward with ``early``, backward with ``late`` weights."""
    tokens, labels = batch.tokens.reshape(-1), batch.labels.reshape(-1)
    valid = labels != IGNORE
    x, kept = named(early[0], "inputs", 2)[tokens], []
    for s in range(STAGES):
        t = torch.tanh(x @ named(early[s], "blocks", 2).T + named(early[s], "blocks", 1))
        kept.append((x, t))
        x = x + t
    logits = x @ named(early[-1], "outputs", 2).T + named(early[-1], "outputs", 1)
    logs = logits - logits.logsumexp(1, keepdim=True)
    rows = torch.arange(len(tokens))
    loss = -float(logs[rows, labels.clamp(min=0)][valid].sum())
    dz = logs.exp()
    dz[rows, labels.clamp(min=0)] -= 1
    dz = dz * valid[:, None] / max(1, int(valid.sum()))
    found = {("outputs", 2): dz.T @ x, ("outputs", 1): dz.sum(0)}
    gradients: Weights = {}
    for name, w in early[-1].items():
        if "outputs" in name:
            gradients[name] = found["outputs", w.ndim]
    dx = dz @ named(late[-1], "outputs", 2)
    for s in reversed(range(STAGES)):
        x, t = kept[s]
        dz = dx * (1 - t * t)
        for name, w in early[s].items():
            if "blocks" in name:
                gradients[name] = dz.T @ x if w.ndim == 2 else dz.sum(0)
        dx = dx + dz @ named(late[s], "blocks", 2)
    name = next(name for name in early[0] if "inputs" in name)
    gradients[name] = torch.zeros_like(early[0][name]).index_add_(0, tokens, dx)
    return loss, gradients


def named(weights: Weights, part: str, ndim: int) -> Tensor:
    return next(w for name, w in weights.items() if part in name and w.ndim == ndim)


def run_of(module: Path, plan: dict[str, Any]) -> RunSpec:
    model = ModelSpec(family="foreign", module=f"{module}:build", vocab_size=VOCABULARY, num_layers=STAGES)
    return RunSpec(run=RunSettings(seed=5), model=model, plan=PlanSpec(**plan), training=TRAINING)


def train_on_rank(rank: int, world: int, runs: list[RunSpec]) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        session = Session.start(run, rank)
        initial = plain([p for m in session.model.masters for p in m.pieces("model", m.tensor)])
        results = []
        for step in range(1, STEPS + 1):
            results.append(session.train_step(step, batches_of(run, step, session.mesh.dp_index, documents=False)))
        weights = plain([p for m in session.model.masters for p in m.pieces("model", m.tensor)])
        found.append({"initial": initial, "weights": weights, "results": results, "updates": session.step.updates})
    return found


def joined(run: RunSpec, step: int) -> list[Batch]:
    """Micro-batch m of all replicas as one."""
    replicas = [batches_of(run, step, index, documents=False) for index in range(run.plan.dp)]
    return [
        Batch(
            **{n: torch.cat([getattr(b, n) for b in same]) for n in ("tokens", "labels", "positions", "samples")},
            documents=None,
        )
        for same in zip(*replicas, strict=True)
    ]


def test_every_method_is_its_recurrence(ranks: Ranks, tmp_path: Path) -> None:
    module = tmp_path / "three_layers.py"
    module.write_text(MODULE)
    pipeline = {"pp": STAGES, "stages": (1, 1, 1)}
    several = [run_of(module, {**pipeline, "asynchronous": method}) for method in METHODS]
    wide = [run_of(module, {**pipeline, "asynchronous": "predict-spike", "dp_replicate": 2})]
    outcomes: list[Weights] = []
    for runs in (several, wide):
        found = ranks.run(train_on_rank, runs[0].plan.num_ranks, runs)
        for at, run in enumerate(runs):
            mine = [each[at] for each in found]
            initial = together([each["initial"] for each in mine])
            steps = [joined(run, step) for step in range(1, STEPS + 1)]
            losses, weights = emulate(initial, steps, run.plan.asynchronous)
            results = mine[0]["results"]
            assert [r.loss for r in results] == pytest.approx(losses, rel=TOLERANCE)
            assert all(math.isnan(r.grad_norm) for r in results) and mine[0]["updates"] == sum(map(len, steps))
            outcomes.append(together([each["weights"] for each in mine]))
            assert outcomes[-1].keys() == weights.keys()
            assert max(error(outcomes[-1][name], weights[name]) for name in weights) <= TOLERANCE
    # The methods are different training, as they say.
    for a in range(len(METHODS)):
        for b in range(a):
            assert max(error(outcomes[a][name], outcomes[b][name]) for name in outcomes[a]) > 1e-5


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"optimizer": "adamw"}, ConfigError, 'not of adamw; set training.optimizer = "sgd"'),
    ({}, {"clip_norm": 1.0}, ConfigError, "there is no norm to clip by"),
    ({"schedule": "zb-h1"}, {}, UnsupportedError, 'needs plan.schedule = "1f1b"'),
    ({"dp_shard": 2}, {}, UnsupportedError, "needs plan.dp_shard = 1"),
    ({"recompute": "full"}, {}, UnsupportedError, 'needs plan.recompute = "none"'),
    ({}, {"dtype": "bfloat16"}, UnsupportedError, "may be float32 or float64"),
]


@pytest.mark.parametrize(("plan", "training", "kind", "said"), REFUSED)
def test_what_can_t_be_asynchronous_is_refused(
    plan: dict[str, Any], training: dict[str, Any], kind: type[Exception], said: str
) -> None:
    run = RunSpec(
        model=LLAMA,
        plan=PlanSpec(**{"pp": 2, "asynchronous": "spike", **plan}),
        training=replace(TRAINING, **training),
    )
    with pytest.raises(kind, match=said):
        check(run, data=False)
