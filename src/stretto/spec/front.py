"""The frozen front: the first layers of a model that don't train, where they are computed a step ahead.

    inputs │ block 0 │ block 1 │ block 2 ... block 7 │ outputs      plan.passes = ["fill-bubbles"]
    └─────── front ──┘│└─────── plan.stages ───────────────────┘    training.freeze = ["inputs.*", "blocks.[01].*"]

Every pipeline rank that has time computes them for micro-batches of the next step (docs/frozen.md); the pipeline's
stages share the layers behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

FILL = "fill-bubbles"
"""The pass that asks for it."""
ALONE = ("vocabulary", "offload", "freeze", FILL)
"""Passes that it can't have beside it."""


def passes_named(plan: PlanSpec) -> tuple[str, ...]:
    """Names of the passes, without their settings."""
    return tuple(text.partition(":")[0] for text in plan.passes)


def fills(plan: PlanSpec) -> bool:
    """Whether the front is computed a step ahead."""
    return FILL in passes_named(plan)


def layers_ahead(plan: PlanSpec, freeze: Sequence[str], num_layers: int) -> int:
    """Decoder layers of the front; 0 also where nothing is computed ahead.

    A layer counts where one pattern of ``freeze`` alone names all that it has.
    """
    if not fills(plan) or not wholly_frozen("inputs", freeze):
        return 0
    return next((i for i in range(num_layers) if not wholly_frozen(f"blocks.{i}", freeze)), num_layers)


def front_layers(run: RunSpec) -> int:
    """Those of a run."""
    return layers_ahead(run.plan, run.training.freeze, run.model.num_layers)


def front_stages(run: RunSpec) -> int:
    """Frozen stages of the front: one for each of its layers, at least one, for the embedding; 0 without a front."""
    return max(1, front_layers(run)) if fills(run.plan) else 0


def timed(text: str, times: str) -> str:
    """The pass as it is written, with what its layers are taken to cost.

    >>> timed("fill-bubbles:where=front", "0.5+0.5")
    'fill-bubbles:where=front,frozen=0.5+0.5'
    """
    return text if "frozen=" in text else f"{text}{',' if ':' in text else ':'}frozen={times}"


def wholly_frozen(part: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches every name below ``part``, whatever those are.

    >>> wholly_frozen("blocks.1", ["blocks.[01].*"]), wholly_frozen("blocks.1", ["*norm*", "blocks.1.attention.*"])
    (True, False)
    """
    return any(pattern.endswith("*") and fnmatchcase(f"{part}.", pattern) for pattern in patterns)


def check_front(run: RunSpec) -> None:
    """ConfigError where nothing could be computed ahead, UnsupportedError for what can't go with it."""
    plan = run.plan
    if not fills(plan):
        return
    if plan.pp == 1:
        raise ConfigError(
            f"The pass {FILL} computes frozen layers where pipeline ranks wait, but plan.pp = 1 has none that waits; "
            "set plan.pp to 2 or more, or leave the pass out."
        )
    if not wholly_frozen("inputs", run.training.freeze):
        raise ConfigError(
            f"The pass {FILL} computes the frozen front of the model ahead, but training.freeze = "
            f"{list(run.training.freeze)} doesn't freeze the embedding, with which the front begins; "
            'write training.freeze = ["inputs.*", "blocks.0.*"] and so on, or leave the pass out.'
        )
    if front_layers(run) == run.model.num_layers:
        raise ConfigError(
            f"training.freeze = {list(run.training.freeze)} freezes all {run.model.num_layers} layers, so that the "
            f"pass {FILL} leaves none to the pipeline; freeze fewer."
        )
    for wrong, what, choice in _impossible(run):
        if wrong:
            raise UnsupportedError(
                f"The pass {FILL} can't go with {what} in this version; {choice}, or leave the pass out."
            )


def _impossible(run: RunSpec) -> list[tuple[bool, str, str]]:
    """What can't go with the front: whether it is there, its name, what to do."""
    plan, named = run.plan, passes_named(run.plan)
    other = next((name for name in named if name in ALONE and (name != FILL or named.count(FILL) > 1)), "")
    searched = plan.schedule == "auto" and plan.schedule_file is None
    return [
        (bool(other), f"the pass {other}" if other != FILL else "itself, a second time", "leave that one out"),
        (plan.offload, "plan.offload = true", "set plan.offload = false"),
        (not plan.optimizer_barrier, "plan.optimizer_barrier = false", "set plan.optimizer_barrier = true"),
        (plan.asynchronous != "none", f'plan.asynchronous = "{plan.asynchronous}"', 'set plan.asynchronous = "none"'),
        (plan.context_groups != "static", 'plan.context_groups = "dynamic"', 'set plan.context_groups = "static"'),
        (plan.schedule == "skip-pipe", 'plan.schedule = "skip-pipe"', "take a family that leaves out no stage"),
        (searched, 'plan.schedule = "auto"', "name a family or plan.schedule_file"),
        (run.model.family == "foreign", "a foreign model", "take a model of this version's families"),
    ]
