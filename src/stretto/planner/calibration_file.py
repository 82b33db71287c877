"""The file that ``stretto diagnose --calibrate`` writes: what was measured of a machine, as TOML or JSON by its ending.

    [machine]                         figures by size (``planner.machine``)
    [[refined]]                       a factor on one of them that a run's trace told (``planner.refinement``)
    [shares]                          any field of ``planner.calibration``, written over its default

A file may hold either, and factors where it holds a machine.  Rates that ``[shares]`` speaks of are shares of those in
``[cluster]``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto.planner.calibration import Calibration, published
from stretto.planner.machine import Machine
from stretto.planner.refinement import Refinement
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, nearest

FORMAT = "stretto.calibration/1"
"""First key of a file."""
KEYS = ("format", "machine", "refined", "shares")
"""What a file may hold."""


def write_calibration(machine: Machine, path: Path, *, shares: Mapping[str, Any] | None = None) -> None:
    """Write a measured machine and what runs told of it, with ``shares`` of its data sheet, whole or not at all."""
    data: dict[str, Any] = {"format": FORMAT, "machine": machine.as_data()}
    if machine.refinements:
        data["refined"] = [one.as_data() for one in machine.refinements]
    if shares:
        data["shares"] = dict(shares)
    if path.suffix == ".json":
        text = json.dumps(data) + "\n"
    else:
        import tomli_w

        text = tomli_w.dumps(data)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_calibration(path: str | Path, cluster: str = "") -> Calibration:
    """What a file says, over what is published of the cluster of that name.

    ConfigError where it is missing, isn't one, or has keys that aren't known.
    """
    return dataclasses.replace(published(cluster), **written(path))


def written(path: str | Path) -> dict[str, Any]:
    """The fields of Calibration that a file writes; ``machine`` among them where it was measured.  Errors as above."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"The calibration file {path} doesn't exist; stretto diagnose --calibrate --out {path} makes it."
        )
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, OSError) as error:
        raise ConfigError(f"The calibration file {path} can't be read: {error}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f'{path} isn\'t a calibration file: its format must be "{FORMAT}".')
    for key in data:
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key {key}{nearest(key, KEYS) or '; keys: ' + ', '.join(KEYS)}")
    found = _shares(data.get("shares", {}), path)
    if "machine" in data:
        found["machine"] = _machine(data, path)
    elif "refined" in data:
        raise ConfigError(f"{path}: [[refined]] corrects a [machine], but there is none; measure again.")
    return found


def _machine(data: Mapping[str, Any], path: Path) -> Machine:
    """The measured machine with what runs told of it."""
    try:
        machine = Machine.of_data(data["machine"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{path}: [machine] isn't what stretto diagnose --calibrate writes ({error}); measure again."
        ) from error
    try:
        refined = tuple(Refinement.of_data(one) for one in data.get("refined", ()))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path}: [[refined]] isn't what stretto diagnose --refine writes ({error}).") from error
    return dataclasses.replace(machine, refinements=refined)


def calibration_of(cluster: ClusterSpec) -> Calibration | None:
    """What ``cluster.calibration`` names; None where it names nothing."""
    return None if cluster.calibration is None else read_calibration(cluster.calibration, cluster.name)


def _shares(given: Any, path: Path) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(Calibration) if field.name != "machine"]
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: [shares] must be a table of numbers.")
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key shares.{key}{nearest(key, known) or '; keys: ' + ', '.join(known)}")
        kind, what = (int, "whole") if key == "flow_splits" else ((int, float), "finite")
        least = 0 if key == "overlap" else math.ulp(0.0)  # nothing may be hidden, but every rate is above 0
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < math.inf:
            raise ConfigError(f"{path}: shares.{key} must be a {what} number above 0, not {value!r}.")
    return dict(given)
