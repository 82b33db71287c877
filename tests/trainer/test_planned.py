"""What a plan can ask of its schedule: each mistake is one sentence with the fact, the reason and the choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stretto.schedule.document import save
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.spec.check import check
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.resolve import resolve_text
from stretto.spec.run import RunSpec
from stretto.trainer.planned import costs_of_plan, planned
from stretto.trainer.schedules import schedules_of, searched
from stretto.trainer.verify import verify
from stretto.trainer.verify_shrink import shrink

RUN = "[model]\nnum_layers = 8\n[plan]\npp = 2\n[training]\nglobal_batch_size = 4\n"


def run_of(*overrides: str) -> RunSpec:
    run = resolve_text(RUN, overrides=overrides)
    check(run, data=False)
    return run


WRONG: list[tuple[list[str], str]] = [
    (["plan.options.wave=2"], "1f1b has no option 'wave'"),
    (["plan.schedule=hanayo", "plan.chunks=4", "plan.options.waves=1"], "set plan.chunks = 2"),
    (["plan.schedule=group-interleaved", "plan.options.group=0"], "Option group is 0"),
    (['plan.passes=["recmpute"]'], "did you mean 'recompute'"),
    (['plan.passes=["2bp:when"]'], "write NAME:KEY=VALUE"),
    (['plan.passes=["2bp:when=end,when=late"]'], "when is written twice"),
    (['plan.passes=["sharding", "sharding"]'], "'sharding': 1f1b has .* already"),
    (['plan.passes=["freeze:stages=0"]'], r"no backward in the stages \[0\], but they have parameters that train"),
    (["plan.schedule=chimera", 'plan.passes=["sharding"]'], r"has REDUCE_GRAD already; .* eager_sync=false"),
    (['plan.passes=["fill-bubbles"]'], "doesn't freeze the embedding, with which the front begins"),
    (["plan.memory_limit=1"], "above the memory limit of 1"),
    (["plan.memory_limit=0.5", 'plan.passes=["split-backward"]'], r"above plan.memory_limit = 0.5; raise it"),
    (["plan.memory_limit=0.1", "plan.offload=true"], r"with plan.passes = \['offload'\] keeps"),
    (["plan.memory_limit=-1"], "write a number above 0"),
    (["plan.schedule=skip-pipe", "plan.chunks=2", "plan.options.keep=1"], "can be trained; let all visit both"),
    (["plan.schedule_file=nowhere.json"], "'nowhere.json' doesn't exist"),
    (["plan.schedule_file=."], "The schedule file '.' is a folder"),
    ([f"plan.schedule_file={__file__}"], r"test_planned.py': The schedule file is not JSON"),
    (["plan.options={waves={a=1}}"], "plan.options.waves must be a number"),
    (["plan.options=3"], "plan.options must be a table of options"),
]


@pytest.mark.parametrize(("overrides", "said"), WRONG, ids=str)
def test_what_can_not_be_is_one_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned(run_of(*overrides))


MISFITS: list[tuple[dict[str, Any], list[str], str]] = [
    ({"ranks": 4, "microbatches": 4}, [], "is for 4 ranks, but plan.pp = 2; set plan.pp = 4"),
    ({"ranks": 2, "microbatches": 6}, [], "is for 6 micro-batches, but .* set training.global_batch_size = 6"),
    ({"ranks": 2, "microbatches": 4, "chunks": 2}, [], "is for 4 stages, but plan.pp = 2 x .* set plan.chunks = 2"),
    ({"ranks": 2, "microbatches": 4}, ["plan.stages=[3,3,2]"], "plan.stages names 3; write plan.stages, the layers"),
    ({"ranks": 2, "microbatches": 4}, ["plan.schedule=gpipe"], "both say the order; leave one of them out"),
    ({"ranks": 2, "microbatches": 4}, ["plan.options.waves=2"], "plan.options has nothing to choose"),
    ({"ranks": 2, "microbatches": 4}, ["plan.memory_limit=1.5"], "keeps 2 micro-batches of activations on rank 0"),
]


@pytest.mark.parametrize(("shape", "overrides", "said"), MISFITS, ids=str)
def test_a_file_that_does_not_fit_the_plan(
    tmp_path: Path, shape: dict[str, Any], overrides: list[str], said: str
) -> None:
    path = tmp_path / "s.json"
    save(build("interleaved" if "chunks" in shape else "1f1b", **shape), path)
    with pytest.raises(ConfigError, match=said):
        planned(run_of(f"plan.schedule_file={path}", *overrides))


def test_options_and_passes_are_kept_apart_and_in_order() -> None:
    run = run_of("plan.schedule=zeropp", "plan.options.sharded=false", 'plan.passes=["recompute", "sharding"]')
    kinds = {Kind(kind) for kind in planned(run).kind.tolist()}
    assert {Kind.R, Kind.UNSHARD, Kind.REDUCE_GRAD} <= kinds


def test_one_rank_has_no_barrier_to_leave_out() -> None:
    kinds = schedules_of(run_of("plan.pp=1", "plan.optimizer_barrier=false", 'plan.passes=["vocabulary"]'))[0].kind
    assert Kind.S in kinds


def test_what_was_searched_for_is_changed_by_passes_once(tmp_path: Path) -> None:
    search = ["plan.schedule=auto", "plan.options.time_budget=0.1", f"run.dir={tmp_path}"]
    run = run_of(*search, "plan.offload=true", 'plan.passes=["recompute:stages=1"]', 'training.freeze=["inputs.*"]')
    assert planned(searched(run)) == planned(run)


def test_a_small_run_keeps_what_its_file_says(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    save(build("1f1b", ranks=2, microbatches=12), path)
    run = run_of(f"plan.schedule_file={path}", "training.global_batch_size=24", "plan.dp_replicate=2")
    small = shrink(run).run
    assert small.num_microbatches == 12 and small.plan.schedule_file == str(path)
    assert planned(small) == planned(run)


def test_skipping_is_not_verified() -> None:
    with pytest.raises(UnsupportedError, match="meant to differ from one plain rank"):
        verify(run_of("plan.schedule=skip-pipe", "plan.chunks=2"))


def test_layers_compiled_as_a_whole_keep_nothing_for_w() -> None:
    costs = costs_of_plan(run_of('plan.compile="blocks"').plan)
    assert (costs.I, costs.act_w) == (2.0, 0.0) and 0 < costs.W < 1e-6
    split = ["plan.memory_limit=2.5", 'plan.passes=["2bp:when=late,behind=1"]']
    with pytest.raises(ConfigError, match="keeps 3 micro-batches"):
        planned(run_of(*split))
    planned(run_of(*split, 'plan.compile="blocks"'))
