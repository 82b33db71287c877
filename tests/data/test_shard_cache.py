"""Folders that are built once, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from stretto.data.cache import kept
from stretto.spec.errors import DataError


def build_slowly(folder: Path) -> dict[str, object]:
    """A build that takes long enough for another process to come along."""
    (folder / "a.bin").write_bytes(b"half")
    time.sleep(0.5)
    (folder / "a.bin").write_bytes(b"whole")
    return {"builder": os.getpid()}


def take_part(cache: Path, results: multiprocessing.Queue) -> None:
    """What each process of the test does."""
    folder, manifest = kept(cache, "x", build_slowly)
    results.put(((folder / "a.bin").read_bytes(), manifest["builder"]))


def test_one_process_builds_and_the_other_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=take_part, args=(tmp_path / "cache", results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert [content for content, _ in found] == [b"whole", b"whole"]
    assert found[0][1] == found[1][1]


def build(folder: Path) -> dict[str, object]:
    (folder / "a.bin").write_bytes(b"content")
    return {"made": True}


def never(folder: Path) -> dict[str, object]:
    raise AssertionError("built again")


def test_a_finished_folder_is_used_again(tmp_path: Path) -> None:
    kept(tmp_path, "x", build)
    folder, manifest = kept(tmp_path, "x", never)
    assert manifest["made"] and (folder / "a.bin").read_bytes() == b"content"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "format"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str) -> None:
    folder, _ = kept(tmp_path, "x", build)
    manifest = folder / "manifest.json"
    if damage == "flip":
        (folder / "a.bin").write_bytes(b"cOntent")
    elif damage == "truncate":
        (folder / "a.bin").write_bytes(b"con")
    elif damage == "remove":
        (folder / "a.bin").unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:20])
    else:
        manifest.write_text(manifest.read_text().replace("tokens/1", "tokens/0"))
    with pytest.raises(AssertionError, match="built again"):
        kept(tmp_path, "x", never)
    kept(tmp_path, "x", build)
    assert (folder / "a.bin").read_bytes() == b"content"
    kept(tmp_path, "x", never)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        kept(tmp_path, "x", never)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.lock"]


def test_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "x.building-1").mkdir()
    (tmp_path / "x.building-1" / "a.bin").write_bytes(b"ha")
    kept(tmp_path, "x", build)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "x.lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"can't be kept in .*; data\.cache may name another folder"):
        kept(tmp_path / "file" / "cache", "x", build)
