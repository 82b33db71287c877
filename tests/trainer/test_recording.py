"""Recording in a real run: which steps, which operations, what messages carry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ranks import Ranks
from stretto.schedule.measured.diagnosis import diagnose
from stretto.schedule.measured.trace import load
from stretto.schedule.op import MESSAGES
from stretto.spec.run import RunSpec
from trainer.small import MODEL, TRAINING, small_run, train, write_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "run"


def traced(run: RunSpec, trace: str) -> RunSpec:
    return replace(run, run=replace(run.run, trace=trace))


def test_two_stages_are_recorded_and_diagnosed(ranks: Ranks, folder: Path) -> None:
    plan = {"pp": 2, "schedule": "zb-h1", "micro_batch_size": 1}
    ranks.run(train, 2, traced(small_run(folder, plan, eval_every=2, eval_steps=1), "2-3"))
    trace = load(folder)
    assert trace.steps == (2, 3) and trace.pipelines == ((0, 1),) and trace.num_hosts == 1
    played = trace.played(0, 3)
    messages = played.num_bytes[[kind in MESSAGES for kind in trace.schedule.kind.tolist()]]
    assert len(messages) == 2 * 2 * 4  # both ends, both directions, of four micro-batches
    assert set(messages.tolist()) == {TRAINING.sequence_length * MODEL.hidden_size * 8}
    assert played.num_bytes.sum() == messages.sum()
    assert (played.end >= played.start).all() and (played.optimizer > 0).all() and (played.settling > 0).all()
    assert played.makespan < played.whole
    found = diagnose(folder)
    difference = found.over.measured.makespan - found.over.simulated.makespan
    assert found.over.difference.total == pytest.approx(difference, abs=1e-8)
    assert found.findings and 0.5 < found.ratio < 50


def test_pipelines_side_by_side(ranks: Ranks, folder: Path) -> None:
    ranks.run(train, 4, traced(small_run(folder, {"pp": 2, "dp_replicate": 2, "micro_batch_size": 1}), "last"))
    trace = load(folder)
    assert trace.pipelines == ((0, 2), (1, 3)) and trace.steps == (2, 3, 4)
    assert diagnose(folder, step=2).played.step == 2


def test_off_records_nothing_and_one_rank_needs_no_messages(folder: Path) -> None:
    train(0, 1, traced(small_run(folder), "off"))
    assert not (folder / "trace").exists()
    train(0, 1, small_run(folder.with_name("traced")))
    found = diagnose(folder.with_name("traced"))
    assert found.steps == (2, 3, 4) and found.costs.comm == ()
    assert found.as_data()["message_bytes"] == 0


def test_recording_changes_nothing(folder: Path) -> None:
    plain, _ = train(0, 1, traced(small_run(folder), "off"))
    traced_, _ = train(0, 1, traced(small_run(folder.with_name("traced")), "1-4"))
    assert plain["loss"] == traced_["loss"] and plain["grad_norm"] == traced_["grad_norm"]


def test_the_last_steps_are_written_when_a_run_fails(folder: Path) -> None:
    def fail() -> None:
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        train(0, 1, traced(small_run(folder), "last"), change=lambda loop: setattr(loop, "_save", fail))
    assert load(folder).steps == (2, 3, 4)
