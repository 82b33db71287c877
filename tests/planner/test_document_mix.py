"""Static mesh against dynamic groups: the estimate, what was measured, and what ``stretto plan --lengths`` proposes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stretto.cli.main import main
from stretto.planner.document_costs import Costs, costs_of
from stretto.planner.document_mix import Mix, compared, mix_of, row_time, static_time
from stretto.planner.document_proposal import grouped, propose
from stretto.planner.plan import answer
from stretto.planner.request import Request
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec

COSTS = Costs(pair=1.0, token=100.0, exchange=900.0)


def test_a_row_of_one_document_is_what_its_group_takes() -> None:
    """With all seats full, zigzag's pairs are even, and a ring passes on nearly all."""
    for way in ("ring", "all-gather"):
        row = row_time([8000], replace(COSTS, exchange=0.0), cp=4, way=way)
        assert row == pytest.approx(replace(COSTS, exchange=0.0).time(8000, 4), rel=1e-3)
    with_messages = row_time([8000], replace(COSTS, exchange=1e6), cp=4)
    assert with_messages == pytest.approx(replace(COSTS, exchange=1e6).time(8000, 4), rel=0.05)
    for way in ("ulysses", "mesh"):
        shared = replace(COSTS, messages={4: 1e5})
        assert row_time([8000], shared, cp=4, way=way) == pytest.approx(shared.time(8000, 4), rel=1e-3)
        assert row_time([4000, 4000], shared, cp=4, way=way) == pytest.approx(shared.time(8000, 4), rel=1e-3)


def test_pairs_and_messages_of_packed_rows_by_hand() -> None:
    """Two documents of 8 tokens on two ranks: rank 0 has tokens 0-3 and 12-15, rank 1 all between."""
    own = Costs(pair=1.0, token=0.0)
    assert row_time([8, 8], own, cp=2) == 10 + (4 * 4 + 10)
    # Rank 0's first half is seen by rank 1, whose second half is seen by rank 0: four tokens each way.
    assert row_time([8, 8], Costs(pair=0.0, token=0.0, exchange=1.0), cp=2) == pytest.approx(4.0)
    assert row_time([8, 8], Costs(pair=1.0, token=0.0, window=1), cp=2) == 8
    assert static_time([8, 8, 8], own, cp=1, replicas=3, row=8) == 36


def test_groups_gain_where_messages_cost() -> None:
    lengths = Mix().draw(262144)
    apart, together = (
        compared(lengths, replace(COSTS, exchange=exchange), cp=8, replicas=1, row=65536, memory_tokens=8192)
        for exchange in (2e4, 0.0)
    )
    assert apart.gain > together.gain >= 1.0
    assert sum(apart.sizes.values()) == apart.documents == len(lengths)
    assert apart.lower_bound <= apart.dynamic


