"""Over how many data ranks parameters, gradients and optimizer states are divided, each for itself.

    P = G = O = 1          every rank holds all
    P = G = 1, O = d       ZeRO-1        P = 1, G = O = d    ZeRO-2        P = G = O = d    ZeRO-3
    P = G = 8, O = d       parameters and gradients inside a node, where gathering them is cheap, the states of the
                           optimizer over all ranks (AMSP; Frontier's low-bandwidth partitioning)

A shard of a larger factor lies inside one of a smaller factor, so P divides G and G divides O.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec


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
    """What ``plan.zero`` says; the ranks of cp hold equal parameters, like those of dp_shard.

    >>> of_plan(PlanSpec(dp_shard=8, zero=2))
    StateSharding(parameters=1, gradients=8, optimizer=8)
    """
    shards = plan.dp_shard * plan.cp
    return StateSharding(
        parameters=shards if plan.zero >= 3 else 1, gradients=shards if plan.zero >= 2 else 1, optimizer=shards
    )
