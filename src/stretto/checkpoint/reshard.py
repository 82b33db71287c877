"""Pieces of global tensors to torch's plans of what to write and read: any cut to any other.

written by 2 ranks        read by 3 ranks
┌─────────────┐           ┌────┬────┬───┐      each of the 3 reads the overlap
│   rank 0    │           │    │    │   │      of its rectangle with each stored
├─────────────┤    ->     │ 0  │ 1  │ 2 │      one
│   rank 1    │           │    │    │   │
└─────────────┘           └────┴────┴───┘
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=piece.tensor.shape)


def _write_item(piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.name, piece.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(piece),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.shape),
        ),
    )


class PieceSavePlanner(SavePlanner):
    """Writes the owned pieces of a rank."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._owned = [p for p in pieces if p.owned and p.tensor.numel() > 0]
        self._by_index = {(p.name, tuple(p.offset)): p for p in self._owned}
        self._names = {p.name for p in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to do: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        """One item per owned piece; beside them the names of tensors that others must own."""
        return SavePlan(
            items=[_write_item(p) for p in self._owned],
            planner_data=tuple(self._names - {p.name for p in self._owned}),
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """All ranks' items, once it is sure that they cover each tensor exactly."""
        plans, metadata = create_default_global_save_plan(all_plans)
        _check_cover(plans, metadata)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take the global plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor of an item."""
        offset = write_item.index.offset
        assert offset is not None
        return self._by_index[write_item.index.fqn, tuple(offset)].tensor.detach()


def _check_cover(plans: Sequence[SavePlan], metadata: Metadata) -> None:
    wrong = {name for plan in plans for name in plan.planner_data} - set(metadata.state_dict_metadata)
    for plan in plans:
        for item in plan.items:
            stored, data = metadata.state_dict_metadata[item.index.fqn], item.tensor_data
            assert isinstance(stored, TensorStorageMetadata) and data is not None
            ends = [a + n for a, n in zip(data.chunk.offsets, data.chunk.sizes, strict=True)]
            inside = all(end <= size for end, size in zip(ends, stored.size, strict=True))
            if not inside or data.size != stored.size or data.properties.dtype != stored.properties.dtype:
                wrong.add(item.index.fqn)
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        if sum(math.prod(c.sizes) for c in stored.chunks) != math.prod(stored.size):
            wrong.add(name)
    if wrong:
        raise CheckpointError(
            "the pieces that ranks own don't cover each of these tensors exactly once, with one shape and dtype: "
            + ", ".join(sorted(wrong))
        )


class PieceLoadPlanner(LoadPlanner):
    """Reads into the pieces of a rank, in place; the dtype may differ from the stored one."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._by_name: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            if piece.tensor.numel() > 0:
                self._by_name[piece.name].append(piece)
        self._metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take what the checkpoint says of its tensors."""
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """The overlaps of this rank's pieces with the stored rectangles."""
        assert self._metadata is not None
        items: list[ReadItem] = []
        for name, pieces in self._by_name.items():
            stored = self._metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(p) for p in pieces])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank reads on its own."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Take the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: only tensors are stored."""
        raise AssertionError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a piece that an item fills."""
        position = read_item.dest_index.index
        assert position is not None
        target = self._by_name[read_item.dest_index.fqn][position].tensor.detach()
        return _narrow(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: resolve_tensor gave a view."""


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


class _Window(io.RawIOBase):
    """Part of a file as a file of its own, which torch reads straight into the tensor's memory."""

    def __init__(self, stream: io.BufferedReader, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view[: max(0, self._length - self._at)])
        self._at += count
        return count


class PieceReader(FileSystemReader):
    """torch's reader, except that a stored rectangle is decoded once however many pieces need it."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of all items, file by file, front to back."""
        for name, items in self._by_file(plan).items():
            with (Path(self.path) / name).open("rb") as stream:
                for item, stored in self._decoded(items, stream):
                    target = planner.resolve_tensor(item)
                    target.copy_(_narrow(stored, item.storage_offsets, item.lengths))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _by_file(self, plan: LoadPlan) -> dict[str, list[ReadItem]]:
        files: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            files[self.storage_data[item.storage_index].relative_path].append(item)
        return files

    def _decoded(self, items: list[ReadItem], stream: io.BufferedReader) -> Iterator[tuple[ReadItem, Tensor]]:
        at, stored = -1, torch.empty(0)
        for item in sorted(items, key=lambda i: self.storage_data[i.storage_index].offset):
            where = self.storage_data[item.storage_index]
            if where.offset != at:
                window: Any = _Window(stream, where.offset, where.length)
                at, stored = where.offset, torch.load(window, map_location="cpu", weights_only=True)
            yield item, stored
