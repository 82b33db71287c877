"""A damaged, stale or half-written checkpoint is refused by the name of the file; the previous good one is offered."""

import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.checkpoint.cuts import differing, pieces_of, values

from ranks import Ranks
from stretto.checkpoint import latest, load, previous_good, save, verify
from stretto.checkpoint.manifest import find_damage, looks_complete, read_manifest
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError


def write(rank: int, world: int, directory: str, step: int) -> str:
    pieces = pieces_of(rank, world, seed=step, cut_seed=1, filled=True)
    return str(save(Path(directory), step=step, pieces=pieces, state={"step_written": step}))


def message_of_load(rank: int, world: int, path: str) -> str:
    pieces = pieces_of(rank, world, seed=2, cut_seed=5, filled=False)
    try:
        load(Path(path), pieces)
    except CheckpointError as error:
        assert all(bool((p.tensor == -7).all()) for p in pieces), "something was loaded from a damaged checkpoint"
        return str(error)
    return ""


@pytest.fixture
def two(tmp_path: Path, ranks: Ranks) -> tuple[Path, Path]:
    """Checkpoints of steps 1 and 2, written by two ranks."""
    first, second = (Path(ranks.run(write, 2, str(tmp_path), step)[0]) for step in (1, 2))
    return first, second


def test_every_flipped_bit_of_every_file_is_refused_by_name(two: tuple[Path, Path]) -> None:
    first, second = two
    rng = random.Random(7)
    files = sorted(file for file in second.iterdir() if file.stat().st_size)
    assert len(files) == 4
    for number in range(120):
        file = files[number % len(files)]
        content = file.read_bytes()
        at, bit = rng.randrange(len(content)), rng.randrange(8)
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=re.escape(str(file))) as caught:
            load(second, [])
        assert f"previous good checkpoint is {first} (set checkpoint.resume to it)" in str(caught.value)
        with pytest.raises(CheckpointError):
            verify(second)
        file.write_bytes(content)
    verify(second)


def test_all_ranks_refuse_together(two: tuple[Path, Path], ranks: Ranks) -> None:
    first, second = two
    shard = second / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    messages = ranks.run(message_of_load, 3, str(second))
    assert len(set(messages)) == 1
    assert f"{shard} is damaged or from another step" in messages[0] and str(first) in messages[0]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_truncated_and_missing_files_are_named(two: tuple[Path, Path], name: str) -> None:
    first, second = two
    content = (second / name).read_bytes()
    (second / name).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=re.escape(str(second / name))):
        load(second, [])
    (second / name).unlink()
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*{re.escape(str(first))}"):
        load(second, [])
    assert not looks_complete(second) and latest(first.parent) == first


def test_a_shard_of_another_step_is_refused(two: tuple[Path, Path]) -> None:
    first, second = two
    shutil.copy(first / "__1_0.distcp", second / "__1_0.distcp")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp .*(from another step|bytes, written were)"):
        load(second, [])


def test_where_no_checkpoint_is_good_none_is_offered(two: tuple[Path, Path]) -> None:
    for path in two:
        (path / "__0_0.distcp").write_bytes(b"")
    assert previous_good(two[1]) is None
    with pytest.raises(CheckpointError, match="there is no other good checkpoint"):
        load(two[1], [])


_SAVE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import stretto.checkpoint
saving = sys.modules["stretto.checkpoint.save"]
from tests.checkpoint.cuts import pieces_of
{patch}
saving.save(Path(sys.argv[1]), step=2, pieces=pieces_of(0, 1, seed=2, cut_seed=1, filled=True), state={{}}, keep=1)
"""
_DIE = "lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    "patch",
    [
        f"saving.DurableFileSystem.rename = {_DIE}",
        f"saving.write_durably = {_DIE}",
        f"saving.sync_folder = {_DIE}",
    ],
    ids=["data-written", "before-manifest", "after-manifest"],
)
def test_death_in_the_middle_of_a_save_leaves_the_previous_one(tmp_path: Path, patch: str) -> None:
    first = Path(write(0, 1, str(tmp_path), 1))
    code = patch
    process = subprocess.run(
        [sys.executable, "-c", _SAVE_AND_DIE.format(patch=code), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(tmp_path.iterdir())) == 2, "a leftover lies beside the good one"
    assert latest(tmp_path) == first
    pieces = pieces_of(0, 1, seed=1, cut_seed=3, filled=False)
    load(first, pieces)
    assert differing(pieces, 1) == []
    second = Path(write(0, 1, str(tmp_path), 2))
    assert sorted(tmp_path.iterdir()) == [first, second]


_SAVE_WITH_LIMIT = """
import resource, sys
from pathlib import Path
import torch
from stretto.checkpoint import save
from stretto.spec.contract import Piece
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
piece = Piece(name="w", shape=(100_000,), offset=(0,), tensor=torch.ones(100_000))
try:
    save(Path(sys.argv[1]), step=2, pieces=[piece], state={})
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_write_that_fails_says_why_and_leaves_earlier_ones(tmp_path: Path) -> None:
    first = Path(write(0, 1, str(tmp_path), 1))
    command = [sys.executable, "-c", _SAVE_WITH_LIMIT, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("CheckpointError the checkpoint of step 2 could not be written: File too large"), output
    assert "earlier ones are untouched" in output
    assert list(tmp_path.iterdir()) == [first]
    verify(first)


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    piece = Piece(name="w", shape=(2,), offset=(0,), tensor=torch.ones(2))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be written to .*Not a directory"):
        save(tmp_path / "file" / "checkpoints", step=1, pieces=[piece], state={})


def test_the_manifest_lists_every_file_and_tensor(two: tuple[Path, Path]) -> None:
    manifest = read_manifest(two[1])
    assert set(manifest.files) == {f.name for f in two[1].iterdir()} - {"manifest.json"}
    assert set(manifest.tensors) == set(values(2))
    assert find_damage(two[1], manifest) is None
