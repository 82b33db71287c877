"""torch.compile on a part of a model, with its linear layers inside the graphs or between them.

    plan.compile = "regions"    norm │ q k v │ heads, rotary, attention │ o │ + norm │ gate up │ silu * │ down │ +
                                ▔▔▔▔         ▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔       ▔▔▔▔▔▔           ▔▔▔▔▔▔          ▔
    plan.compile = "blocks"     all of it is one piece                       (▔ compiled)

Between linear layers, weight gradients stay what they are: products that W computes later, straight into the gradient
buffer.  A whole layer is one graph there and one back, so its backward is one operation: I does all of it and W
nothing.  That is no loss under schedules that have no W; under those that do, it costs what W fills.

Out of the graphs stay, in both: embeddings, the head's product, what sends messages (regions of tensor parallelism,
attention over cp), and dropout, whose mask is a function of numbers that each step changes.

Layers of one kind share their graphs.  A graph is made for the sizes that it first sees; when another length comes by,
it is made once more for all lengths (torch calls that automatic dynamic shapes), so a run whose micro-batches are all
of different lengths compiles everything twice, not once per length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stretto.parallel.pipeline.backward import Deferral
from stretto.spec.plan import PlanSpec

Call = Callable[..., Any]


def compiled(call: Call, plan: PlanSpec) -> Call:
    """``call`` as the plan compiles: itself, or what compiles it when it first runs."""
    if plan.compile == "none":
        return call
    made: Call = torch.compile(call, backend=plan.compile_backend)
    return made


def between_linears(module: nn.Module, plan: PlanSpec) -> tuple[Call, Deferral]:
    """How ``module`` is called where linear layers can stash, and what reaches those."""
    return compiled(module, plan), Deferral(module, compiled=plan.compile != "none")


def whole(module: nn.Module, plan: PlanSpec) -> tuple[Call, Deferral]:
    """The same where ``module`` is one piece, in which no linear layer can be reached."""
    return compiled(module, plan), Deferral()
