"""A corpus on disk as a stream of documents: text, JSON lines, Parquet, or Python's own library.

    path ──► list_files ──► Listing (what there is) ──► Reader (documents, one after the other)

A text file is one document; a JSON line or a Parquet row is one.  Files come in sorted order of their
relative path, so that everybody who has the same corpus numbers its documents alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stretto.data.chat import Segment, render
from stretto.spec.data import DataSpec
from stretto.spec.errors import ConfigError, DataError

STDLIB = "stdlib"
"""The value of ``data.path`` that means Python's own standard library."""
STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip"}
    | {"encodings", "pydoc_data", "lib-dynload", "__pycache__", "__phello__"}
)
"""Folders that are no part of the library, tests of it, or tables without prose."""
PIECE = 1 << 18
"""Documents longer than this many characters are encoded in pieces, cut after a line end."""


class SourceFile(NamedTuple):
    """One file of a corpus."""

    name: str
    """Path relative to the corpus, with forward slashes."""
    path: Path
    """Where it is."""
    bytes: int
    """Size in bytes."""
    changed: int
    """Time of the last change in nanoseconds."""


class Document(NamedTuple):
    """One document and how far the reader has come with it."""

    segments: list[Segment]
    """What is encoded, in order; the last one ends the document."""
    done: int
    """Bytes of the corpus read so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of a corpus, before any of them is opened."""

    path: str
    """As the user wrote it."""
    files: tuple[SourceFile, ...]
    """Sorted by name."""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Hash of paths, sizes and times of change: differs as soon as a file was touched."""
        rows = [(str(file.path), file.bytes, file.changed) for file in self.files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def walk(root: Path, left_out: frozenset[str], without: Path | None) -> Iterator[Path]:
    """Files below ``root``; hidden ones, folders named in ``left_out`` and the folder ``without`` are passed over."""
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in left_out and not name.startswith(".") and Path(folder, name) != without
        ]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def list_files(path: str, suffixes: tuple[str, ...] = (), *, without: Path | None = None) -> Listing:
    """List the corpus at ``path`` (file, folder or ``stdlib``).  A missing one is a DataError.

    ``without`` is the cache: it may lie inside the corpus but is no part of it.
    """
    left_out: frozenset[str] = frozenset()
    root = Path(path).expanduser()
    if path == STDLIB:
        root, suffixes, left_out = Path(sysconfig.get_path("stdlib")), (".py",), STDLIB_LEFT_OUT
    if not root.exists():
        raise DataError(f"There is no corpus at {path}; data.path may be a file, a folder or '{STDLIB}'.")
    root = root.resolve()
    if root.is_file():
        found = [(root.name, root)]
    else:
        without = None if without is None else without.resolve()
        found = [(file.relative_to(root).as_posix(), file) for file in walk(root, left_out, without) if file.is_file()]
        total = len(found)
        found = [(name, file) for name, file in found if not suffixes or name.endswith(suffixes)]
        if not found:
            why = f"none of its {total} files ends in {' or '.join(suffixes)}" if total else "the folder holds no files"
            raise DataError(f"The corpus {path} is empty: {why}.")
    stats = [(name, file, file.stat()) for name, file in sorted(found)]
    files = tuple(SourceFile(name, file, stat.st_size, stat.st_mtime_ns) for name, file, stat in stats)
    return Listing(path=path, files=files)


class Reader:
    """Iterates over the documents of a listing; afterwards ``skipped`` counts the files that weren't text."""

    def __init__(self, listing: Listing, spec: DataSpec) -> None:
        self.listing = listing
        self.spec = spec
        self.skipped = 0

    def __iter__(self) -> Iterator[Document]:
        self.skipped = 0
        done = 0
        for file in self.listing.files:
            for segments, part in self._read(file):
                if any(segment.text for segment in segments):
                    yield Document(segments, done + part)
            done += file.bytes

    def _read(self, file: SourceFile) -> Iterator[tuple[list[Segment], int]]:
        kind = self.spec.format
        if kind == "auto":
            kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
            kind = kinds.get(file.path.suffix.lower(), "text")  # type: ignore[assignment]
        read = {"text": self._text, "jsonl": self._lines, "parquet": self._rows}[kind]
        try:
            yield from read(file)
        except OSError as error:
            raise DataError(f"{file.path} can't be read: {error.strerror or error}.") from error

    def _text(self, file: SourceFile) -> Iterator[tuple[list[Segment], int]]:
        raw = file.path.read_bytes()
        try:
            text = None if b"\0" in raw else raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = None
        if text is None:
            self.skipped += 1
            return
        yield pieces_of(text), file.bytes

    def _lines(self, file: SourceFile) -> Iterator[tuple[list[Segment], int]]:
        done = 0
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                done += len(line)
                if not line.strip():
                    continue
                where = f"{file.path}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not a line of JSON ({error}).") from None
                yield self._record(record, where), done

    def _rows(self, file: SourceFile) -> Iterator[tuple[list[Segment], int]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ConfigError(
                f"{file.path} is Parquet, but the library pyarrow isn't installed; install stretto[parquet]."
            ) from None
        try:
            table = parquet.ParquetFile(file.path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{file.path} isn't a readable Parquet file: {error}.") from None
        names = table.schema_arrow.names
        wanted = [name for name in (self.spec.messages_field, self.spec.text_field) if name in names][:1]
        if not wanted:
            raise self._absent(names, str(file.path))
        row = 0
        for group in table.iter_batches(batch_size=512, columns=wanted):
            for record in group.to_pylist():
                row += 1
                done = file.bytes * row // max(table.metadata.num_rows, 1)
                yield self._record(record, f"{file.path}: row {row}"), done

    def _record(self, record: Any, where: str) -> list[Segment]:
        """Segments of a JSON or Parquet record; a chat is preferred where a record holds both."""
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record is an object with named fields, not {type(record).__name__}.")
        if self.spec.messages_field in record:
            return render(record[self.spec.messages_field], self.spec.train_on, where)
        if self.spec.text_field not in record:
            raise self._absent(list(record), where)
        text = record[self.spec.text_field]
        if not isinstance(text, str):
            raise DataError(f"{where}: the field {self.spec.text_field!r} holds {type(text).__name__}, not text.")
        return pieces_of(text)

    def _absent(self, names: list[str], where: str) -> DataError:
        return DataError(
            f"{where}: neither data.text_field = {self.spec.text_field!r} nor data.messages_field = "
            f"{self.spec.messages_field!r} is there; the fields are {', '.join(map(repr, names)) or 'none'}."
        )


def pieces_of(text: str, size: int = PIECE) -> list[Segment]:
    """Segments of a document without turns; a long one in pieces of about ``size`` characters, cut at line ends."""
    pieces, start = [], 0
    while len(text) - start > size:
        stop = text.rfind("\n", start, start + size) + 1 or start + size
        pieces.append(Segment(text[start:stop], ends=False))
        start = stop
    return [*pieces, Segment(text[start:])]
