"""Looking into a checkpoint without loading tensors, and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto.checkpoint.manifest import StoredTensor, find_damage, read_manifest
from stretto.checkpoint.retention import damage_error


def read_state(path: Path) -> dict[str, Any]:
    """The state that ``save`` was given, plus its ``step``; raises CheckpointError."""
    manifest = read_manifest(Path(path))
    return {**manifest.state, "step": manifest.step}


def list_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """Global name -> shape and dtype of every tensor of the checkpoint; raises CheckpointError."""
    return read_manifest(Path(path)).tensors


def verify(path: Path) -> None:
    """Read every file of the checkpoint; raise CheckpointError naming the first that is damaged."""
    path = Path(path)
    fault = find_damage(path, read_manifest(path))
    if fault is not None:
        raise damage_error(path, fault)
