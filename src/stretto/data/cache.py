"""Folders that are built once, whole or not at all, by whichever process comes first.

    build into  <name>.building-<process>   ──►  manifest.json last  ──►  rename to  <name>

The name holds the fingerprint of everything that decides the content, so a folder is never stale: other
inputs have another name.  A file lock lets one process build while the others wait; it ends with its
holder, however that dies.  A folder whose files don't match the manifest is built again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stretto.spec.errors import DataError

FORMAT = "stretto.tokens/1"
"""Written to every manifest; a folder of another format is built again."""
CHECKED_BYTES = 1 << 30
"""Files up to this size are held against their checksum each time; of longer ones only the size is."""


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock ``file``, waiting for whoever has it."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def intact(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder, or None where it isn't there, isn't whole or was damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return None
        for name, facts in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != facts["bytes"] or (size <= CHECKED_BYTES and checksum(folder / name) != facts["crc32"]):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest


def kept(cache: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder ``name`` of the cache and its manifest, built by ``build`` if it isn't there.

    ``build(folder)`` writes its files into the empty folder that it is given and returns facts that are
    added to the manifest.  Whatever it raises leaves the cache as it was.
    """
    folder = cache / name
    if manifest := intact(folder):
        return folder, manifest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.lock"):
            if manifest := intact(folder):
                return folder, manifest
            return folder, _build(folder, build)
    except OSError as error:
        raise DataError(
            f"Token shards can't be kept in {cache}: {error}; data.cache may name another folder."
        ) from error


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    for left in folder.parent.glob(f"{folder.name}.building-*"):  # of a process that died; we hold the lock
        shutil.rmtree(left)
    unfinished = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    unfinished.mkdir()
    try:
        facts = build(unfinished)
        files = {
            file.name: {"bytes": file.stat().st_size, "crc32": checksum(file)} for file in sorted(unfinished.iterdir())
        }
        manifest = {"format": FORMAT, "files": files, **facts}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if folder.exists():  # damaged, or intact() had found it
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest
