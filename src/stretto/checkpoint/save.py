"""Writing a checkpoint: beside its place, then into it by one rename.

    rank 0   makes step-000123.tmp-1f0c22aa
    all      write and fsync what they own, each computing its files' checksums
    rank 0   writes manifest.json, fsyncs the folder, renames it to step-000123

A death before the rename leaves a folder that nothing takes for a checkpoint; all earlier
checkpoints stay as they are.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from stretto.checkpoint.agree import from_all, from_first, is_alone, rank_and_size
from stretto.checkpoint.durable import DurableFileSystem, sync_folder, write_durably
from stretto.checkpoint.manifest import FILE_NAME, Manifest, StoredFile, StoredTensor
from stretto.checkpoint.reshard import PieceSavePlanner
from stretto.checkpoint.retention import complete_ones, place, prune
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def save(
    directory: Path,
    *,
    step: int,
    pieces: Sequence[Piece],
    state: Mapping[str, Any],
    group: ProcessGroup | None = None,
    keep: int = 0,
) -> Path:
    """Write the owned ``pieces`` of all ranks and ``state`` as the checkpoint of ``step``.

    Collective over ``group`` (None: all ranks, or this process alone).  ``state`` holds JSON values,
    equal on all ranks.  Older checkpoints beyond ``keep`` are removed (0: none).  Returns the
    checkpoint's folder on every rank.  Raises CheckpointError, on every rank, if it could not be
    written; earlier checkpoints are then untouched.
    """
    directory = Path(directory)
    rank, _ = rank_and_size(group)
    beside, problem = from_first(_make_folder(directory, step) if rank == 0 else None, group)
    if problem:
        raise CheckpointError(problem)
    files = DurableFileSystem()
    metadata, problem = _write_pieces(beside, pieces, files, group)
    reports = from_all((files.files, problem, socket.gethostname()), group)
    outcome: tuple[Path | None, str] | None = None
    if rank == 0:
        try:
            outcome = _finish(directory, beside, _manifest(directory, step, state, metadata, reports), keep), ""
        except (CheckpointError, OSError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            reason = error if isinstance(error, CheckpointError) else _explain(error, directory)
            outcome = None, f"the checkpoint of step {step} could not be written: {reason}; earlier ones are untouched"
    final, problem = from_first(outcome, group)
    if final is None:
        raise CheckpointError(problem)
    return final


def _make_folder(directory: Path, step: int) -> tuple[Path, str]:
    beside = place(directory, step)
    beside = beside.with_name(f"{beside.name}.tmp-{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        return beside, f"no checkpoint can be written to {directory}: {_explain(error, directory)}"
    return beside, ""


def _write_pieces(
    beside: Path, pieces: Sequence[Piece], files: DurableFileSystem, group: ProcessGroup | None
) -> tuple[Metadata | None, str]:
    writer = dcp.FileSystemWriter(beside, sync_files=False)
    writer.fs = files
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            planner = PieceSavePlanner(pieces)
            return dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=is_alone()), ""
    except CheckpointException as error:
        if files.error is not None:
            return None, _explain(files.error, beside.parent)
        mine = error.failures.get(rank_and_size(group)[0])
        return None, str(mine[0]) if mine is not None else ""


def _manifest(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    metadata: Metadata | None,
    reports: Sequence[tuple[dict[str, StoredFile], str, str]],
) -> Manifest:
    for rank, (_, problem, host) in enumerate(reports):
        if problem:
            raise CheckpointError(f"{problem} (rank {rank} on {host})")
    assert metadata is not None
    tensors = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        dtype = str(stored.properties.dtype).removeprefix("torch.")
        tensors[name] = StoredTensor(shape=tuple(stored.size), dtype=dtype)
    files = {name: file for mine, _, _ in reports for name, file in mine.items()}
    serial = max((manifest.serial for _, manifest in complete_ones(directory)), default=0) + 1
    return Manifest(step=step, serial=serial, state=state, tensors=tensors, files=files)


def _finish(directory: Path, beside: Path, manifest: Manifest, keep: int) -> Path:
    for name, file in manifest.files.items():
        found = beside / name
        if not found.exists() or found.stat().st_size != file.bytes:
            raise CheckpointError(
                f"{found}, which another rank wrote, is not visible here; "
                "checkpoint.dir must be on a file system that all nodes share"
            )
    write_durably(beside / FILE_NAME, manifest.text())
    sync_folder(beside)
    final = place(directory, manifest.step)
    if final.exists():
        final.rename(final.with_name(f"{final.name}.replaced-{secrets.token_hex(3)}"))
    beside.rename(final)
    sync_folder(directory)
    prune(directory, keep=keep)
    return final


def _explain(error: OSError, directory: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{shutil.disk_usage(directory).free / 1e9:.1f} GB are free"
        except OSError:
            free = "free space is not known"
        return f"the disk of {directory} is full ({free}); free some space or set checkpoint.dir to another disk"
    return f"{error.strerror or error} ({error.filename or directory})"
