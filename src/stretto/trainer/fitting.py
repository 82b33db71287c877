"""Where a run's checkpoints are, which one it goes on from, and whether that one fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stretto.checkpoint import latest
from stretto.spec.errors import CheckpointError
from stretto.spec.run import RunSpec

NOT_COMPARED = {"name", "path", "weights", "module", "dropout", "initial_std"}
"""Model fields that may differ between a checkpoint and the run that goes on from it."""


def checkpoint_folder(run: RunSpec) -> Path:
    """Where checkpoints of a run are."""
    return Path(run.checkpoint.dir) if run.checkpoint.dir else Path(run.run.dir) / "checkpoints"


def find_checkpoint(run: RunSpec) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` names, or None to start anew."""
    if run.checkpoint.resume == "never":
        return None
    if run.checkpoint.resume == "auto":
        return latest(checkpoint_folder(run))
    path = Path(run.checkpoint.resume)
    if not path.exists():
        newest = latest(path.parent)
        hint = f"; the newest there is {newest}" if newest else ""
        raise CheckpointError(
            f"checkpoint {path} does not exist{hint}. checkpoint.resume may be auto, never or a path."
        )
    return path if (path / "manifest.json").exists() else latest(path) or path


def check_fits(run: RunSpec, state: Mapping[str, Any], path: Path, *, tokenizer: str | None = None) -> None:
    """Refuse a checkpoint that another run's settings wrote, naming what differs."""
    mine, theirs = _settled(asdict(run.model)), _settled(state["model"])
    differing = [k for k in mine if k not in NOT_COMPARED and _plain(mine[k]) != theirs.get(k)]
    if differing:
        listed = ", ".join(f"{k} is {theirs.get(k)} there and {mine[k]} here" for k in differing)
        raise CheckpointError(
            f"checkpoint {path} is of another model: {listed}. "
            "Use its model, another run.dir, or checkpoint.resume = never."
        )
    if tokenizer is not None and state["tokenizer"] != tokenizer:
        raise CheckpointError(
            f"checkpoint {path} was trained with another tokenizer ({state['data']['tokenizer']}) than "
            f"data.tokenizer = {run.data.tokenizer}; give that one, another run.dir, or checkpoint.resume = never."
        )
    written = state["training"].get("optimizer", "adamw")
    if written != run.training.optimizer:
        raise CheckpointError(
            f"checkpoint {path} holds what {written} keeps, here training.optimizer = {run.training.optimizer!r}. "
            f"Keep {written!r}, or start another run from the weights (model.weights = a Hugging Face directory)."
        )
    if state["step"] == 0:
        return  # converted weights: no data was read yet
    for key in ("global_batch_size", "sequence_length"):
        here, there = getattr(run.training, key), state["training"][key]
        if here != there:
            raise CheckpointError(
                f"checkpoint {path} was written with training.{key} = {there}, here it is {here}: samples would be "
                f"repeated or skipped. Keep {there}, or start another run from the weights (stretto convert)."
            )
    if state["seed"] != run.run.seed:
        raise CheckpointError(
            f"checkpoint {path} was written with run.seed = {state['seed']}, here it is {run.run.seed}: the order of "
            f"samples would change. Keep {state['seed']}, or set checkpoint.resume = never."
        )


def _settled(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with what an absent one stands for: a directory writes out what a run file may leave away."""
    heads = max(1, model["num_heads"])
    return {
        **model,
        "num_kv_heads": model["num_kv_heads"] or heads,
        "head_dim": model["head_dim"] or model["hidden_size"] // heads,
        "qkv_bias": model["qkv_bias"] or model["family"] == "gpt2",
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
