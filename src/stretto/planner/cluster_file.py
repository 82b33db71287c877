"""A cluster in a file of its own: the keys of ``[cluster]``, and what a device costs.

    name = "h100:64"                    a preset, or a label beside all rates
    memory_bytes = 80e9                 any key of [cluster] written over the preset
    price_per_device_hour = 2.5         for --objective cost
    price_source = "our contract"       where the price is from

A file may hold these at its top or under ``[cluster]``.  Mixed machines are groups (``groups``); beside them only a
label, the bandwidth between groups and the price are written:

    network_bytes_per_second = 25e9     of a device to other groups (the slowest group's if left out)
    [[groups]]
    name = "h100:16"
    [[groups]]
    name = "a100:32"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.planner.groups import mixed
from stretto.spec import toml
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError
from stretto.spec.resolve import resolve_text

EXTRA = {"price_per_device_hour": (int, float), "price_source": (str,)}
"""Keys that only a cluster file has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """What a cluster file says."""

    cluster: ClusterSpec
    """The machines."""
    price: float | None = None
    """Of a device for an hour; None: not said."""
    source: str = ""
    """Where the price is from."""


def read_cluster(path: Path) -> ClusterFile:
    """Read a cluster file; ConfigError for what isn't known (with the nearest key), or machines without devices."""
    raw = toml.parse(toml.read(path), str(path))
    if not raw:
        raise ConfigError(f'{path} is empty; write at least name = "a100:8", or the keys of [cluster].')
    if not isinstance(raw.get("cluster", {}), dict):
        raise ConfigError(
            f"{path}: cluster must be a section; write [cluster] and the keys under it, or the keys alone."
        )
    outside = [key for key in raw if not isinstance(raw[key], dict) and key not in ("groups", *EXTRA)]
    if "cluster" in raw and outside:
        raise ConfigError(f"{path}: {', '.join(outside)} beside [cluster] would not be read; write it under [cluster].")
    table: dict[str, Any] = {**{key: raw[key] for key in EXTRA if key in raw}, **raw.get("cluster", raw)}
    groups = table.pop("groups", raw.get("groups", []))
    if not groups and ("groups" in raw or "groups" in raw.get("cluster", {})):
        raise ConfigError(f"{path}: groups is empty; write [[groups]] and the keys of one group under each.")
    extra = {key: table.pop(key) for key in EXTRA if key in table}
    for key, value in extra.items():
        if isinstance(value, bool) or not isinstance(value, EXTRA[key]):
            raise ConfigError(f"{path}: {key} must be {'a number' if key.startswith('price_per') else 'a string'}.")
    cluster = _mixed(table, groups, str(path)) if groups else _one(table, str(path))
    price = extra.get("price_per_device_hour")
    return ClusterFile(
        cluster=cluster, price=None if price is None else float(price), source=str(extra.get("price_source", ""))
    )


def _one(table: dict[str, Any], place: str) -> ClusterSpec:
    """Equal nodes."""
    import tomli_w

    cluster = resolve_text(tomli_w.dumps({"cluster": table}), place).cluster
    for key in ("num_nodes", "devices_per_node", "memory_bytes"):
        if getattr(cluster, key) <= 0:
            without = "is no memory" if key == "memory_bytes" else "are no devices"
            raise ConfigError(f"{place}: cluster.{key} = {getattr(cluster, key):g} must be positive: there {without}.")
    return cluster


def _mixed(table: dict[str, Any], groups: Any, place: str) -> ClusterSpec:
    """Several groups; ConfigError for what else is written beside them, or a group that isn't fully known."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ConfigError(f"{place}: groups must be tables; write [[groups]] and the keys of one group under each.")
    more = [key for key in table if key not in ("name", "network_bytes_per_second")]
    if more:
        raise ConfigError(
            f"{place}: {', '.join(more)} beside [[groups]] says nothing of a group; write it under the groups."
        )
    between = table.get("network_bytes_per_second")
    if between is not None and (isinstance(between, bool) or not isinstance(between, (int, float)) or between <= 0):
        raise ConfigError(f"{place}: network_bytes_per_second must be a number above 0.")
    each = [_one(group, f"{place}: group {number}") for number, group in enumerate(groups, start=1)]
    return mixed(each, name=str(table.get("name", "mixed")), between=between, place=place)
