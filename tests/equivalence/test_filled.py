"""A frozen front that is computed in the bubbles of the step before: loss, gradients and weights are those of one rank.

Three steps: the first has to compute its own front, the second finds it, the last computes none for a next.  Tolerance
as in test_plans.  In between the model is evaluated, which must not disturb what waits for the next step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from equivalence.plan_run import batches_of, together, train_on_rank
from equivalence.reference import Record, build_reference, error, train_reference, vanishing, worst_gradient, worst_of
from equivalence.test_frozen import frozen_run
from equivalence.test_plans import TOLERANCE
from equivalence.test_schedules import run_of
from ranks import Ranks
from stretto.parallel.pipeline.landing import Landing
from stretto.spec.check import check
from stretto.spec.contract import Batch
from stretto.spec.data import DataSpec
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.run import RunSettings, RunSpec
from stretto.trainer.filling import Filling
from stretto.trainer.freezing import matches
from stretto.trainer.hooks import Hooks
from stretto.trainer.loop import Loop
from stretto.trainer.planned import planned
from stretto.trainer.session import Session
from stretto.trainer.verify import verify
from stretto.trainer.world import World

STEPS = 3
FILL = "fill-bubbles"
FRONT = ("inputs.*", "blocks.[01].*")
PARTS = (*FRONT, "blocks.2.attention.*", "*norm*", "blocks.5.*")
"""Besides that, parts of what the pipeline holds."""
CASES: list[tuple[str, int, tuple[str, ...], dict[str, Any]]] = [
    ("dropout", 4, FRONT, {"pp": 2, "chunks": 2, "schedule": "zb-v", "dp_shard": 2, "zero": 3, "passes": (FILL,)}),
    ("dropout", 3, ("inputs.*",), {"pp": 4, "schedule": "zb-h1", "passes": (FILL,)}),
    ("dense", 4, PARTS, {"pp": 2, "schedule": "chimera", "tp": 2, "recompute": "full", "passes": (FILL,)}),
    (
        "gpt2",
        3,
        FRONT,
        {"pp": 2, "cp": 2, "chunks": 2, "schedule": "interleaved", "passes": (FILL, "2bp", "recompute")},
    ),
    ("tied", 4, FRONT, {"pp": 2, "dp_replicate": 2, "stages": (4, 2), "passes": (f"{FILL}:where=front", "sharding")}),
]


def filled_run(case: tuple[str, int, tuple[str, ...], dict[str, Any]]) -> RunSpec:
    model, microbatches, freeze, plan = case
    run = frozen_run(model, plan, microbatches * run_of(model, plan, 1).plan.dp, freeze)
    check(run, data=False)
    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_one_rank(ranks: Ranks, case: tuple[str, int, tuple[str, ...], dict[str, Any]]) -> None:
    run, freeze = filled_run(case), case[2]
    built = build_reference(run, torch.float64)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(not matches(name, freeze))
    reference = train_reference(run, STEPS, model=built)
    found = ranks.run(train_on_rank, run.plan.num_ranks, run, STEPS, True)
    record = Record(
        losses=found[0]["losses"],
        norms=found[0]["norms"],
        gradients=[together([f["gradients"][step] for f in found]) for step in range(STEPS)],
        weights=together([f["weights"] for f in found]),
    )
    assert worst_of(record.losses, reference.losses) <= TOLERANCE
    gradient_error, worst = worst_gradient(record, reference)
    assert gradient_error <= TOLERANCE, worst
    assert worst_of(record.norms, reference.norms) <= TOLERANCE
    for name in reference.weights.keys() - vanishing(reference.gradients[0]):
        assert error(record.weights[name], reference.weights[name]) <= TOLERANCE, name


def played_on_rank(rank: int, world: int, run: RunSpec) -> dict[str, Any]:
    """Losses of three steps with what is known ahead, of the same steps without, and what waits in between."""
    ahead, alone = Session.start(run, rank), Session.start(run, rank)
    batches = {step: batches_of(run, step, 0, documents=True) for step in range(1, STEPS + 2)}
    found: dict[str, Any] = {"ahead": [], "alone": [], "evaluated": [], "scheduled": [], "waiting": []}
    for step in range(1, STEPS + 1):
        found["ahead"].append(ahead.train_step(step, batches[step], ahead=batches[step + 1]).loss)
        found["scheduled"].append(ahead.played_as_scheduled)
        found["alone"].append(alone.train_step(step, batches[step]).loss)
        found["evaluated"].append((ahead.evaluate(batches[step]), alone.evaluate(batches[step])))
        landing = [stage for stage in ahead.model.stages.values() if isinstance(stage, Landing)]
        found["waiting"].append(sum(t.numel() for stage in landing for t in stage.kept_tensors()))
    found["fronts"] = [s.name for number in (4, 5) if (stage := ahead.model.stages.get(number)) for s in stage.segments]
    return found


def test_what_is_known_ahead_changes_no_bit(ranks: Ranks) -> None:
    case = ("dropout", 6, FRONT, {"pp": 2, "chunks": 2, "schedule": "zb-v", "passes": (FILL,)})
    run = filled_run(case)
    first, second = ranks.run(played_on_rank, 2, run)
    for found in (first, second):
        assert found["ahead"] == found["alone"]
        assert all(there == here for there, here in found["evaluated"])
        assert found["scheduled"] == [False, True, True]
        assert found["fronts"] == ["inputs", "blocks.0", "blocks.1"]  # each rank holds it whole
    width = run.model.hidden_size * run.training.sequence_length
    assert first["waiting"] == [6 * width] * STEPS  # rank 0 has stage 0
    assert second["waiting"] == [0] * STEPS


@contextmanager
def swapped_units() -> Iterator[None]:
    """What is computed ahead goes to other micro-batches than those it is of."""
    expect = Filling.expect

    def wrong(self: Filling, step: int, ahead: Sequence[Batch]) -> None:
        expect(self, step, ahead[::-1])

    with patch.object(Filling, "expect", wrong):
        yield


@pytest.mark.parametrize("fault", [None, swapped_units])
def test_verify_plays_it_and_finds_what_is_wrong(ranks: Ranks, fault: Any) -> None:
    run = filled_run(("dense", 2, ("inputs.*", "blocks.[0-4].*"), {"pp": 2, "passes": (f"{FILL}:where=front",)}))
    report = verify(run, steps=2, run_ranks=ranks.run, around=fault, say=lambda line: None)
    assert report.equal == (fault is None)
    assert report.notes == ("2 frozen layers in front instead of 5",)
    assert fault is None or str(report.first_output).startswith("blocks.2")  # of four the first that the pipeline holds


def looped(rank: int, world: int, run: RunSpec, stop_after: int) -> list[tuple[int, list[int]]]:
    """Train until the end or ``stop_after`` steps; which samples were read for which step, in order."""
    read: list[tuple[int, list[int]]] = []
    steps: list[int] = []
    hooks = Hooks(observer=Counting(steps), should_stop=lambda: len(steps) >= stop_after, say=lambda line: None)
    loop = Loop(run, World(rank=rank, world_size=world), hooks)
    inner = loop._train.step

    def step(number: int) -> Any:
        batches = inner(number)
        read.append((number, [int(s) for batch in batches for s in batch.samples]))
        return batches

    loop._train.step = step  # type: ignore[method-assign]
    try:
        loop.run()
    finally:
        loop.close()
    return read


class Counting:
    """An observer that notes which steps begin."""

    def __init__(self, steps: list[int]) -> None:
        self._steps = steps

    @property
    def step(self) -> int:
        return self._steps[-1]

    @step.setter
    def step(self, step: int) -> None:
        self._steps.append(step)

    def begin(self, operation: str, /, *, peer: int | None = None) -> None: ...

    def end(self) -> None: ...


def test_a_run_goes_on_as_if_nothing_had_happened(ranks: Ranks, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"document {n}: {'words ' * (n % 7 + 3)}{n * n}" for n in range(60)))
    found = {}
    for kind, passes in (("filled", (FILL,)), ("plain", ())):
        run = frozen_run("dropout", {"pp": 2, "passes": passes}, 4, FRONT)
        training = replace(run.training, steps=5, eval_every=2, eval_steps=1, schedule="cosine")
        run = replace(
            run,
            run=RunSettings(dir=str(tmp_path / kind), seed=3),
            model=replace(run.model, vocab_size=260),
            training=training,
            data=DataSpec(path=str(corpus), validation_fraction=0.2),
        )
        read = [(ranks.run(looped, 2, run, after)) for after in ((2, 99) if passes else (99,))]
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        found[kind] = [json.loads(line)["loss"] for line in lines]
        if passes:
            before, after = read
            assert [number for number, _ in before[0]] == [1, 2, 3]  # the third was only looked at
            assert [number for number, _ in after[0]] == [3, 4, 5]  # and each once, from there on
            assert before[0][-1] == after[0][0] == (3, [8, 9, 10, 11])
    assert len(found["plain"]) == 5
    assert found["filled"] == pytest.approx(found["plain"], rel=1e-12)


WRONG: list[tuple[type[Exception], tuple[str, ...], dict[str, Any], str]] = [
    (ConfigError, ("blocks.0.*",), {}, "doesn't freeze the embedding, with which the front begins; write"),
    (ConfigError, ("inputs.*", "blocks.*"), {}, "freezes all 8 layers, so that .* leaves none to the pipeline"),
    (ConfigError, FRONT, {"pp": 1}, "plan.pp = 1 has none that waits; set plan.pp to 2 or more"),
    (ConfigError, FRONT, {"pp": 7}, "the model has 6 layers behind the 2 that are computed ahead"),
    (ConfigError, FRONT, {"stages": (4, 4)}, "holds 8 layers, but the model has 6 behind the 2 that"),
    (
        ConfigError,
        FRONT,
        {"passes": (f"{FILL}:units=3",)},
        "units = 3, but in training a unit is a micro-batch, of .* 4",
    ),
    (
        ConfigError,
        FRONT,
        {"passes": (f"{FILL}:frozen=0.5",)},
        "times of 1 layers, but training.freeze makes 2 in front",
    ),
    (ConfigError, FRONT, {"passes": ("sharding", FILL)}, "has OPT already, .* fill it before sharding"),
    (UnsupportedError, FRONT, {"passes": ("vocabulary", FILL)}, "can't go with the pass vocabulary .*; leave that one"),
    (UnsupportedError, FRONT, {"passes": (FILL, FILL)}, "can't go with itself, a second time"),
    (UnsupportedError, FRONT, {"offload": True}, "can't go with plan.offload = true .*; set plan.offload = false"),
    (UnsupportedError, FRONT, {"optimizer_barrier": False}, "can't go with plan.optimizer_barrier = false"),
    (UnsupportedError, FRONT, {"schedule": "skip-pipe", "chunks": 2}, 'can\'t go with plan.schedule = "skip-pipe"'),
]


@pytest.mark.parametrize(("kind", "freeze", "plan", "said"), WRONG, ids=str)
def test_what_can_not_be_is_one_sentence(
    kind: type[Exception], freeze: tuple[str, ...], plan: dict[str, Any], said: str
) -> None:
    run = frozen_run("dense", {"pp": 2, "passes": (FILL,), **plan}, 4, freeze)
    with pytest.raises(kind, match=said):
        check(run, data=False)
        planned(run)
