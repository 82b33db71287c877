"""Which checkpoints of a folder there are, which is the newest, and which may go.

step-000100                  complete
step-000200                  complete
step-000300.tmp-1f0c22aa     being written, or left by a save that died
step-000200.replaced-9be41d  complete; kept only while another one takes its name
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from stretto.checkpoint.manifest import Manifest, find_damage, looks_complete, read_manifest
from stretto.spec.errors import CheckpointError

_COMPLETE = re.compile(r"step-\d+(\.replaced-[0-9a-f]+)?")
_LEFTOVER = re.compile(r"step-\d+\.tmp-[0-9a-f]+")


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lives."""
    return directory / f"step-{step:06d}"


def complete_ones(directory: Path) -> list[tuple[Path, Manifest]]:
    """All checkpoints with a sound manifest, oldest written first."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            if _COMPLETE.fullmatch(path.name):
                with contextlib.suppress(CheckpointError):
                    found.append((path, read_manifest(path)))
    return sorted(found, key=lambda one: (one[1].serial, one[1].step))


def latest(directory: Path) -> Path | None:
    """The checkpoint in ``directory`` that was written last and is complete, or None.

    Contents are not read here; ``load`` verifies them.
    """
    for path, _ in reversed(complete_ones(Path(directory))):
        if looks_complete(path):
            return path
    return None


def previous_good(path: Path) -> Path | None:
    """The newest checkpoint beside ``path``, other than it, whose every file is sound (all are read)."""
    for other, manifest in reversed(complete_ones(path.parent)):
        if other.resolve() != path.resolve() and find_damage(other, manifest) is None:
            return other
    return None


def damage_error(path: Path, fault: str) -> CheckpointError:
    """The error for a damaged checkpoint, which offers the previous good one."""
    other = previous_good(path)
    offer = (
        f"the previous good checkpoint is {other} (set checkpoint.resume to it)"
        if other is not None
        else f"there is no other good checkpoint in {path.parent}"
    )
    return CheckpointError(f"checkpoint {path.name} can't be used: {fault}; {offer}")


def prune(directory: Path, *, keep: int) -> None:
    """Remove the oldest checkpoints beyond ``keep`` (0: keep all) and what dead saves left behind.

    Nothing complete is removed unless the newest one still has all its files.
    """
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    found = [path for path, _ in complete_ones(directory)]
    if not found or not looks_complete(found[-1]):
        return
    names = {path.name for path in found}
    for path in found[:-1]:
        replaced = ".replaced-" in path.name and path.name.split(".")[0] in names
        if replaced or (keep > 0 and path in found[:-keep]):
            remove(path)


def remove(path: Path) -> None:
    """Take a checkpoint away; a death midway leaves a leftover, never a checkpoint that lacks files."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.tmp-dead")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
