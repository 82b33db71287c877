"""Old checkpoints go, good ones stay, whatever lies in the folder."""

from pathlib import Path

import torch

from stretto.checkpoint import latest, load, read_state, save
from stretto.checkpoint.retention import prune
from stretto.spec.contract import Piece


def write(directory: Path, step: int, *, keep: int = 0, value: float = 0.0) -> Path:
    piece = Piece(name="w", shape=(2,), offset=(0,), tensor=torch.full((2,), value))
    return save(directory, step=step, pieces=[piece], state={}, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_oldest_beyond_keep_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000004", "step-000005"]
    write(tmp_path, 6, keep=0)
    assert len(names(tmp_path)) == 3


def test_oldest_means_written_first_so_a_run_that_went_back_keeps_its_own(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step)
    newest = write(tmp_path, 150, keep=2)
    assert names(tmp_path) == ["step-000150", "step-000300"]
    assert latest(tmp_path) == newest


def test_the_same_step_again_replaces_but_never_in_place(tmp_path: Path) -> None:
    write(tmp_path, 7, value=1.0)
    path = write(tmp_path, 7, value=2.0)
    assert names(tmp_path) == ["step-000007"]
    loaded = torch.zeros(2)
    load(path, [Piece(name="w", shape=(2,), offset=(0,), tensor=loaded)])
    assert loaded.tolist() == [2.0, 2.0]


def test_a_replaced_one_counts_while_its_successor_is_not_in_place(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    replaced = path.rename(tmp_path / "step-000007.replaced-0a1b2c")
    assert latest(tmp_path) == replaced
    assert read_state(replaced)["step"] == 7


def test_leftovers_and_strangers_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-000009.tmp-0123abcd").mkdir()
    (tmp_path / "step-000010").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None
    good = write(tmp_path, 3, keep=1)
    assert latest(tmp_path) == good
    assert names(tmp_path) == ["notes.txt", "step-000003", "step-000010"]


def test_nothing_goes_while_the_newest_lacks_a_file(tmp_path: Path) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    (second / "__0_0.distcp").unlink()
    prune(tmp_path, keep=1)
    assert first.exists() and latest(tmp_path) == first
