"""What is optimised, how fast, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float64", "float32", "bfloat16"]
Optimizer = Literal["adamw", "sgd"]
RateSchedule = Literal["constant", "cosine", "wsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """The optimisation, independent of the plan."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    global_batch_size: int = 8
    """Sequences per step over the whole mesh, independent of the plan."""
    sequence_length: int = 128
    """Tokens per sequence."""
    dtype: DType = "float32"
    """Arithmetic of the model; bfloat16 keeps float32 master weights, moments and gradient reduction."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: RateSchedule = "constant"
    """Learning rate over the steps: constant, cosine, or wsd (warmup, stable, decay)."""
    warmup_steps: int = 0
    """Steps of linear warm-up, in every schedule."""
    decay_steps: int = 0
    """Steps of the final linear decay of wsd; 0: a tenth of all steps."""
    min_learning_rate: float = 0.0
    """Where cosine and wsd end."""
    optimizer: Optimizer = "adamw"
    """What updates the weights: adamw, or sgd with momentum (its decay is added to the gradient, as in torch)."""
    momentum: float = 0.9
    """SGD's decay of the velocity."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled decay, applied to weights of two or more dims, never to norms and biases."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: no clipping."""
    freeze: tuple[str, ...] = ()
    """Parameters that don't train, by patterns of their names: ``["inputs.*", "blocks.0.*"]``; they get no gradient,
    have no moments, and are kept in checkpoints like any other."""
    eval_every: int = 0
    """Evaluate on the held-out split each so many steps; 0: never."""
    eval_steps: int = 4
    """Global batches in one evaluation."""
