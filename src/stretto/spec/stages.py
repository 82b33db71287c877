"""How many layers each pipeline stage holds.

8 layers, pp=3          stage 0 │ stage 1 │ stage 2
plan.stages = None        3     │    3    │   2        even, the rest to the middle, the last lightest
plan.stages = [2, 4, 2]   2     │    4    │   2        as written

Layers of a frozen front (front.py) are no part of them.
"""

from __future__ import annotations

from functools import lru_cache

from stretto.spec.errors import ConfigError
from stretto.spec.front import front_layers
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec


@lru_cache(maxsize=4096)
def balanced(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Split ``num_layers`` as evenly as can be; what is left over goes to the middle stages first.

    The first stage also embeds and the last also holds the head and the loss, so the ends are the
    lightest, and of the two the last.

    >>> balanced(10, 4), balanced(8, 3), balanced(7, 4)
    ((2, 3, 3, 2), (3, 3, 2), (2, 2, 2, 1))
    """
    base, rest = divmod(num_layers, num_stages)
    middle = (num_stages - 1) / 2
    favoured = sorted(range(num_stages), key=lambda stage: (abs(stage - middle), stage))[:rest]
    return tuple(base + (stage in favoured) for stage in range(num_stages))


def stages_of(run: RunSpec) -> tuple[int, ...]:
    """Layers of each stage in order: ``plan.stages``, or the balanced split where that is None."""
    if run.plan.stages is not None:
        return run.plan.stages
    return balanced(run.model.num_layers - front_layers(run), run.plan.num_stages)


def check_stages(plan: PlanSpec, num_layers: int, *, front: int = 0) -> None:
    """ConfigError where the stages of ``plan`` aren't a partition of ``num_layers`` layers behind ``front`` more."""
    held = f"plan.pp={plan.pp}" + (f" x plan.chunks={plan.chunks}" if plan.chunks > 1 else "")
    behind = f" behind the {front} that {'are' if front > 1 else 'is'} computed ahead" if front else ""
    plural = "s" if num_layers > 1 else ""
    if plan.num_stages > num_layers:
        raise ConfigError(
            f"{held} makes {plan.num_stages} pipeline stages, but the model has {num_layers} layer{plural}{behind} and "
            f"each stage needs one; take at most {num_layers} stage{plural}."
        )
    if plan.stages is None:
        return
    written = list(plan.stages)
    good = list(balanced(num_layers, plan.num_stages))
    if len(written) != plan.num_stages:
        raise ConfigError(
            f"plan.stages = {written} names {len(written)} stages, but {held} has {plan.num_stages}; "
            f"write {plan.num_stages} numbers, for example {good}."
        )
    if min(written) < 1:
        raise ConfigError(
            f"plan.stages = {written} has a stage without layers; each needs at least 1, for example {good}."
        )
    if sum(written) != num_layers:
        raise ConfigError(
            f"plan.stages = {written} holds {sum(written)} layers, but the model has {num_layers}{behind}; "
            f"the numbers must sum to {num_layers}, for example {good}."
        )
