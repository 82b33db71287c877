"""Stretto trains transformer models that are too large, too slow or too long for one device.

The verbs of the command line are functions here, and what they speak of are dataclasses:

    run = stretto.load_run("run.toml", ["plan.pp=2"])
    stretto.train(run)

Names are looked up when they are first used, so that ``import stretto`` costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto.cli.verbs import convert, diagnose, generate, load_run, plan, simulate, train, verify
    from stretto.spec.check import check
    from stretto.spec.checkpoint import CheckpointSpec
    from stretto.spec.cluster import ClusterSpec
    from stretto.spec.data import DataSpec, SourceSpec
    from stretto.spec.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        RankError,
        ScheduleError,
        StrettoError,
        UnsupportedError,
    )
    from stretto.spec.model import ModelSpec, RopeScaling, VideoSpec
    from stretto.spec.plan import PlanSpec
    from stretto.spec.presets_cluster import cluster_preset
    from stretto.spec.presets_model import model_preset
    from stretto.spec.run import RunSettings, RunSpec
    from stretto.spec.training import TrainingSpec

_HOMES = {
    "stretto.cli.verbs": ("convert", "diagnose", "generate", "load_run", "plan", "simulate", "train", "verify"),
    "stretto.spec.check": ("check",),
    "stretto.spec.checkpoint": ("CheckpointSpec",),
    "stretto.spec.cluster": ("ClusterSpec",),
    "stretto.spec.data": ("DataSpec", "SourceSpec"),
    "stretto.spec.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "RankError",
        "ScheduleError",
        "StrettoError",
        "UnsupportedError",
    ),
    "stretto.spec.model": ("ModelSpec", "RopeScaling", "VideoSpec"),
    "stretto.spec.plan": ("PlanSpec",),
    "stretto.spec.presets_cluster": ("cluster_preset",),
    "stretto.spec.presets_model": ("model_preset",),
    "stretto.spec.run": ("RunSettings", "RunSpec"),
    "stretto.spec.training": ("TrainingSpec",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "CheckpointSpec",
    "ClusterSpec",
    "ConfigError",
    "DataError",
    "DataSpec",
    "ModelSpec",
    "PlanSpec",
    "RankError",
    "RopeScaling",
    "RunSettings",
    "RunSpec",
    "ScheduleError",
    "SourceSpec",
    "StrettoError",
    "TrainingSpec",
    "UnsupportedError",
    "VideoSpec",
    "check",
    "cluster_preset",
    "convert",
    "diagnose",
    "generate",
    "load_run",
    "model_preset",
    "plan",
    "simulate",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import ``name`` from the room that defines it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'stretto' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
