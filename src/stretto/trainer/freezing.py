"""Frozen parameters: ``training.freeze`` names them, by patterns such as ``blocks.0.*``.

    inputs │ block 0 │ block 1 │ block 2 │ block 3 │ outputs        freeze = ["inputs.*", "blocks.0.*", "*.norm*"]
    frozen   frozen     trained, but for its norms ...
    └─ stage 0 ──────┘└─ stage 1 ────────┘└─ stage 2 ──────┘        stage 0 has no backward

A frozen parameter has no gradient and no moments; checkpoints hold it like any other.  Where everything up to
some part of the model is frozen, nobody needs the gradient of that part's input, so none is computed, and the parts
before it keep nothing of their forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from stretto.assemble.split import parts_of_stages
from stretto.parallel.pipeline.stage import Stage
from stretto.schedule.schedule import Schedule
from stretto.spec.contract import Stack
from stretto.spec.errors import ConfigError, nearest
from stretto.spec.front import fills, front_layers
from stretto.spec.run import RunSpec
from stretto.spec.stages import stages_of


def freeze(stack: Stack, patterns: Sequence[str]) -> None:
    """Take the gradient from every parameter whose name matches one of ``patterns``.

    A tied weight goes by the name of its original.  Raises ConfigError for a pattern that matches none, and where
    nothing is left to train.
    """
    module: Any = stack
    named = dict(module.named_parameters())
    original = {name: stack.tied.get(name, name) for name in named}
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(original[name], pattern)]
        if not found:
            raise ConfigError(_no_match(pattern, named, stack.tied))
        for name in found:
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(f"training.freeze = {list(patterns)} leaves nothing to train; freeze fewer parameters.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns names a parameter."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def trained_parts(stack: Stack) -> set[str]:
    """The parts of the model with a parameter that trains: ``inputs``, ``blocks.<i>``, ``outputs``."""
    module: Any = stack
    named = module.named_parameters(remove_duplicate=False)
    return {_part(name) for name, parameter in named if parameter.requires_grad}


def frozen_stages(run: RunSpec, stack: Stack) -> tuple[int, ...]:
    """The first stages, as far as none of their parameters trains."""
    trained = trained_parts(stack)
    front = front_layers(run) if fills(run.plan) else None
    stages = parts_of_stages(stages_of(run), front=front)
    first = next(s.index for s in stages if not trained.isdisjoint(s.parts))
    return tuple(range(first))


def spare(stages: Mapping[int, Stage], schedule: Schedule, trained: set[str], *, rows: bool = False) -> None:
    """Let segments compute no gradient of inputs that are made of frozen parts alone.

    Args:
        trained: the parts of the whole model that train, before other ranks' parts were dropped.
        rows: whether ``inputs`` begin with rows of an embedding that trains on other ranks.
    """
    if schedule.paths is not None:
        return  # what comes before a part is then another thing for every micro-batch
    first = min(map(_place, trained))
    for stage in stages.values():
        if schedule.frozen.issuperset(range(stage.index)):  # no rank waits for the gradient of its input
            for segment in stage.segments:
                behind = rows and segment.name == "inputs"
                segment.needs_input_gradient = behind or _place(segment.name) > first


def _place(part: str) -> float:
    """Where a part comes in the model."""
    if part in ("inputs", "outputs"):
        return float("-inf") if part == "inputs" else float("inf")
    return float(part.rpartition(".")[2])


def _part(name: str) -> str:
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


def _no_match(pattern: str, named: Mapping[str, object], tied: Mapping[str, str]) -> str:
    copies = [f"{copy} is tied to {tied[copy]} and goes by that name" for copy in tied if fnmatchcase(copy, pattern)]
    hint = f": {copies[0]}." if copies else nearest(pattern, named) or f"; the first is {next(iter(named))!r}."
    return f"training.freeze: no parameter is named {pattern!r}{hint}"
