"""The checks of ``plan.shard_parameters``, ``shard_gradients`` and ``shard_optimizer``."""

from __future__ import annotations

from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.states import SHARD_KEYS, of_plan


def check_states(plan: PlanSpec) -> None:
    """ConfigError where states are divided over what isn't there, or across each other."""
    ranks = plan.dp * plan.cp
    for key in SHARD_KEYS:
        factor = getattr(plan, key)
        if factor is not None and (factor < 1 or ranks % factor):
            may = [number for number in range(1, ranks + 1) if ranks % number == 0]
            raise ConfigError(
                f"plan.{key} = {factor} can't divide the {ranks} data rank{'s' if ranks > 1 else ''} (dp_replicate "
                f"{plan.dp_replicate} x dp_shard {plan.dp_shard} x cp {plan.cp}); it may be {_either(may)}."
            )
    of_plan(plan)


def _either(numbers: list[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
