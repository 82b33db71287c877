"""metrics.jsonl: one record a step, nothing later than the checkpoint, every line JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from stretto.trainer.metrics import Board, MetricsFile, step_line

RECORD = {"step": 3, "loss": 5.5, "grad_norm": 1.25, "lr": 1e-3, "tokens_per_s": 12345.0}


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_later_than_the_checkpoint_vanish(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, after=0)
    for step in range(1, 6):
        file.write({"step": step, "loss": 1.0 / step})
    file.close()
    file = MetricsFile(path, after=3)
    file.write({"step": 4, "loss": 9.0})
    file.close()
    assert steps_in(path) == [1, 2, 3, 4] and json.loads(path.read_text().splitlines()[3])["loss"] == 9.0
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "end", ['{"step": 3, "lo', '{"step": 3', "{", "\x00\x00\x00", '{"loss": 1.0}', "3", "null", '{"step": "x"}']
)
def test_a_line_that_a_dying_process_left_is_dropped(tmp_path: Path, end: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n' + end)
    file = MetricsFile(path, after=5)
    file.write({"step": 3})
    file.close()
    assert steps_in(path) == [1, 2, 3]


def test_a_fresh_start_forgets_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, after=0).close()
    assert path.read_text() == ""


def test_a_record_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after=0)
    file.write({"step": 1})
    assert steps_in(path) == [1]
    file.close()


def test_what_is_not_known_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after=0)
    file.write({"step": 1, "mfu": None, "loss": math.nan, "grad_norm": math.inf, "skipped": True, "tokens": 0})
    file.close()
    assert json.loads(path.read_text()) == {"step": 1, "skipped": True, "tokens": 0}


def test_the_line_for_people() -> None:
    full = {**RECORD, "memory_bytes": 16_060_522_496, "mfu": 0.4321}
    assert step_line(full, 250) == (
        "step   3/250  loss 5.5000  norm 1.250  lr 1.00e-03  12.3 k tok/s  16.1 GB  mfu 43.2%"
    )
    assert step_line({**RECORD, "loss": math.nan, "skipped": True}, 9).endswith("gradient not finite, update left out")
    assert "loss nan" in step_line({**RECORD, "loss": math.nan, "mfu": None}, 9)


def test_tensorboard_shows_the_numbers_and_purges_on_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, steps in ((0, (1, 2, 3)), (1, (2,))):
        board = Board(tmp_path, after=after)
        for step in steps:
            board.write({"step": step, "loss": float(step + after), "mfu": None}, "train")
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 3.0)]
