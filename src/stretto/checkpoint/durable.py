"""Files whose bytes are on the disk, and whose checksums are known, when they are closed.

torch's own writer calls fsync before Python's buffer is flushed, so the end of a file may be lost,
and an error in the middle of a tensor surfaces as ``unexpected pos 704 vs 598``.  This file system,
handed to that writer, flushes first, computes the checksum while writing, and keeps the first error
of the operating system for the message.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from stretto.checkpoint.manifest import StoredFile


def sync_folder(path: Path) -> None:
    """Bring the names in folder ``path`` to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` and wait until the disk has it."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


class _Stream(io.RawIOBase):
    """An append-only file that sums up what is written.

    A write that fails is remembered and raised by ``close``: raised inside torch's C++ serialiser it
    would turn into an error without a reason.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 20)
        self._length = 0
        self._crc32 = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        count = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self._crc32 = zlib.crc32(data, self._crc32)
        self._length += count
        return count

    def tell(self) -> int:
        return self._length

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self.error = self.error or error
        if self.error is not None:
            raise self.error

    def summary(self) -> StoredFile:
        """Length and checksum of all that was written."""
        return StoredFile(bytes=self._length, crc32=f"{self._crc32:08x}")


class DurableFileSystem(FileSystem):
    """What torch's checkpoint writer writes through; afterwards ``files`` says what was written."""

    def __init__(self) -> None:
        self.files: dict[str, StoredFile] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        """Open ``path`` for writing (``mode`` "wb"); its summary is in ``files`` when it is closed."""
        assert mode == "wb"
        try:
            stream = _Stream(Path(path))
            try:
                yield cast(io.IOBase, stream)
            finally:
                stream.close()
        except OSError as error:
            self.error = self.error or error
            raise
        self.files[Path(path).name] = stream.summary()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a file that was written here."""
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)
