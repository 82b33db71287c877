"""Which parts of the model this rank holds: stages, and the global parameters inside them.

inputs │ block 0 ... │ ...            │ ... block L-1 │ outputs
├── stage 0 ─────────┼── stage 1 ... ─┼── stage S-1 ──────────┤   placement says which rank holds each
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stretto.spec.contract import Stack
from stretto.spec.sharding import TensorRule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParts:
    """The parts of one stage, by name, in order."""

    index: int
    """Stage number."""
    parts: tuple[str, ...]
    """``inputs``, ``blocks.<i>``, ``outputs``."""


def parts_of_stages(layers: Sequence[int], *, front: int | None = None) -> list[StageParts]:
    """Parts of every stage, given the number of layers of each.

    ``front``: layers that are computed ahead with the embedding, in frozen stages of their own that are numbered
    behind the others (spec/front.py).

    >>> [s.parts for s in parts_of_stages([1, 2])]
    [('inputs', 'blocks.0'), ('blocks.1', 'blocks.2', 'outputs')]
    >>> [s.parts for s in parts_of_stages([1, 1], front=2)]
    [('blocks.2',), ('blocks.3', 'outputs'), ('inputs', 'blocks.0'), ('blocks.1',)]
    """
    stages, at = [], front or 0
    for index, count in enumerate(layers):
        parts = [f"blocks.{i}" for i in range(at, at + count)]
        at += count
        if index == 0 and front is None:
            parts.insert(0, "inputs")
        if index == len(layers) - 1:
            parts.append("outputs")
        stages.append(StageParts(index=index, parts=tuple(parts)))
    if front is not None:
        ahead = [("inputs", *(["blocks.0"] if front else [])), *((f"blocks.{i}",) for i in range(1, front))]
        stages += [StageParts(index=len(layers) + number, parts=parts) for number, parts in enumerate(ahead)]
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


def ranks_of_parts(placement: Sequence[Sequence[int]], stages: Sequence[StageParts]) -> dict[str, tuple[int, ...]]:
    """Pipeline ranks that hold each part, ascending; several where replicas of a stage lie on different ranks.

    >>> ranks_of_parts([(0, 1), (1, 0)], parts_of_stages([1, 1]))["blocks.1"]
    (0, 1)
    """
    return {part: tuple(sorted({replica[s.index] for replica in placement})) for s in stages for part in s.parts}


def holders_of_tied(
    tied: Mapping[str, str], ranks_of_part: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """For each tied parameter, by the name of its original: the pipeline ranks that hold it under any name."""
    holders: dict[str, set[int]] = {}
    for copy, original in tied.items():
        for name in (copy, original):
            ranks = next(ranks for part, ranks in ranks_of_part.items() if name.startswith(part + "."))
            holders.setdefault(original, set()).update(ranks)
    return {original: tuple(sorted(ranks)) for original, ranks in holders.items()}


def owner_of(root: nn.Module, parameter_name: str) -> tuple[nn.Module, str]:
    """The module that registers a parameter, and the parameter's name there."""
    path, _, leaf = parameter_name.rpartition(".")
    return root.get_submodule(path), leaf