def test_a_mix_is_drawn_or_read(tmp_path: Path) -> None:
    mix = mix_of("lognormal:median=1000,sigma=0.5,min=10,max=4000")
    lengths = mix.draw(50000, longest=2000)
    assert lengths == mix.draw(50000, longest=2000) and sum(lengths) >= 50000
    assert max(lengths) <= 2000 and min(lengths) >= 10 and 700 < sorted(lengths)[len(lengths) // 2] < 1400
    path = tmp_path / "lengths.txt"
    path.write_text("5\n70\n900\n")
    assert set(mix_of(str(path)).draw(5000, longest=512)) == {5, 70, 512}
    for text, words in (
        ("lognormal:mean=3", "'mean=3' of --lengths"),
        ("lognormal:median=0", "median above 0"),
        ("lognormal:median=inf", "median above 0"),
        ("lognormal:sigma=1000", "sigma 0 to 10"),
        ("lognormal:median=3,median=4", "gives median twice"),
        (str(tmp_path / "none"), "can't be read"),
        (str(Path(__file__)), "whole numbers"),
    ):
        with pytest.raises(ConfigError, match=words):
            mix_of(text)


def run_of(cluster: str, **plan: object) -> RunSpec:
    model = replace(model_preset("llama-2-7b"), max_positions=65536)
    training = TrainingSpec(global_batch_size=16, sequence_length=65536, dtype="bfloat16")
    return RunSpec(model=model, cluster=cluster_preset(cluster), training=training, plan=PlanSpec(**plan))  # type: ignore[arg-type]


def test_plans_that_can_have_groups() -> None:
    plain, away, own, _ = grouped(run_of("h100:16", cp=8, dp_shard=2, context="mesh", ulysses=4, recompute="full"))
    assert (plain.context, plain.context_tokens, plain.offload, away.offload) == ("ring", 8192, False, True)
    assert (own.context, own.ulysses, own.offload) == ("mesh", 4, False)
    assert grouped(run_of("h100:16", pp=2, cp=8, schedule="zb-h1")) == []
    assert [plan.offload for plan in grouped(run_of("h100:16", pp=2, cp=8))] == [False, True]


def test_links_inside_a_node_are_faster() -> None:
    costs = costs_of(run_of("h100:64", cp=8, dp_shard=8))
    assert costs.near == 8 and costs.near_exchange < costs.exchange
    assert [costs.passed(n) for n in (2, 8, 16)] == [costs.near_exchange] * 2 + [costs.exchange]
    assert costs_of(run_of("h100:8", cp=8)).near == 0


def test_a_stage_hides_its_own_blocks() -> None:
    """Over pp a rank has half the blocks, and half the forward to hide their copies under."""
    whole, half = (costs_of(run_of("h100:16", pp=pp, cp=8, offload=True)).host for pp in (1, 2))
    assert whole is not None and half is not None and half.blocks == whole.blocks // 2 == 16
    forward = 20 * 1000 * whole.copy / 30 * 32  # 20 of the 30 that may go
    assert (whole.hidden(forward, 1000), half.hidden(forward, 1000)) == (20, 9)
    assert half.kept(8) == (half.ends + 8) / (half.ends + 16)


def test_the_proposal_is_the_solver_s() -> None:
    pins = {"pp": 1, "tp": 1, "cp": 8, "recompute": "full", "micro_batch_size": 1}
    found = answer(Request(run=run_of("h100:16"), pins=pins), top=1)
    (one,) = propose(found, Mix())
    assert one.plan.context_groups == "dynamic" and one.plan.context_tokens == 8192
    assert one.gain is not None and one.gain > 1.02 and one.seconds == one.dynamic_seconds
    (same,) = propose(found, Mix(seen=(65536,), most=65536))
    assert same.plan == found.best.plan and same.static_seconds == pytest.approx(found.best.seconds, rel=0.1)


def test_groups_that_do_not_fit_are_not_proposed() -> None:
    pins = {"pp": 1, "tp": 1, "cp": 8, "zero": 1, "recompute": "none", "micro_batch_size": 1}
    for tokens, fits in ((8192, True), (65536, False)):  # the smaller holds no document on one rank
        room = {"context_groups": "dynamic", "context_tokens": tokens}
        (one,) = propose(answer(Request(run=run_of("h200:16"), pins={**pins, **room}), top=1), Mix())
        assert (one.dynamic_seconds is not None) is fits


def test_the_command_says_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.toml"
    asked = [
        "--model",
        "llama-2-7b",
        "--cluster",
        "h100:16",
        "--seq-len",
        "4096",
        "--global-batch",
        "32",
        "--top",
        "1",
        "--json",
    ]
    pins = ["--pin", "pp=1", "tp=1", "cp=8", "recompute=full", "micro_batch_size=1"]
    mix = "lognormal:median=300,sigma=1.2,min=16,max=4096"
    assert main(["plan", *asked, *pins, "--lengths", mix, "--out", str(out)]) == 0
    (figures,) = json.loads(capsys.readouterr().out)["documents"]
    assert figures["context_groups"] == "dynamic" and figures["dynamic_step_s"] < figures["static_step_s"]
    assert 'context_groups = "dynamic"' in out.read_text()


def test_a_plan_that_keeps_keys_is_offered_groups_that_dont() -> None:
    run = run_of("h100:16", cp=8, context_keep=True)
    assert [plan.context_keep for plan in grouped(run)] == [False, False]
    assert grouped(run, {"context_keep": True}) == []


def test_what_is_pinned_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of("h100:16", cp=8, dp_shard=2, context="mesh", ulysses=4, recompute="full")
    assert [plan.ulysses for plan in grouped(run, {"context": "mesh"})] == [4, 4]
    assert grouped(run, {"context_groups": "static"}) == []
    assert [plan.offload for plan in grouped(run, {"offload": False})] == [False, False]
    assert grouped(run, {"context_tokens": 9000})[0].context_tokens == 9000
    asked = ["--model", "tiny", "--cluster", "a100:8", "--seq-len", "64", "--global-batch", "8", "--top", "1"]
    mix = ["--lengths", "lognormal:median=12,sigma=1,min=2,max=64"]
    assert main(["plan", *asked, *mix, "--pin", "pp=2", "cp=4", "schedule=zb-h1"]) == 0
    assert "it can't have dynamic groups" in capsys.readouterr().out
    assert main(["plan", *asked, *mix, "--pin", "cp=8"]) == 0
    assert 'proposed: plan 1, context = "ring", context_groups = "dynamic"' in capsys.readouterr().out


def test_where_rates_are_assumed_groups_gain_in_work_alone() -> None:
    training = TrainingSpec(global_batch_size=8, sequence_length=512)
    run = RunSpec(model=model_preset("tiny"), training=training)
    pins = {"cp": 4, "context": "ulysses", "context_groups": "dynamic"}
    (one,) = propose(answer(Request(run=run, pins=pins), top=1), mix_of("lognormal:median=40,sigma=1,min=4,max=512"))
    assert one.plan.context == "ulysses" and one.prediction is None
    assert one.gain is not None and 0.8 < one.gain < 1.3
