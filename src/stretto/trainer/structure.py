"""The structure of a run's model: what it is made of, and which of its parameters train."""

from __future__ import annotations

import torch

from stretto.models.build import build_model
from stretto.spec.contract import Stack
from stretto.spec.run import RunSpec
from stretto.trainer.freezing import freeze


def make_stack(run: RunSpec) -> Stack:
    """The model without storage, unless it is a foreign one that brings its values; frozen as ``training.freeze`` says.

    Raises ConfigError for a pattern of ``training.freeze`` that names no parameter.
    """
    stack = _plain_stack(run)
    freeze(stack, run.training.freeze)
    return stack


def _plain_stack(run: RunSpec) -> Stack:
    if run.model.family != "foreign":
        with torch.device("meta"):
            return build_model(run.model)
    from stretto.models.foreign import load_foreign

    torch.manual_seed(run.run.seed)
    return load_foreign(run.model)
