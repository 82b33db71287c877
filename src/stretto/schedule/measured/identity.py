"""Whose plan a trace is of: a run that goes on with another plan keeps the older one's trace until it has its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from stretto.spec import toml
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec

SHAPE = ("global_batch_size", "sequence_length")
"""Keys of ``[training]`` that decide what a step plays, beside the plan."""
SHOWN = 3
"""Keys that differ and are told."""


def identity(run: RunSpec) -> str:
    """What of a run decides what its steps play, as JSON: what isn't as it is by default.

    >>> identity(RunSpec(plan=PlanSpec(pp=2)))
    '{"plan.pp": 2}'
    """
    usual: dict[str, Any] = {f"plan.{field.name}": getattr(PlanSpec(), field.name) for field in fields(PlanSpec)}
    usual |= {f"training.{name}": getattr(TrainingSpec(), name) for name in SHAPE}
    own: dict[str, Any] = {f"plan.{field.name}": getattr(run.plan, field.name) for field in fields(PlanSpec)}
    own |= {f"training.{name}": getattr(run.training, name) for name in SHAPE}
    return json.dumps({key: value for key, value in own.items() if value != usual[key]}, sort_keys=True)


def places_documents(plan: str) -> bool:
    """Whether an identity is that of a run whose documents have groups of their own."""
    found: bool = _keys(plan).get("plan.context_groups") == "dynamic"
    return found


def check_identity(run: Path, plans: Iterable[str]) -> None:
    """ConfigError where the trace of a run's directory is of another plan than the run.toml in it.

    ``plans``: the identities of its files; of an older version's, which have none, only groups are told apart.
    """
    there = set(plans)
    if len(there) > 1:
        raise ConfigError(
            f"The trace in {run} is of several plans: some ranks' files are an older one's; train on until the run "
            "ends, which writes all of them."
        )
    path, written = run / "run.toml", there.pop()
    if not path.is_file() or not path.stat().st_size:
        return
    now = identity(toml.from_text(toml.read(path), str(path)))
    if (not written and not places_documents(now)) or written == now:
        return
    mine, others = _keys(now), _keys(written)
    keys = sorted(key for key in {*mine, *others} if mine.get(key) != others.get(key))
    told = ", ".join(f"{key} is {_value(others, key)} there and {_value(mine, key)} here" for key in keys[:SHOWN])
    raise ConfigError(
        f"The trace in {run} is of another plan than its run.toml, with which the run went on since: {told}. "
        'A new one is written when the run ends or stops with run.trace = "last".'
    )


def _keys(plan: str) -> dict[str, Any]:
    try:
        found = json.loads(plan or "{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _value(keys: dict[str, Any], key: str) -> str:
    section, _, name = key.partition(".")
    usual = getattr(PlanSpec() if section == "plan" else TrainingSpec(), name, None)
    return json.dumps(keys.get(key, usual))
