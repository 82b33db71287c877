"""What a run with dynamic groups says of its documents before it starts, and whether it takes what was said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.test_measured_step import MACHINE
from ranks import Ranks
from stretto.assemble.documents import documents_of
from stretto.cli.main import main
from stretto.data import Loader, Share
from stretto.planner.calibration_file import write_calibration
from stretto.planner.document_memory import document_memory
from stretto.planner.request import Request
from stretto.spec import toml
from stretto.spec.cluster import ClusterSpec
from stretto.spec.run import RunSpec
from stretto.trainer.corpus import prepare_corpus
from stretto.trainer.document_steps import first_lengths, lengths_at_hand
from trainer.small import MODEL, small_run, train, write_corpus

ROW = 200
LARGER = replace(MODEL, hidden_size=64, intermediate_size=160, num_layers=4, vocab_size=300, max_positions=ROW)
PLANS: list[dict[str, Any]] = [
    {"cp": 4, "zero": 3, "context_tokens": 60},
    {"cp": 2, "tp": 2, "context_tokens": 120, "recompute": "full"},
    {"cp": 2, "pp": 2, "context_tokens": 100},
    {"cp": 2, "dp_shard": 2, "context_tokens": 50, "offload": True},
]


def run_of(folder: Path, plan: dict[str, Any], **given: Any) -> RunSpec:
    run = small_run(folder, {**plan, "context_groups": "dynamic"}, model=LARGER, sequence_length=ROW, **given)
    cluster = ClusterSpec(name="local-cpu", peak_flops_float32=1e5 if plan.get("offload") else 0)  # copies hide then
    return replace(run, cluster=cluster, data=replace(run.data, packing="whole", cache=str(folder.parent / "tokens")))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus").parent


def trained(rank: int, world: int, runs: list[RunSpec]) -> list[Any]:
    return [train(rank, world, run) for run in runs]


def test_memory_is_what_was_predicted(ranks: Ranks, corpus: Path) -> None:
    """Within 10% for the documents of the step that is measured, which a full micro-batch is above."""
    runs = [run_of(corpus / str(n), plan, steps=1) for n, plan in enumerate(PLANS)]
    found = ranks.run(trained, 4, runs)[0]
    for run, (record, _) in zip(runs, found, strict=True):
        request = Request(run=run)
        step = document_memory(request, first_lengths(run, prepare_corpus(run))[0])
        predicted, full = (max(rank.total for rank in each) for each in (step, document_memory(request)))
        assert predicted == pytest.approx(record["memory_bytes"], rel=0.1), run.plan
        assert predicted <= full * (1 + 1e-9), run.plan


def test_lengths_are_those_of_the_batches(corpus: Path) -> None:
    run = run_of(corpus / "run", {"cp": 2, "micro_batch_size": 2})
    assert lengths_at_hand(run) is None and not (corpus / "run").exists()
    whole = prepare_corpus(run)
    for packing, isolate in (("whole", True), ("stream", True), ("stream", False)):
        run = replace(run, data=replace(run.data, packing=packing, isolate_documents=isolate))
        loader = Loader(prepare_corpus(run), Share(global_batch_size=4, micro_batch_size=2, seed=run.run.seed))
        of_batches = tuple(tuple(len(tokens) for tokens, *_ in documents_of(loader.step(step))) for step in range(1, 5))
        assert first_lengths(run, prepare_corpus(run)) == of_batches == lengths_at_hand(run)
    assert first_lengths(run, whole, done=4) == ()


def test_the_step_is_foretold_and_measured(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_calibration(replace(MACHINE, dtype="float64"), corpus / "machine.toml")
    run = run_of(corpus / "run", {"context_tokens": 200}, steps=4)
    run = replace(run, cluster=replace(run.cluster, calibration=str(corpus / "machine.toml")))
    record, said = train(0, 1, run)
    first = next(line for line in said if line.startswith("documents: "))
    assert "ranks that share one, in the first step: 1 (" in first and " predicted, memory " in first
    assert said.index(first) < next(at for at, line in enumerate(said) if line.startswith("step 1/4"))
    kept = json.loads((corpus / "run" / "prediction.json").read_text())
    assert kept["bytes"]["ratio"] == pytest.approx(1, abs=0.1) and kept["steps"] == {"last": 4, "counted": 3}
    assert kept["seconds"]["measured"] > 0 and record["step"] == 4
    toml.save(run, corpus / "run.toml")
    capsys.readouterr()
    assert main(["plan", str(corpus / "run.toml"), "--top", "1", "--json"]) == 0  # knows the data without being asked
    (figures,) = json.loads(capsys.readouterr().out)["documents"]
    assert figures["context_groups"] == "dynamic" and figures["documents_over_ranks"]["1"] > 0
    assert figures["dynamic_step_s"] == pytest.approx(kept["seconds"]["predicted"], rel=0.3)
    assert main(["plan", str(corpus / "run.toml"), "--lengths", "data", "--set", f"data.cache={corpus / 'none'}"]) == 2
    assert "aren't there yet; stretto train makes them" in capsys.readouterr().err
