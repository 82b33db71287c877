"""The file that ``stretto diagnose --calibrate`` writes: what was measured of a machine, as TOML or JSON by its ending.

    [machine]                         figures by size (``planner.machine``)
    [shares]                          any field of ``planner.calibration``, written over its default

A file may hold either.  Rates that ``[shares]`` speaks of are shares of those in ``[cluster]``.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from stretto.planner.calibration import Calibration, published
from stretto.planner.machine import Machine
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, nearest

FORMAT = "stretto.calibration/1"
"""First key of a file."""


def write_calibration(machine: Machine, path: Path) -> None:
    """Write a measured machine, whole or not at all."""
    data = {"format": FORMAT, "machine": machine.as_data()}
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
    shares = _shares(data.get("shares", {}), path)
    if "machine" in data:
        try:
            shares["machine"] = Machine.of_data(data["machine"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: [machine] isn't what stretto diagnose --calibrate writes ({error}); measure again."
            ) from error
    return dataclasses.replace(published(cluster), **shares)


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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"{path}: shares.{key} must be a number above 0.")
    return dict(given)
