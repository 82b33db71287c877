"""Between checkpoints and Hugging Face directories, on one process and without an accelerator."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from stretto.assemble.rank_model import Precision
from stretto.checkpoint import save
from stretto.checkpoint.safetensors import HuggingFaceReader, write_directory
from stretto.checkpoint.weights import find_stored, read_weights
from stretto.data import load_tokenizer
from stretto.models.build import build_model
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError
from stretto.spec.resolve import read_model
from stretto.spec.run import RunSpec
from stretto.spec.sharding import Sharding
from stretto.trainer.optimizer import MOMENTS


def convert(source: str, target: str, *, dtype: str | None = None) -> Path:
    """Write the model of ``source`` to the new directory ``target`` in the other format.

    Args:
        source: a run's directory or a checkpoint (becomes a Hugging Face directory), or a Hugging
            Face directory (becomes a checkpoint of step 0 that any plan starts from).
        dtype: type of the written weights; None: as they are.

    Raises:
        CheckpointError: if the source can't be read or the target exists.
    """
    folder = Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and isn't empty; name a new directory.")
    kind = None if dtype is None else Precision.of(dtype).compute
    stored = find_stored(source)
    if stored is None:
        return _to_checkpoint(Path(source), folder, kind)
    tokenizer = None if stored.tokenizer == "bytes" else _tokenizer_file(stored.tokenizer)
    write_directory(folder, stored.model, read_weights(stored), dtype=kind, tokenizer=tokenizer)
    return folder


def _tokenizer_file(name: str) -> Path | None:
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if path.exists() else None


def _to_checkpoint(source: Path, folder: Path, dtype: torch.dtype | None) -> Path:
    """Weights as they are, moments zero, step 0."""
    spec = read_model(source)
    tokenizer = source / "tokenizer.json"
    name = str(tokenizer) if tokenizer.exists() else "bytes"
    pieces = []
    with torch.device("meta"):
        stack = build_model(spec)
    with HuggingFaceReader(source, spec) as reader:
        for parameter, meta in stack.named_parameters():  # type: ignore[attr-defined]
            values = reader.read(Sharding.whole(parameter, tuple(meta.shape)))
            values = values if dtype is None else values.to(dtype)
            kinds = {"model": values, **{f"optimizer.{m}": torch.zeros_like(values) for m in MOMENTS}}
            for kind, tensor in kinds.items():
                shape = tuple(tensor.shape)
                pieces.append(Piece(name=f"{kind}.{parameter}", shape=shape, offset=(0,) * len(shape), tensor=tensor))
    run = RunSpec()
    state = {
        "seed": run.run.seed,
        "tokens_seen": 0,
        "optimizer_steps": 0,
        "tokenizer": load_tokenizer(name).fingerprint,
        "corpus": "",
        "model": asdict(spec),
        "plan": asdict(run.plan),
        "training": asdict(run.training),
        "data": {"tokenizer": name},
    }
    return save(folder, step=0, pieces=pieces, state=state)
