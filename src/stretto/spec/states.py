"""Over how many data ranks parameters, gradients and optimizer states are divided, each for itself (AMSP).

    P = G = O = 1          every rank holds all
    P = G = 1, O = d       ZeRO-1        P = 1, G = O = d    ZeRO-2        P = G = O = d    ZeRO-3
    P = G = O = 8 < d      ZeRO-3 inside a node, copies of it across nodes (MiCS; FSDP's hybrid sharding)
    P = G = 8, O = d       parameters and gradients inside a node, where gathering them is cheap, the states of the
                           optimizer over all ranks (AMSP)
    P = 2, G = 8, O = d    three levels of links: two dies, a node, the network (Frontier's low-bandwidth
                           partitioning)

A group is consecutive data ranks (cp innermost, then dp_shard, dp_replicate), so that small ones lie inside a node:

    data ranks     0  1  2  3  4  5  6  7        P = 2, G = 4, O = 8
    parameters     ├──┤  ├──┤  ├──┤  ├──┤        gathered for every micro-batch
    gradients      ├────────┤  ├────────┤        reduce-scattered after every backward pass, pairs first
    optimizer      ├────────────────────┤        reduce-scattered once a step, between ranks of equal gradients

P divides G and G divides O.  A shard of a larger factor then lies inside the same rank's shard of the smaller one:
what a rank updates is a part of the gradients that it has summed, and of the parameters that it keeps.  The other
way round (optimizer states held by fewer ranks than parameters) would spare no communication and the most bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec

SHARD_KEYS = ("shard_parameters", "shard_gradients", "shard_optimizer")
"""Keys of the plan, each of which must be a multiple of the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSharding:
    """Ranks that share one copy of each; ConfigError where one factor doesn't divide the next."""

    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1

    def __post_init__(self) -> None:
        """Refuse shards that would lie across each other."""
        for small, large, names in (
            (self.parameters, self.gradients, "parameters over {} ranks and gradients over {}"),
            (self.gradients, self.optimizer, "gradients over {} ranks and optimizer states over {}"),
        ):
            if large % small:
                raise ConfigError(
                    f"States can't be divided as {names.format(small, large)}, because {large} isn't a multiple of "
                    f"{small}; take factors that divide each other in the order parameters, gradients, optimizer."
                )


def of_plan(plan: PlanSpec) -> StateSharding:
    """What ``plan.zero`` and the ``plan.shard_`` keys say; ConfigError where these factors don't nest.

    A key that isn't given is as ``zero`` says, and no less than the one before.  The ranks of cp hold equal parameters,
    like those of dp_shard.

    >>> of_plan(PlanSpec(dp_shard=8, zero=2))
    StateSharding(parameters=1, gradients=8, optimizer=8)
    >>> of_plan(PlanSpec(dp_shard=8, dp_replicate=4, zero=3, shard_optimizer=32))
    StateSharding(parameters=8, gradients=8, optimizer=32)
    >>> of_plan(PlanSpec(dp_shard=32, shard_parameters=8))
    StateSharding(parameters=8, gradients=8, optimizer=32)
    """
    parameters, gradients, optimizer = _factors(plan)
    return StateSharding(parameters=parameters, gradients=gradients, optimizer=optimizer)


def written(plan: PlanSpec, states: StateSharding) -> PlanSpec:
    """``plan`` with its states divided like ``states``, said by ``zero`` and as few keys beside it as that takes.

    >>> found = written(PlanSpec(dp_shard=32), StateSharding(parameters=8, gradients=8, optimizer=32))
    >>> found.zero, found.shard_parameters, found.shard_gradients, found.shard_optimizer
    (3, 8, 8, None)
    """
    wanted = (states.parameters, states.gradients, states.optimizer)
    zero: Literal[1, 2, 3] = 3 if states.parameters > 1 else 2 if states.gradients > 1 else 1
    plan = replace(plan, zero=zero, shard_parameters=None, shard_gradients=None, shard_optimizer=None)
    for at, key in enumerate(SHARD_KEYS):
        if _factors(plan)[at] != wanted[at]:
            given: dict[str, Any] = {key: wanted[at]}
            plan = replace(plan, **given)
    return plan


def _factors(plan: PlanSpec) -> tuple[int, int, int]:
    """Factors of parameters, gradients and optimizer states, whether they nest or not."""
    shards = plan.dp_shard * plan.cp
    parameters = plan.shard_parameters or (shards if plan.zero >= 3 else 1)
    gradients = plan.shard_gradients or max(parameters, shards if plan.zero >= 2 else 1)
    return parameters, gradients, plan.shard_optimizer or max(gradients, shards)
