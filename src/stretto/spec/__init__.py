"""What is talked about: frozen dataclasses that need no torch.

A run file becomes a ``RunSpec`` in ``resolve``, is refused by ``check`` where it can't work, and is written
back by ``toml``.  The dataclasses say what every key means (docs/run-file.md is made of them); ``contract`` and
``sharding`` hold what the rooms above need of each other.
"""

from stretto.spec.check import check
from stretto.spec.checkpoint import CheckpointSpec
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.model import ModelSpec, RopeScaling, VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.resolve import load_run
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.stages import stages_of
from stretto.spec.training import TrainingSpec

__all__ = [
    "CheckpointSpec",
    "ClusterSpec",
    "DataSpec",
    "ModelSpec",
    "PlanSpec",
    "RopeScaling",
    "RunSettings",
    "RunSpec",
    "SourceSpec",
    "TrainingSpec",
    "VideoSpec",
    "check",
    "cluster_preset",
    "load_run",
    "model_preset",
    "stages_of",
]
