"""What a checkpoint consists of: the list of its files with their checksums, and the run's state.

The manifest is written last, so a folder without one is not a checkpoint.  It guards itself too: it
holds a checksum of its own content and is accepted only if it is, byte for byte, the canonical text
of what it says.

CRC-32 is the checksum: it finds every flip of up to 32 neighbouring bits, misses other damage with
probability 2^-32, and at 6.8 GB/s costs a fifth of what blake2b does.  It is no defence against
someone who forges a checkpoint on purpose.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stretto.spec.errors import CheckpointError

FORMAT = "stretto.checkpoint/1"
FILE_NAME = "manifest.json"
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file of a checkpoint."""

    bytes: int
    """Its length."""
    crc32: str
    """CRC-32 of its content, eight hexadecimal digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One global tensor of a checkpoint."""

    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    """Name of its torch dtype, ``float32``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything there is to know about a checkpoint without torch."""

    step: int
    """Optimizer steps done."""
    serial: int
    """Counts the checkpoints of a folder in the order they were written, whatever their step: a run
    that goes on from an older step writes newer checkpoints of smaller steps."""
    state: Mapping[str, Any]
    """What the trainer keeps beside tensors."""
    tensors: Mapping[str, StoredTensor]
    """Global tensors by name."""
    files: Mapping[str, StoredFile]
    """All files beside the manifest, by name."""

    def text(self) -> str:
        """The canonical JSON text; raises CheckpointError if the state can't be written as JSON."""
        try:
            content = json.loads(_canonical({"format": FORMAT, **asdict(self)}))
            guard = f"{zlib.crc32(_canonical(content).encode()):08x}"
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the state of a checkpoint must be JSON values: {error}") from error
        return _canonical({"content": content, "crc32": guard})


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the checkpoint in folder ``path``; raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        raw = (path / FILE_NAME).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {FILE_NAME}, which is written last"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path / FILE_NAME} can't be read: {error.strerror}") from error
    damaged = f"{path / FILE_NAME} is damaged: its text and its own checksum disagree"
    try:
        document = json.loads(raw)
        content = document["content"]
        guard = f"{zlib.crc32(_canonical(content).encode()):08x}"
        sound = document["crc32"] == guard and _canonical(document).encode() == raw
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(damaged) from error
    if not sound:
        raise CheckpointError(damaged)
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {content['format']!r}; this version reads {FORMAT!r}")
    tensors = {n: StoredTensor(shape=tuple(t["shape"]), dtype=t["dtype"]) for n, t in content["tensors"].items()}
    files = {n: StoredFile(**f) for n, f in content["files"].items()}
    return Manifest(
        step=content["step"], serial=content["serial"], state=content["state"], tensors=tensors, files=files
    )


def find_damage(path: Path, manifest: Manifest, names: Iterable[str] | None = None) -> str | None:
    """Check files (all, or those in ``names``) of the checkpoint in ``path`` against their checksums.

    Returns the first fault as a clause that starts with the file's path, or None.
    """
    for name in sorted(manifest.files if names is None else names):
        expected, file = manifest.files[name], path / name
        try:
            length = file.stat().st_size
            if length != expected.bytes:
                return f"{file} has {length} bytes, written were {expected.bytes}"
            found = _crc32_of(file)
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} can't be read: {error.strerror}"
        if found != expected.crc32:
            return f"{file} is damaged or from another step: its checksum is {found}, written was {expected.crc32}"
    return None


def looks_complete(path: Path) -> bool:
    """Whether ``path`` holds a sound manifest and files of the lengths it names (content not read)."""
    try:
        manifest = read_manifest(path)
        return all((path / name).stat().st_size == file.bytes for name, file in manifest.files.items())
    except (CheckpointError, OSError):
        return False


def _crc32_of(file: Path) -> str:
    value = 0
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := stream.readinto(view):
            value = zlib.crc32(view[:count], value)
    return f"{value:08x}"


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, allow_nan=False, ensure_ascii=True, indent=1, sort_keys=True)
