"""The learning rate as a function of the step.

constant   ▁▃▅▇▇▇▇▇▇▇▇▇      cosine   ▁▃▅▇▇▆▆▅▄▃▂▁      wsd   ▁▃▅▇▇▇▇▇▇▆▄▁
           warm-up                                          warm-up, stable, decay (MiniCPM, 2024)
"""

from __future__ import annotations

import math

from stretto.spec.training import TrainingSpec


def learning_rate(training: TrainingSpec, step: int) -> float:
    """Rate of optimizer step ``step`` (from 1).

    >>> learning_rate(TrainingSpec(learning_rate=1.0, warmup_steps=4), 2)
    0.5
    """
    peak, low = training.learning_rate, training.min_learning_rate
    warmup = training.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if training.schedule == "constant":
        return peak
    if training.schedule == "cosine":
        progress = (step - warmup) / max(1, training.steps - warmup)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = training.decay_steps or max(1, training.steps // 10)
    into = step - (training.steps - decay)
    return peak if into <= 0 else peak + (low - peak) * min(1.0, into / decay)
