"""The names that others rely on: adding one is a decision, losing one breaks somebody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import stretto
import stretto.planner
import stretto.spec

NAMES = """
    CheckpointError CheckpointSpec ClusterSpec ConfigError DataError DataSpec ModelSpec PlanSpec RankError RopeScaling
    RunSettings RunSpec ScheduleError SourceSpec StrettoError TrainingSpec UnsupportedError VideoSpec
    check cluster_preset convert diagnose generate load_run model_preset plan simulate train verify
"""
SPEC_NAMES = """
    CheckpointSpec ClusterSpec DataSpec ModelSpec PlanSpec RopeScaling RunSettings RunSpec SourceSpec TrainingSpec
    VideoSpec check cluster_preset load_run model_preset stages_of
"""
PLANNER_NAMES = "Parameters flops_per_token forward_flops_per_token mfu parameters"


def test_names_of_the_package() -> None:
    assert stretto.__all__ == NAMES.split()
    for name in NAMES.split():
        assert getattr(stretto, name).__name__ == name
    assert set(NAMES.split()) <= set(dir(stretto))


def test_names_of_rooms() -> None:
    for room, names in ((stretto.spec, SPEC_NAMES), (stretto.planner, PLANNER_NAMES)):
        assert room.__all__ == names.split()
        assert all(hasattr(room, name) for name in names.split())


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(stretto, "trian")


def test_import_is_light() -> None:
    """Neither the package nor the command line nor reading a run loads torch or numpy."""
    demo = Path(__file__).parents[1] / "examples" / "demo.toml"
    script = (
        f"import sys, stretto, stretto.cli.main; stretto.train; stretto.load_run({str(demo)!r});"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
