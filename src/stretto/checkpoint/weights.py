"""The weights of a run, whole and on one process, wherever they lie.

A *source* is a run's directory, one checkpoint of it, or a Hugging Face directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stretto.checkpoint.load import load
from stretto.checkpoint.manifest import FILE_NAME
from stretto.checkpoint.read import list_tensors, read_state
from stretto.checkpoint.retention import latest
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError, UnsupportedError
from stretto.spec.model import ModelSpec, RopeScaling, VideoSpec

MODEL = "model."
"""Prefix of weights among the tensors of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checkpoint that a source leads to."""

    path: Path
    """The checkpoint's folder."""
    model: ModelSpec
    """The model that it holds."""
    tokenizer: str
    """``data.tokenizer`` of the run that wrote it."""
    fingerprint: str
    """Fingerprint of that tokenizer."""
    state: Mapping[str, Any]
    """Its whole state."""


def find_stored(source: str | Path) -> Stored | None:
    """The checkpoint that ``source`` leads to; None where it is a Hugging Face directory.

    Raises:
        CheckpointError: if it is neither.
    """
    folder = Path(source)
    if (folder / "config.json").exists():
        return None
    if (folder / FILE_NAME).exists():
        path: Path | None = folder
    else:
        path = latest(folder / "checkpoints") or latest(folder)
    if path is None:
        reason = "holds no whole checkpoint" if folder.is_dir() else "does not exist"
        raise CheckpointError(
            f"{folder} {reason}; name a run's directory, one of its checkpoints, or a Hugging Face directory."
        )
    state = read_state(path)
    fields = dict(state["model"])
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    if fields.get("video"):
        fields["video"] = VideoSpec(**fields["video"])
    return Stored(
        path=path,
        model=ModelSpec(**fields),
        tokenizer=state["data"]["tokenizer"],
        fingerprint=state["tokenizer"],
        state=state,
    )


def read_weights(stored: Stored, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All weights of a checkpoint by global name, in ``dtype`` or as stored."""
    if stored.model.family == "foreign":
        raise UnsupportedError(
            f"{stored.path} holds a foreign model ({stored.model.module}); its weights are read by the code that "
            "builds it. Families that can be read here: llama, gpt2."
        )
    found: dict[str, Tensor] = {}
    pieces = []
    for name, tensor in list_tensors(stored.path).items():
        if name.startswith(MODEL):
            values = torch.empty(tensor.shape, dtype=dtype or getattr(torch, tensor.dtype))
            found[name.removeprefix(MODEL)] = values
            pieces.append(Piece(name=name, shape=tensor.shape, offset=(0,) * len(tensor.shape), tensor=values))
    load(stored.path, pieces)
    return found
