"""Diagnosis of made-up traces: what was put in is what is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from schedule.recorded import COMM, write_run
from stretto.schedule.document import save
from stretto.schedule.families import build
from stretto.schedule.measured.diagnosis import Diagnosis, diagnose
from stretto.schedule.measured.findings import _most
from stretto.schedule.measured.format import path_of
from stretto.schedule.measured.medians import as_file
from stretto.schedule.measured.overlay import Cause, _spent
from stretto.schedule.measured.trace import load
from stretto.schedule.op import Kind
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate import Costs, attribution, run, simulate
from stretto.spec.errors import ConfigError
from stretto.trainer.schedules import lowered_and_valid

FAMILIES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "hanayo", "dualpipe", "chimera")


def schedule_of(name: str, ranks: int = 4, microbatches: int = 8) -> Schedule:
    chunks = 2 if name == "interleaved" else None
    return lowered_and_valid(build(name, ranks=ranks, microbatches=microbatches, chunks=chunks))


def parts_add_up(found: Diagnosis) -> bool:
    over = found.over
    return over.difference.total == pytest.approx(over.measured.makespan - over.simulated.makespan, abs=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_at_its_costs_takes_as_long_as_simulated(tmp_path: Path, name: str) -> None:
    found = diagnose(write_run(tmp_path / "run", schedule_of(name)))
    assert found.ratio == pytest.approx(1, abs=1e-6) and parts_add_up(found)
    assert found.findings[0].startswith("The step takes as long as simulated") and len(found.findings) == 1
    for part in ("busy", "communication", "bubble"):
        assert getattr(found.over.spent, part) == pytest.approx(getattr(found.over.predicted, part), abs=1e-6)


def test_costs_are_the_medians_and_simulate_reads_them(tmp_path: Path) -> None:
    schedule = schedule_of("zb-h1")
    found = diagnose(write_run(tmp_path / "run", schedule, times=[{2: 1.5}]))
    costs = as_file(found.costs)
    assert costs["F"] == pytest.approx([0.01, 0.01, 0.015, 0.01]) and costs["comm"] == pytest.approx([COMM] * 3)
    for name in "IW":
        assert costs[name] == pytest.approx([0.01, 0.01, 0.015, 0.01])
    assert costs["OPT"] == pytest.approx([0.002] * 4)
    assert simulate(schedule, found.costs).makespan == pytest.approx(found.over.simulated.makespan + 0.002)


def test_b_counts_half_as_i_half_as_w(tmp_path: Path) -> None:
    costs = diagnose(write_run(tmp_path / "run", schedule_of("1f1b"))).costs
    assert costs.I == costs.W == pytest.approx((0.01,) * 4)


def test_b_of_layers_compiled_as_a_whole_counts_as_i(tmp_path: Path) -> None:
    costs = diagnose(write_run(tmp_path / "run", schedule_of("1f1b"), compiled="blocks")).costs
    inputs, weights = costs.I, costs.W
    assert inputs == pytest.approx((0.02,) * 4) and weights == pytest.approx((0.0,) * 4, abs=1e-8)


def test_a_slow_stage_is_named_with_what_it_costs(tmp_path: Path) -> None:
    found = diagnose(write_run(tmp_path / "run", schedule_of("1f1b"), times=[{2: 2.0}]))
    assert found.ratio == pytest.approx(1, abs=1e-6)
    (sentence,) = found.findings[1:]
    assert sentence.startswith("Stage 2 (rank 2) is slow") and "60.0 ms, 2.00 x" in sentence


def test_a_rank_with_only_slow_stages_is_slow(tmp_path: Path) -> None:
    found = diagnose(write_run(tmp_path / "run", schedule_of("interleaved"), times=[{1: 2.0, 5: 2.0}]))
    assert any(sentence.startswith("Rank 1 is slow: its 2 stages take 2.00 x") for sentence in found.findings)


def test_a_rank_slower_than_its_peers_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", schedule_of("1f1b", 2), times=[{}, {}, {1: 1.5}])
    found = diagnose(run)
    assert found.ranks == (2, 5) and found.trace.pipelines == ((0, 3), (1, 4), (2, 5))
    assert any(s.startswith("Rank 5 is slow") and "of rank 3, 4 with" in s for s in found.findings)


def test_a_late_message_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", schedule_of("1f1b"), more={"3RECV_F5": 0.03}, late_steps=[3])
    found = diagnose(run, step=3)
    difference = found.over.difference
    assert parts_add_up(found) and difference.messages.seconds == pytest.approx(0.03, abs=1e-6)
    assert difference.messages.place == (2, 3) and difference.messages.worst[1] == "3F5"
    assert any("from rank 2 to rank 3" in s and "3F5 (30.0 ms)" in s for s in found.findings)
    assert diagnose(run).played.step in (2, 4), "the step of median length"


def test_a_slow_operation_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", schedule_of("zb-h1"), more={"1I4": 0.05}, late_steps=[4])
    found = diagnose(run, step=4)
    assert parts_add_up(found) and found.over.difference.operations.worst == (pytest.approx(0.05, abs=1e-6), "1I4")
    assert any("on rank 1; the worst is 1I4 (50.0 ms)" in sentence for sentence in found.findings)


def test_a_place_that_cost_more_than_all_together_is_told_so() -> None:
    cause = Cause()
    cause.add(0.05, (1,), "1F4")
    assert _most(cause) == "most of it (50.0 ms)"
    cause.add(-0.02, (0,), "0F4")
    assert _most(cause) == "what is left of 50.0 ms after gains elsewhere,"


def test_a_gap_on_a_rank_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", schedule_of("gpipe"), more={"before 0F3": 0.04}, late_steps=[2])
    found = diagnose(run, step=2)
    assert parts_add_up(found) and found.over.difference.gaps.worst == (pytest.approx(0.04, abs=1e-6), "0F3")
    assert any("on rank 0, the longest before 0F3 (40.0 ms)" in sentence for sentence in found.findings)


def test_clocks_of_several_hosts_are_aligned(tmp_path: Path) -> None:
    found = diagnose(write_run(tmp_path / "run", schedule_of("1f1b"), hosts=("a", "b"), device="cuda"))
    assert found.ratio == pytest.approx(1, abs=1e-6) and found.played.whole < 1
    assert "not those of the kernels" in found.findings[-2] and "on 2 machines" in found.findings[-1]


def test_figures_of_the_whole_step(tmp_path: Path) -> None:
    found = diagnose(write_run(tmp_path / "run", schedule_of("1f1b"))).as_data()
    assert found["whole_step"] == pytest.approx(found["measured"] + 0.001 + 0.001 + 0.002)
    assert found["optimizer"] == pytest.approx([0.002] * 4) and found["steps"] == [2, 3, 4]
    assert found["message_bytes"] == 100 * 3 * 2 * 8
    assert found["medians"]["F 3"] == pytest.approx(0.01) and found["medians"]["B 0"] == pytest.approx(0.02)


def test_the_first_step_of_a_run_counts_only_alone(tmp_path: Path) -> None:
    assert load(write_run(tmp_path / "a", schedule_of("gpipe", 2), steps=[1, 2])).steps == (2,)
    assert load(write_run(tmp_path / "b", schedule_of("gpipe", 2), steps=[1])).steps == (1,)


def test_what_can_not_be_diagnosed_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no run in .*name the directory"):
        diagnose(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not the directory of a run"):
        diagnose(tmp_path / "empty")
    (tmp_path / "empty" / "run.toml").write_text("")
    with pytest.raises(ConfigError, match=r"has no trace. Record one: stretto train .* run.trace=last"):
        diagnose(tmp_path / "empty")
    run = write_run(tmp_path / "run", schedule_of("1f1b"))
    with pytest.raises(ConfigError, match=r"Step 9 .* recorded steps: 2, 3, 4"):
        diagnose(run, step=9)
    save(schedule_of("gpipe"), run / "trace" / "schedule.json")
    with pytest.raises(ConfigError, match=r"is not of the schedule beside it: operation .* gpipe has"):
        diagnose(run)
    save(schedule_of("gpipe", 2), run / "trace" / "schedule.json")
    with pytest.raises(ConfigError, match="not of one run: gpipe has 2 ranks"):
        diagnose(run)
    (run / "trace" / "schedule.json").unlink()
    with pytest.raises(ConfigError, match="is unknown: The schedule file"):
        diagnose(run)


def test_missing_and_damaged_ranks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", schedule_of("1f1b"))
    path = path_of(run / "trace", 3)
    path.write_bytes(path.read_bytes()[:-10])
    assert load(run).steps == (2, 3), "a step that one rank wrote in part is left out"
    path.write_bytes(b"something else\n")
    with pytest.raises(ConfigError, match="is no trace of a rank"):
        load(run)
    path.unlink()
    with pytest.raises(ConfigError, match="lacks rank 3 of 4"):
        load(run)


def test_what_a_vocabulary_pass_waits_in_itself_is_no_work() -> None:
    played = run(vocabulary(build("1f1b", ranks=3, microbatches=5)), Costs(S=0.2, T=0.3, comm=0.25))
    kinds = played.schedule.kind
    passes = np.isin(kinds, (Kind.S, Kind.T))
    measured = replace(played, start=np.where(passes, played.end[played.graph.before[: len(kinds)]], played.start))
    assert (measured.start[passes] < played.start[passes]).any()
    spent, simulated = _spent(measured), attribution(played)
    assert min(spent.communication) >= 0
    for mine, other in zip(spent.busy, simulated.busy, strict=True):
        assert other <= mine <= other + sum(simulated.communication)
