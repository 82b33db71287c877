"""Checkpoints to Hugging Face directories and back, and training that starts from either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from equivalence.plan_run import plain, together
from ranks import Ranks
from stretto.checkpoint.safetensors import write_directory
from stretto.checkpoint.weights import find_stored, read_weights
from stretto.models.build import build_model
from stretto.spec.checkpoint import CheckpointSpec
from stretto.spec.contract import Batch, Place
from stretto.spec.errors import CheckpointError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.trainer.convert import convert
from stretto.trainer.loop import weights_reader
from stretto.trainer.resume import session_pieces
from stretto.trainer.session import Session
from trainer.small import MODEL, small_run, train, write_corpus

MODELS = {
    "llama": MODEL,
    "tied": replace(MODEL, tied_embeddings=True),
    "gpt2": replace(MODEL, family="gpt2", num_kv_heads=None, tied_embeddings=True),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "run"


def logits_of(model: ModelSpec, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    stack: Any = build_model(model)
    stack.load_state_dict(weights, strict=False)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    batch = Batch(tokens=tokens, labels=tokens, positions=positions, documents=None, samples=tokens[:, 0])
    with torch.no_grad():
        return stack(batch, Place(training=False))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_trained_model_gives_transformers_the_same_logits(ranks: Ranks, folder: Path, name: str) -> None:
    run = small_run(folder, {"pp": 2}, model=MODELS[name], dtype="float32", steps=3)
    ranks.run(train, 2, run)
    target = convert(str(folder), str(folder.with_name("hf")))
    tokens = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
    stored = find_stored(folder)
    assert stored is not None and stored.state["step"] == 3
    mine = logits_of(MODELS[name], read_weights(stored), tokens)
    # Float32: two orders of summation over 32 to 48 terms.
    assert float((mine - expected).abs().max() / expected.abs().max()) <= 1e-5
    narrow = convert(str(folder), str(folder.with_name("narrow")), dtype="bfloat16")
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"


def hugging_face(folder: Path, model: ModelSpec) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory with values that no seed would draw."""
    torch.manual_seed(4)
    stack: Any = build_model(model)
    weights = {n: torch.randn_like(p) * 0.1 + 0.01 for n, p in stack.named_parameters()}
    write_directory(folder, model, weights)
    return folder, weights


def start_on_rank(rank: int, world: int, run: RunSpec) -> Any:
    session = Session.start(run, rank, reader=weights_reader(run))
    return plain([p for p in session_pieces(session) if p.name.startswith("model.")])


@pytest.mark.parametrize("name", list(MODELS))
def test_fine_tuning_starts_from_exactly_these_weights(ranks: Ranks, folder: Path, name: str) -> None:
    source, weights = hugging_face(folder.with_name("hf"), MODELS[name])
    model = replace(MODELS[name], weights=str(source))
    run = small_run(folder, {"pp": 2, "tp": 2}, model=model, dtype="float32")
    found = together(ranks.run(start_on_rank, 4, run))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], w) for n, w in weights.items())


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", list(MODELS))
def test_training_goes_on_from_a_converted_directory(ranks: Ranks, folder: Path, name: str) -> None:
    source, weights = hugging_face(folder.with_name("hf"), MODELS[name])
    checkpoint = convert(str(source), str(folder.with_name("converted")))
    stored = find_stored(checkpoint)
    assert stored is not None and stored.state["step"] == 0
    assert all(torch.equal(w, weights[n]) for n, w in read_weights(stored).items())
    tuned = small_run(folder.with_name("tuned"), model=replace(MODELS[name], weights=str(source)))
    train(0, 1, tuned)
    resumed = small_run(folder, {"pp": 2}, model=MODELS[name])
    resumed = replace(resumed, checkpoint=CheckpointSpec(resume=str(checkpoint)))
    (_, said), _ = ranks.run(train, 2, resumed)
    assert any("going on from" in line and "step 0" in line for line in said)
    # Moments start at zero either way, so the two runs are one; float64, another order of summation.
    assert losses(folder) == pytest.approx(losses(folder.with_name("tuned")), rel=1e-9)


def test_there_and_back_is_bitwise(folder: Path) -> None:
    source, _ = hugging_face(folder.with_name("hf"), MODEL)
    convert(str(source), str(folder.with_name("checkpoint")))
    convert(str(folder.with_name("checkpoint")), str(folder.with_name("again")))
    first, second = (folder.with_name(n) / "model.safetensors" for n in ("hf", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_target_that_is_not_empty_is_left_alone(folder: Path) -> None:
    source, _ = hugging_face(folder.with_name("hf"), MODEL)
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="isn't empty; name a new directory"):
        convert(str(source), str(folder))
    with pytest.raises(CheckpointError, match="does not exist; name a run's directory"):
        convert(str(folder.with_name("nowhere")), str(folder.with_name("target")))
    assert [p.name for p in folder.iterdir()] == ["precious"]


def test_a_foreign_checkpoint_of_another_size_is_refused(folder: Path) -> None:
    source, _ = hugging_face(folder.with_name("hf"), MODEL)
    checkpoint = convert(str(source), str(folder.with_name("converted")))
    wider = small_run(folder, model=replace(MODEL, intermediate_size=64))
    with pytest.raises(CheckpointError, match="intermediate_size is 48 there and 64 here"):
        train(0, 1, replace(wider, checkpoint=CheckpointSpec(resume=str(checkpoint)), plan=PlanSpec()))
