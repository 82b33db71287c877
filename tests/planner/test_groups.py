"""Unequal devices in one run: layers by what each group can do, against every division; refusals; the run file."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from stretto.planner.balance import balanced_by_cost
from stretto.planner.cluster_file import read_cluster
from stretto.planner.estimate import estimate
from stretto.planner.groups import divides, group_words, limits, of_ranks
from stretto.planner.plan import answer
from stretto.planner.report_plots import roofline_plot
from stretto.planner.report_text import report
from stretto.planner.request import Request
from stretto.planner.roofline import HEAD, rooflines
from stretto.planner.step import step_time
from stretto.planner.workload import Workload
from stretto.spec import toml
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, StrettoError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.resolve import load_run
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.spec.units import format_bytes

MODEL = replace(model_preset("llama-3-8b"), num_layers=10, vocab_size=32000)
TRAINING = TrainingSpec(global_batch_size=32, sequence_length=2048, dtype="bfloat16")


def machines(folder: Path, *groups: str, more: str = "") -> ClusterSpec:
    path = folder / "mixed.toml"
    path.write_text(more + "".join(f"[[groups]]\n{group}\n" for group in groups))
    return read_cluster(path).cluster


def asked(cluster: ClusterSpec, **pins: object) -> Request:
    run = RunSpec(model=MODEL, cluster=cluster, training=TRAINING)
    return Request(run=replace(run, data=replace(run.data, path="stdlib")), pins=pins)


def divisions(layers: int, stages: int) -> list[tuple[int, ...]]:
    if stages == 1:
        return [(layers,)]
    return [(n, *rest) for n in range(1, layers - stages + 2) for rest in divisions(layers - n, stages - 1)]


@pytest.mark.parametrize(("pp", "other"), [(2, "a100:8"), (4, "a100:8"), (3, "a100:16")])
def test_no_division_is_faster(tmp_path: Path, pp: int, other: str) -> None:
    """Every division of the layers over the stages, and both orders of the groups."""
    cluster = machines(tmp_path, 'name = "h100:8"', f'name = "{other}"')
    pins = {"pp": pp, "schedule": "1f1b", "zero": 1, "micro_batch_size": 1, "recompute": "none", "offload": False}
    best = answer(asked(cluster, **pins, tp=8 if pp != 4 else 4, cp=1, dp_replicate=1, dp_shard=1), top=1).best
    for order in permutations(cluster.groups):
        for stages in divisions(MODEL.num_layers, pp):
            plan = replace(best.plan, stages=stages)
            work = replace(best.work, plan=plan, cluster=replace(cluster, groups=order))
            assert step_time(work).total >= best.seconds * 0.995, (order[0].name, stages)


def test_faster_devices_have_more_layers(tmp_path: Path) -> None:
    cluster = machines(tmp_path, 'name = "h100:8"', 'name = "a100:8"')
    best = answer(asked(cluster, pp=2, tp=8, schedule="1f1b"), top=1).best
    layers = {of.name: best.work.layers_of_rank(rank) for rank, of in enumerate(of_ranks(best.plan, best.work.cluster))}
    assert layers["h100:8"] > layers["a100:8"]
    assert f"on {best.work.cluster.groups[0].name} (pipeline rank 0)" in group_words(best.plan, best.work.cluster)


def test_equal_groups_are_one_cluster(tmp_path: Path) -> None:
    """Two groups of the same machines take what one group of both takes."""
    cluster = machines(tmp_path, 'name = "a100:8"', 'name = "a100:8"')
    plan = PlanSpec(pp=2, tp=8)
    parts = {"model": MODEL, "plan": plan, "sequence_length": 2048, "global_batch_size": 32}
    two = step_time(Workload(cluster=cluster, **parts))
    one = step_time(Workload(cluster=cluster_preset("a100:16"), **parts))
    assert two.work + two.bubble == pytest.approx(one.work + one.bubble)
    assert two.optimizer == pytest.approx(one.optimizer)


def test_each_group_has_its_memory(tmp_path: Path) -> None:
    """A small device has as many layers as it can hold, however fast it is."""
    cluster = machines(tmp_path, 'name = "h100:8"\nmemory_bytes = 8e9', 'name = "a100:8"')
    found = answer(asked(cluster, pp=2, tp=8, schedule="1f1b"), top=1)
    best = found.best
    for rank, limit in zip(best.memory, limits(best.work), strict=True):
        assert rank.total <= limit
    assert best.memory[best.fullest].total / best.limits[best.fullest] > 0.5
    assert f"of {format_bytes(best.limits[best.fullest])}:" in report(found)


def test_run_file_says_the_order(tmp_path: Path) -> None:
    cluster = machines(tmp_path, 'name = "h100:8"', 'name = "a100:8"', more="network_bytes_per_second = 5e9\n")
    found = answer(asked(cluster, pp=2, tp=8, schedule="1f1b"), top=1)
    run = load_run(toml.save(found.run(), tmp_path / "run.toml"))
    assert run.cluster.groups == found.best.work.cluster.groups
    assert run.cluster.network_bytes_per_second == 5e9
    assert run.plan.stages == found.best.plan.stages


def test_pipeline_ranks_lie_in_one_group(tmp_path: Path) -> None:
    cluster = machines(tmp_path, 'name = "h100:8"', 'name = "a100:16"')
    assert [pp for pp in (1, 2, 3, 4, 6, 8, 12, 24) if divides(cluster, pp)] == [3, 6, 12, 24]
    with pytest.raises(UnsupportedError, match="same batch"):
        of_ranks(PlanSpec(pp=2, tp=4, dp_shard=3), cluster)
    with pytest.raises(StrettoError):
        answer(asked(cluster, pp=2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('memory_bytes = 8e9\n[[groups]]\nname = "a100:8"', "says nothing of a group"),
        ('name = "a100"\n[[groups]]\nname = "a100:8"', "preset"),
        ('[[groups]]\nname = "own"\nmemory_bytes = 8e9', "doesn't tell"),
        ('[[groups]]\nname = "a100:8"\nnum_nodes = 0', "there are no devices"),
        ("groups = 3", "must be tables"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_cluster(path)


def test_a_layer_moves_to_a_faster_rank_where_that_is_free() -> None:
    assert balanced_by_cost(30, ranks=2, costs=(1.0, 2.0)) == (20, 10)
    assert balanced_by_cost(7, ranks=2, costs=(1.0, 3.0), last=1.0) == (6, 1)
    assert balanced_by_cost(7, ranks=2, costs=(1.0, 3.0), most=(4, 7)) == (4, 3)


def test_each_kind_of_device_has_a_roof_of_its_own(tmp_path: Path) -> None:
    cluster = machines(tmp_path, 'name = "h100:8"', 'name = "fire-flyer:8"')
    found = estimate(asked(cluster), PlanSpec(pp=4, dp_shard=4, stages=(4, 3, 2, 1)))
    fast, slow = rooflines(found.work).values()
    assert [part.name for part in fast] == [part.name for part in slow if part.name != HEAD] and len(slow) == 6
    for group, parts in zip(cluster.groups, (fast, slow), strict=True):
        assert all(part.rate <= group.peak_flops_bfloat16 for part in parts)
        assert all(part.rate <= 1.01 * part.intensity * group.memory_bytes_per_second for part in parts)
    assert all(quick.seconds < other.seconds for quick, other in zip(fast[:4], slow[:4], strict=True))
    page = roofline_plot(found)
    assert page.count('class="roof"') == 2 and "<h3>h100:8</h3>" in page and "<h3>fire-flyer:8</h3>" in page


def test_the_cluster_files_among_the_examples_can_be_planned_for() -> None:
    found = {
        path.stem: read_cluster(path).cluster for path in (Path(__file__).parents[2] / "examples/clusters").iterdir()
    }
    assert len(found) >= 4 and sum(bool(cluster.groups) for cluster in found.values()) >= 2
    for cluster in found.values():
        devices = cluster.num_nodes * cluster.devices_per_node
        plan = PlanSpec(pp=3 if devices == 24 else 2, dp_shard=devices // (3 if devices == 24 else 2))
        run = RunSpec(model=MODEL, cluster=cluster, training=replace(TRAINING, global_batch_size=devices))
        assert estimate(Request(run=run), plan).seconds > 0
