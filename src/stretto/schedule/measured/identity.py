"""Whose plan a trace is of: a run that goes on with another plan keeps the older one's trace until it has its own."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
    return _identity({"plan": asdict(run.plan), "training": asdict(run.training)})


def _identity(tables: Mapping[str, Any]) -> str:
    """The same of the tables of a run file."""
    found: dict[str, Any] = {}
    for section, usual in (("plan", asdict(PlanSpec())), ("training", asdict(TrainingSpec()))):
        written = tables.get(section, {})
        keys = usual if section == "plan" else SHAPE
        own = {key: written[key] for key in keys if isinstance(written, dict) and key in written}
        found |= {f"{section}.{key}": value for key, value in own.items() if _plain(value) != _plain(usual[key])}
    return json.dumps(found, sort_keys=True)


def _plain(value: Any) -> str:
    """As JSON has it: tuples and lists are alike."""
    return json.dumps(value, sort_keys=True)


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
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read, so that nothing says which plan the trace is of: {error}.") from None
    now = _identity(tables)
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
