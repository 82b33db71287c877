"""Reading a checkpoint into whatever pieces this rank holds, after its checksums were verified."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stretto.checkpoint.agree import from_all, from_first, rank_and_size
from stretto.checkpoint.manifest import Manifest, find_damage, read_manifest
from stretto.checkpoint.reshard import PieceLoadPlanner, PieceReader
from stretto.checkpoint.retention import damage_error
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAMES_SHOWN = 5


def load(path: Path, pieces: Sequence[Piece], *, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Fill the tensors of ``pieces`` in place from checkpoint ``path``; return its state and ``step``.

    Collective over ``group`` (None: all ranks, or this process alone): the ranks share the work of
    verifying.  ``pieces`` may cut the tensors in any way, leave some out and have other dtypes than
    those stored.  Raises CheckpointError, on every rank, if a file is damaged or missing, or if a
    piece's name or global shape is not in the checkpoint.
    """
    path = Path(path)
    manifest = _manifest_on_all(path, group)
    _raise_first(_mismatch(path, manifest, pieces), group)
    _verify_together(path, manifest, group)
    _raise_first(_read(path, pieces), group)
    return {**manifest.state, "step": manifest.step}


def _read(path: Path, pieces: Sequence[Piece]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({}, storage_reader=PieceReader(path), planner=PieceLoadPlanner(pieces), no_dist=True)
    except (Exception, CheckpointException) as error:
        return f"checkpoint {path} could not be read: {error}"
    return ""


def _manifest_on_all(path: Path, group: ProcessGroup | None) -> Manifest:
    manifest, fault = None, None
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        fault = str(error)
    faults = [f for f in from_all(fault, group) if f is not None]
    if manifest is None or faults:
        _raise_damage(path, faults[0], group)
    assert manifest is not None
    return manifest


def _raise_damage(path: Path, fault: str, group: ProcessGroup | None) -> NoReturn:
    """Raise on every rank; rank 0 alone reads the other checkpoints to find a good one."""
    is_first = rank_and_size(group)[0] == 0
    raise CheckpointError(from_first(str(damage_error(path, fault)) if is_first else None, group))


def _verify_together(path: Path, manifest: Manifest, group: ProcessGroup | None) -> None:
    """Each rank reads its share of the files, balanced by length."""
    rank, size = rank_and_size(group)
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name in sorted(manifest.files, key=lambda n: (-manifest.files[n].bytes, n)):
        lightest = loads.index(min(loads))
        shares[lightest].append(name)
        loads[lightest] += manifest.files[name].bytes
    faults = [f for f in from_all(find_damage(path, manifest, shares[rank]), group) if f is not None]
    if faults:
        _raise_damage(path, faults[0], group)


def _mismatch(path: Path, manifest: Manifest, pieces: Sequence[Piece]) -> str:
    wanted = {piece.name: tuple(piece.shape) for piece in pieces}
    missing = sorted(name for name in wanted if name not in manifest.tensors)
    if missing:
        return f"checkpoint {path} lacks {_listed(missing)}: it was written for another model or optimizer"
    other = sorted(
        f"{name} (stored {list(manifest.tensors[name].shape)}, wanted {list(shape)})"
        for name, shape in wanted.items()
        if manifest.tensors[name].shape != shape
    )
    if other:
        return f"checkpoint {path} has other shapes for {_listed(other)}: it was written for another model"
    return ""


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _raise_first(problem: str, group: ProcessGroup | None) -> None:
    for message in from_all(problem, group):
        if message:
            raise CheckpointError(message)
