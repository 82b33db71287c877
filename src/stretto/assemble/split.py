"""Which parts of the model this rank holds: stages, and the global parameters inside them.

inputs │ block 0 ... │ ...            │ ... block L-1 │ outputs
├── stage 0 ─────────┼── stage 1 ... ─┼── stage S-1 ──────────┤   placement says which rank holds each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stretto.spec.contract import Stack
from stretto.spec.errors import UnsupportedError
from stretto.spec.sharding import TensorRule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParts:
    """The parts of one stage, by name, in order."""

    index: int
    """Stage number."""
    parts: tuple[str, ...]
    """``inputs``, ``blocks.<i>``, ``outputs``."""


def parts_of_stages(layers: Sequence[int]) -> list[StageParts]:
    """Parts of every stage, given the number of layers of each.

    >>> [s.parts for s in parts_of_stages([1, 2])]
    [('inputs', 'blocks.0'), ('blocks.1', 'blocks.2', 'outputs')]
    """
    stages, at = [], 0
    for index, count in enumerate(layers):
        parts = [f"blocks.{i}" for i in range(at, at + count)]
        at += count
        if index == 0:
            parts.insert(0, "inputs")
        if index == len(layers) - 1:
            parts.append("outputs")
        stages.append(StageParts(index=index, parts=tuple(parts)))
    return stages


def rule_of(stack: Stack, module_name: str) -> TensorRule | None:
    """What tensor parallelism does to a module; block indices are written ``*`` in the rules."""
    return stack.tensor_rules.get(generic(module_name))


def generic(name: str) -> str:
    """``blocks.7.attention.q`` -> ``blocks.*.attention.q``."""
    words = name.split(".")
    if words[0] == "blocks" and len(words) > 1:
        words[1] = "*"
    return ".".join(words)


def holders_of_tied(tied: Mapping[str, str], placement: Sequence[int], stages: Sequence[StageParts]) -> dict[str, bool]:
    """For each tied name (copy and original): whether the tie crosses ranks.

    Raises:
        UnsupportedError: where it crosses between other ranks than the first and the last.
    """
    rank_of_part = {part: placement[s.index] for s in stages for part in s.parts}

    def holder(name: str) -> int:
        return next(rank for part, rank in rank_of_part.items() if name.startswith(part + "."))

    crossing: dict[str, bool] = {}
    ends = {0, max(placement)}
    for copy, original in tied.items():
        ranks = {holder(copy), holder(original)}
        if len(ranks) > 1 and ranks != ends:
            raise UnsupportedError(
                f"{copy} is tied to {original}, and their stages lie on the pipeline ranks {min(ranks)} and "
                f"{max(ranks)}; a tie can join only the first and the last rank. Take plan.pp = 2 or 1, or "
                "plan.stages that put both into one stage."
            )
        crossing[copy] = len(ranks) > 1
        crossing[original] = crossing[copy] or crossing.get(original, False)
    return crossing


def owner_of(root: nn.Module, parameter_name: str) -> tuple[nn.Module, str]:
    """The module that registers a parameter, and the parameter's name there."""
    path, _, leaf = parameter_name.rpartition(".")
    return root.get_submodule(path), leaf
