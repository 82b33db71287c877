"""The trace of a run with dynamic groups, and that another plan's trace is never read for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import stretto
from ranks import Ranks
from stretto.cli.main import main
from stretto.planner.document_portions import placed
from stretto.schedule.measured.document_diagnosis import DocumentDiagnosis, diagnose_documents, has_documents
from stretto.schedule.measured.document_format import documents_path, read_documents
from stretto.schedule.measured.trace import load
from stretto.spec import toml
from stretto.spec.errors import ConfigError
from stretto.spec.run import RunSpec
from stretto.trainer.corpus import prepare_corpus
from stretto.trainer.document_steps import first_lengths
from trainer.small import small_run, train, write_corpus

DYNAMIC = {"pp": 2, "cp": 2, "context_tokens": 20, "context_groups": "dynamic"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "run"


def saved(run: RunSpec) -> RunSpec:
    """As the launcher leaves it."""
    Path(run.run.dir).mkdir(exist_ok=True)
    toml.save(run, Path(run.run.dir) / "run.toml")
    return run


def test_placed_steps_are_recorded_and_diagnosed(
    ranks: Ranks, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(small_run(folder, DYNAMIC, steps=3))
    ranks.run(train, 4, run)
    lengths = first_lengths(run, prepare_corpus(run))
    found = stretto.diagnose(folder)
    assert isinstance(found, DocumentDiagnosis) and [step.step for step in found.steps] == [2, 3]
    for step in found.steps:
        pieces = placed(run, lengths[step.step - 1]).pieces
        told = {(p.first, p.ranks, lengths[step.step - 1][p.document]) for p in pieces}
        assert set(step.documents) == told and sum(step.documents.values()) == len(pieces)
        assert max(ranks_ for _, ranks_, _ in told) == 2  # some are cut
        for rank, time in enumerate(step.ranks):
            parts = time.computing + time.messages + time.pipeline + time.idle
            assert time.computing > 0 and parts == pytest.approx(step.span, rel=0.2), rank
        assert sum(time.messages for time in step.ranks) > 0 and step.span < step.whole
        assert step.imbalance >= 1 and 0 <= step.idle_share < 1
    assert not (folder / "trace" / "schedule.json").exists()
    assert main(["diagnose", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "documents in groups of their own: 4 ranks" in out and "a document of " in out and " over 2" in out
    assert main(["diagnose", str(folder), "--step", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["step"] == 3 and len(figures["ranks"]) == 4 and figures["findings"]
    assert main(["diagnose", str(folder), "--costs-out", str(folder / "c.json")]) == 2
    assert "--costs-out is of a schedule" in capsys.readouterr().err
    assert main(["simulate", "--schedule-file", str(folder / "trace" / "schedule.json")]) == 2
    assert f"no one schedule can be simulated; stretto diagnose {folder} says" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no one schedule says what they played"):
        load(folder)
    with pytest.raises(ConfigError, match=r"Step 9 .* recorded steps: 2, 3"):
        diagnose_documents(folder, step=9)


def test_a_trace_of_another_plan_is_not_read(folder: Path) -> None:
    run = saved(small_run(folder, steps=2))
    train(0, 1, run)
    assert load(folder).steps == (2,)
    saved(replace(run, training=replace(run.training, steps=9)))  # the same plan
    assert load(folder).steps == (2,)
    grouped = saved(replace(run, plan=replace(run.plan, context_groups="dynamic", context_tokens=32)))
    words = 'another plan .*plan.context_groups is "static" there and "dynamic" here, plan.context_tokens is null'
    with pytest.raises(ConfigError, match=words):
        load(folder)
    assert not has_documents(folder)
    train(0, 1, replace(grouped, training=replace(grouped.training, steps=4)))
    assert has_documents(folder) and [step.step for step in diagnose_documents(folder).steps] == [3, 4]
    read = read_documents(documents_path(folder / "trace", 0))
    assert set(read) == {3, 4} and all(held.ranks == 1 == held.tokens // held.length for held in read[3])
    saved(run)
    with pytest.raises(ConfigError, match="another plan"):
        diagnose_documents(folder)
