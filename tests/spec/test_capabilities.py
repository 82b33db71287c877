"""What the version says that it can run is what its rooms have."""

from __future__ import annotations

import typing

import pytest

from stretto.data.source import STDLIB
from stretto.data.tokenizer import load_tokenizer
from stretto.models.build import build_model
from stretto.parallel.pipeline.operation import PLAYED
from stretto.schedule.families import FAMILIES
from stretto.schedule.op import Kind
from stretto.spec import capabilities
from stretto.spec.fields import keys_of
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_model import MODELS
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.schedules import schedules_of


@pytest.mark.parametrize(
    ("cls", "key", "choices"),
    [
        (ModelSpec, "family", capabilities.FAMILIES),
        (TrainingSpec, "dtype", capabilities.DTYPES),
        (TrainingSpec, "schedule", capabilities.RATE_SCHEDULES),
        (PlanSpec, "zero", capabilities.ZERO_STAGES),
        (PlanSpec, "recompute", capabilities.RECOMPUTE),
        (PlanSpec, "compile", capabilities.COMPILE),
        (PlanSpec, "compile_backend", capabilities.COMPILE_BACKENDS),
    ],
)
def test_choices_are_those_of_the_fields(cls: type, key: str, choices: tuple[object, ...]) -> None:
    assert typing.get_args(keys_of(cls)[key]) == choices


def test_axes_are_the_degrees_of_a_plan() -> None:
    axes = (*capabilities.AXES, *capabilities.LATER_AXES)
    plan = PlanSpec(**{axis: 2 for axis in axes if axis != "ep"})
    assert plan.num_ranks == 2 ** (len(axes) - 1)  # expert parallelism reuses ranks of the other axes
    assert set(axes) <= set(keys_of(PlanSpec))


def test_schedules_are_built_as_plans_ask_for_them_and_played() -> None:
    assert set(capabilities.SCHEDULES) == set(FAMILIES) - {"forward-only"}
    for name, counts in capabilities.SCHEDULES.items():
        for chunks in list(counts)[:2]:
            options = {"time_budget": 0.1} if name == "auto" else {}
            plan = PlanSpec(pp=2, schedule=name, chunks=chunks, options=options)
            training, evaluation = schedules_of(RunSpec(plan=plan, training=TrainingSpec(global_batch_size=3)))
            assert len(training.placement[0]) == plan.num_stages == training.num_stages
            assert training.placement == evaluation.placement and evaluation.forward_only
            assert {Kind(kind) for kind in training.kind.tolist()} <= set(PLAYED), name


def test_families_are_built() -> None:
    for name in ("tiny", "tiny-gpt2"):
        assert len(build_model(MODELS[name]).blocks) == MODELS[name].num_layers
    assert {MODELS[name].family for name in MODELS} == set(capabilities.FAMILIES) - {"foreign"}


def test_what_the_data_room_embeds() -> None:
    assert capabilities.EMBEDDED_CORPUS == STDLIB
    assert load_tokenizer(capabilities.BYTES_TOKENIZER).vocab_size == capabilities.BYTES_VOCABULARY
