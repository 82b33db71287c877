"""What is read from disk, in which order, and what is said when it can't be."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from stretto.data.source import Reader, list_files, pieces_of
from stretto.spec.data import DataSpec
from stretto.spec.errors import ConfigError, DataError


def texts(path: Path | str, **options: object) -> list[str]:
    """The text of every document, segments joined."""
    spec = DataSpec(path=str(path), **options)  # type: ignore[arg-type]
    return ["".join(s.text for s in d.segments) for d in Reader(list_files(str(path), spec.suffixes), spec)]


def lines(file: Path, *records: object) -> Path:
    """Write records as JSON lines."""
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/z.txt", "b/a.py", "c.txt", "a.txt", ".git/config", ".hidden"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b/a.py", "b/z.txt", "c.txt"]
    assert texts(tmp_path, suffixes=(".py",)) == ["b/a.py"]


def test_binary_undecodable_and_empty_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffgrün".encode())
    (tmp_path / "b.bin").write_bytes(b"text\0more")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "d.txt").write_bytes(b"")
    spec = DataSpec(path=str(tmp_path))
    reader = Reader(list_files(str(tmp_path)), spec)
    for _ in range(2):  # counts don't add up over passes
        assert [d.segments[0].text for d in reader] == ["grün"]
        assert reader.skipped == 2


def test_the_cache_inside_a_corpus_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    assert [file.name for file in list_files(str(tmp_path), without=tmp_path / "tokens").files] == ["a.txt"]


def test_the_standard_library_is_a_corpus() -> None:
    listing = list_files("stdlib")
    names = [file.name for file in listing.files]
    assert names == sorted(names) and "json/decoder.py" in names and "argparse.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages", "idlelib"))
    assert listing.bytes > 3_000_000


def test_json_lines_hold_texts_or_chats(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "text": "ignored"}
    file = lines(tmp_path / "a.jsonl", {"text": "one"}, chat, {"text": ""})
    file.write_text(file.read_text().replace("\n", "\n\n"))
    assert texts(file) == ["one", "<|user|>\nQ<|assistant|>\nA"]
    assert texts(lines(tmp_path / "b.txt", {"body": "x"}), format="jsonl", text_field="body") == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl:2: not a line of JSON"),
        ('{"text": "a"}\n\n[1]', r"a\.jsonl:3: a record is an object with named fields, not list"),
        ('{"body": "a", "id": 1}', r"a\.jsonl:1: neither .*'text'.* nor .*'messages'.*; the fields are 'body', 'id'"),
        ('{"text": 3}', r"a\.jsonl:1: the field 'text' holds int, not text"),
        ('{"messages": "hi"}', r"a\.jsonl:1: a chat record is a list"),
        ('{"messages": [{"from": "user"}]}', r"a\.jsonl:1: a chat turn needs .*role and content; it has \['from'\]"),
    ],
)
def test_an_unreadable_record_is_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path)


def test_undecodable_json_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a line of JSON"):
        texts(tmp_path)


def test_parquet_rows_hold_texts_or_chats(tmp_path: Path) -> None:
    many = [f"text {i}" for i in range(1500)]
    parquet.write_table(pyarrow.table({"id": range(1500), "text": many}), tmp_path / "a.parquet", row_group_size=400)
    turns = [[{"role": "user", "content": "Q"}]]
    parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "b.parquet")
    assert texts(tmp_path) == [*many, "<|user|>\nQ"]


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"]}), file)
    with pytest.raises(DataError, match="the fields are 'body'"):
        texts(file)
    parquet.write_table(pyarrow.table({"text": ["x", None]}), file)
    with pytest.raises(DataError, match="row 2: the field 'text' holds NoneType"):
        texts(file)
    file.write_bytes(b"PAR1 broken")
    with pytest.raises(DataError, match=r"a\.parquet isn't a readable Parquet file"):
        texts(file)


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x"]}), file)
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"install stretto\[parquet\]"):
        texts(file)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no corpus at .*nowhere; data\.path may be"):
        list_files(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="is empty: the folder holds no files"):
        list_files(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"none of its 1 files ends in \.py or \.md"):
        list_files(str(tmp_path), (".py", ".md"))


def test_a_touched_file_changes_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    first = list_files(str(tmp_path)).fingerprint
    assert list_files(str(tmp_path)).fingerprint == first
    os.utime(file, ns=(1, 1))
    assert list_files(str(tmp_path)).fingerprint != first


def test_long_documents_are_cut_at_line_ends() -> None:
    text = "abc\ndefgh\nij\n" + "x" * 30
    pieces = pieces_of(text, size=10)
    assert "".join(p.text for p in pieces) == text
    assert pieces[0].text == "abc\ndefgh\n" and all(0 < len(p.text) <= 10 for p in pieces)
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
