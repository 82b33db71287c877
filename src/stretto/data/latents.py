"""Arrays of clips in files, memory-mapped: ``.npy``, and ``.safetensors`` with one array or several.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name, type, shape, bytes
from and to) and the numbers, so that numpy maps it without another library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stretto.spec import capabilities
from stretto.spec.errors import DataError
from stretto.spec.model import VideoSpec

TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}
"""Of a safetensors file; numpy has no bfloat16, whose bits are the upper half of a float32's."""
LARGEST_HEADER = 100_000_000
"""Bytes; the format allows no longer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """Clips of one array."""

    array: np.ndarray
    """[clips, F, P, C], mapped."""

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.array)

    def __getitem__(self, number: int) -> np.ndarray:
        """One clip, float32 [F, P, C]."""
        clip = np.asarray(self.array[number])
        if clip.dtype == np.uint16:
            return (clip.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return clip.astype(np.float32)


def open_latents(path: Path, shape: VideoSpec) -> list[Latents]:
    """The arrays of a file, in order; DataError where they are no clips of ``shape``."""
    found = []
    for name, array in _arrays(path):
        wanted = (shape.frames, shape.patches, shape.channels)
        if array.ndim != 4 or array.shape[1:] != wanted or not len(array):
            raise DataError(
                f"{name} has shape {list(array.shape)}, but clips are [clips, {', '.join(map(str, wanted))}] "
                "(frames, patches, channels of [model.video]); write it so, or change [model.video]."
            )
        found.append(Latents(array=array))
    return found


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each."""
    if path.suffix == ".safetensors":
        yield from _safetensors(path)
        return
    if path.suffix != ".npy":
        raise DataError(f"{path} is no file of clips; those end in {' or '.join(capabilities.CLIP_SUFFIXES)}.")
    try:
        # Not np.load, which takes a file whose first bytes it does not know for a pickle, and tells how to load that.
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, TypeError) as error:
        raise DataError(f"{path} is no .npy file of numbers, or is cut off.") from error
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise DataError(f"{path} holds {array.dtype}, but clips are float16, float32 or float64.")
    yield str(path), array


def _safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise DataError(f"{path} is no safetensors file, or is cut off.")
        try:
            header = json.loads(file.read(length))
            entries = sorted((name, entry) for name, entry in header.items() if name != "__metadata__")
            known = [(name, str(entry["dtype"]), *_place(entry)) for name, entry in entries]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no safetensors file: its header can't be read.") from error
    if not known:
        raise DataError(f"{path} holds no arrays, so there are no clips in it; remove it, or write clips to it.")
    for name, kind, shape, start, stop in known:
        if kind not in TYPES:
            raise DataError(f"{name} of {path} is {kind}, but clips are {', '.join(TYPES)}.")
        dtype = np.dtype(TYPES[kind])
        if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > size:
            raise DataError(f"{path} is damaged: {name} isn't where its header says.")
        if stop == start:
            raise DataError(f"{name} of {path} has shape {list(shape)}, so it holds no clips; leave it out.")
        yield f"{name} of {path}", np.memmap(path, dtype=dtype, mode="r", offset=8 + length + start, shape=shape)


def _place(entry: Mapping[str, Any]) -> tuple[tuple[int, ...], int, int]:
    """Shape of an array, and its first byte and the one after its last; ValueError where they are none."""
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("not sizes")
    return shape, start, stop
