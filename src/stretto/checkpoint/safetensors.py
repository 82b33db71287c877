"""Hugging Face directories: reading slices of one, writing a whole one.

A rank reads only the rectangle that it holds, straight out of the memory-mapped file, so a model
larger than the machine's memory loads sharded.  Writing fills a temporary directory beside the
target, syncs it and renames it: the target exists whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stretto.models.hugging_face import (
    BODY_PREFIXES,
    HARMLESS_SUFFIXES,
    HuggingFaceTensor,
    hugging_face_tensors,
    parameter_shapes,
)
from stretto.spec.errors import CheckpointError
from stretto.spec.hugging_face import config_from_model

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.model import ModelSpec
    from stretto.spec.sharding import Sharding

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def files_of(directory: Path) -> dict[str, Path]:
    """Return tensor name -> file of a Hugging Face directory, by its index if it has one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give a Hugging Face directory with safetensors.")
    if (directory / INDEX).is_file():
        try:
            weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory / INDEX} is damaged: {error}.") from None
        missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}, which {INDEX} names.")
        return {name: directory / file for name, file in weight_map.items()}
    if not (directory / SINGLE).is_file():
        found = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        beside = f"; it has {', '.join(found)}, which is not read" if found else ""
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}{beside}.")
    with opened(directory / SINGLE) as file:
        return dict.fromkeys(file.keys(), directory / SINGLE)


def opened(path: Path) -> Any:
    """Open a safetensors file; CheckpointError where it is damaged or truncated."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}).") from None


class HuggingFaceReader(contextlib.AbstractContextManager["HuggingFaceReader"]):
    """Reads parameters of ``spec`` out of a Hugging Face directory.

    Opening checks names and shapes of all tensors (the headers only).  Raises CheckpointError for a
    missing, misshapen or unexpected tensor, all in one message.
    """

    def __init__(self, directory: str | Path, spec: ModelSpec) -> None:
        self.directory = Path(directory)
        self.places = hugging_face_tensors(spec)
        self.shapes = parameter_shapes(spec)
        self.files = files_of(self.directory)
        self.handles: dict[Path, Any] = {}
        self.check(tied=spec.tied_embeddings)

    def check(self, *, tied: bool) -> None:
        """Raise CheckpointError unless the directory holds exactly the tensors of the model."""
        wrong: list[str] = []
        known = {"lm_head.weight"} if tied else set()
        for name, place in self.places.items():
            stored = self.stored_name(place)
            if stored is None:
                wrong.append(f"{place.name} is missing")
                continue
            known.add(stored)
            expected, shape = stored_shape(self.shapes[name], place), self.header(stored).get_shape()
            if tuple(shape) != expected:
                wrong.append(f"{stored} is {list(shape)} where the model has {list(expected)}")
        extra = [name for name in self.files if name not in known and not name.endswith(HARMLESS_SUFFIXES)]
        wrong += [f"{name} has no place in the model" for name in extra]
        wrong = list(dict.fromkeys(wrong))
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise CheckpointError(f"{self.directory} doesn't fit the model: {'; '.join(wrong[:5])}{more}.")

    def stored_name(self, place: HuggingFaceTensor) -> str | None:
        """Return the tensor's name in this directory, with or without the prefix of the body."""
        bare = place.name
        for prefix in BODY_PREFIXES:
            bare = bare.removeprefix(prefix)
        return next((name for name in (place.name, bare) if name in self.files), None)

    def header(self, stored: str) -> Any:
        """Return the safetensors slice object of a stored tensor; nothing is read yet."""
        path = self.files[stored]
        if path not in self.handles:
            self.handles[path] = opened(path)
        try:
            return self.handles[path].get_slice(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{path} lacks {stored}, which {INDEX} promises ({error}).") from None

    def read(self, sharding: Sharding) -> Tensor:
        """Return the slice of the parameter that ``sharding`` describes, contiguous, in the stored dtype."""
        assert sharding.shape == self.shapes[sharding.name], f"{sharding.name} is {self.shapes[sharding.name]}"
        place = self.places[sharding.name]
        stored = self.stored_name(place)
        assert stored is not None
        starts = list(sharding.slice.offset)
        starts[0] += place.part * sharding.shape[0]
        ranges = [slice(start, start + n) for start, n in zip(starts, sharding.slice.length, strict=True)]
        if place.transposed:
            ranges.reverse()
        header = self.header(stored)
        if sharding.slice.numel == 0:
            dtype = header[(slice(0, 1),) * len(ranges)].dtype
            return torch.empty(sharding.slice.length, dtype=dtype)
        tensor = header[tuple(ranges)]
        return (tensor.t() if place.transposed else tensor).contiguous()

    def close(self) -> None:
        """Unmap the files."""
        self.handles.clear()

    def __exit__(self, *exception: object) -> None:
        """Unmap the files."""
        self.close()


def stored_shape(shape: tuple[int, ...], place: HuggingFaceTensor) -> tuple[int, ...]:
    """Return the shape that a Hugging Face tensor has when ours has ``shape``."""
    whole = (shape[0] * place.parts, *shape[1:])
    return whole[::-1] if place.transposed else whole


def write_directory(
    directory: str | Path,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor] | Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
    tokenizer: str | Path | None = None,
) -> None:
    """Write config.json and safetensors that transformers loads; one shard at a time is in memory.

    ``tensors`` gives whole parameters by global name (tied copies aren't asked for); ``dtype``
    converts them; ``tokenizer`` is copied to tokenizer.json.  Raises CheckpointError where
    ``directory`` exists already and isn't empty.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; choose another directory or remove it first.")
    get = tensors if callable(tensors) else tensors.__getitem__
    config = config_from_model(spec)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        config["torch_dtype"] = write_shards(temporary, spec, get, dtype=dtype, max_shard_bytes=max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_shards(
    directory: Path, spec: ModelSpec, get: Callable[[str], Tensor], *, dtype: torch.dtype | None, max_shard_bytes: int
) -> str:
    """Write the weights, and an index where there is more than one file; return the dtype's name."""
    parts: dict[str, list[tuple[str, HuggingFaceTensor]]] = defaultdict(list)
    for name, place in hugging_face_tensors(spec).items():
        if not (spec.tied_embeddings and name == "outputs.head.weight"):
            parts[place.name].append((name, place))
    stored_dtype = dtype or get("inputs.tokens.weight").dtype
    shards = plan_shards(spec, parts, stored_dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: assemble(parts[name], get).to(stored_dtype).contiguous() for name in names}
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return str(stored_dtype).removeprefix("torch.")


def plan_shards(
    spec: ModelSpec, parts: Mapping[str, list[tuple[str, HuggingFaceTensor]]], itemsize: int, max_shard_bytes: int
) -> list[list[str]]:
    """Group tensor names, in order, into files of at most ``max_shard_bytes`` (or of one tensor)."""
    shapes = parameter_shapes(spec)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, pieces in parts.items():
        size = sum(torch.Size(shapes[ours]).numel() for ours, _ in pieces) * itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def assemble(pieces: list[tuple[str, HuggingFaceTensor]], get: Callable[[str], Tensor]) -> Tensor:
    """Return the Hugging Face tensor that consists of our ``pieces``."""
    ordered = sorted(pieces, key=lambda piece: piece[1].part)
    whole = torch.cat([get(name).detach().cpu() for name, _ in ordered])
    return whole.t() if ordered[0][1].transposed else whole


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
