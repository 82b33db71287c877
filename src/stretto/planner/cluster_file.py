"""A cluster in a file of its own: the keys of ``[cluster]``, and what a device costs.

    name = "h100:64"                    a preset, or a label beside all rates
    memory_bytes = 80e9                 any key of [cluster] written over the preset
    price_per_device_hour = 2.5         for --objective cost
    price_source = "our contract"       where the price is from

A file may hold these at its top or under ``[cluster]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    table: dict[str, Any] = dict(raw.get("cluster", raw))
    if "groups" in table or "groups" in raw:
        raise ConfigError(
            f"{path}: several groups of devices in one run aren't in this version, since every rank gets an equal "
            "share of the batch; plan each group by itself, or all by the rates and the memory of the slowest."
        )
    extra = {key: table.pop(key) for key in EXTRA if key in table}
    for key, value in extra.items():
        if isinstance(value, bool) or not isinstance(value, EXTRA[key]):
            raise ConfigError(f"{path}: {key} must be {'a number' if key.startswith('price_per') else 'a string'}.")
    import tomli_w

    cluster = resolve_text(tomli_w.dumps({"cluster": table}), str(path)).cluster
    for key in ("num_nodes", "devices_per_node", "memory_bytes"):
        if getattr(cluster, key) <= 0:
            raise ConfigError(
                f"{path}: cluster.{key} = {getattr(cluster, key)} must be positive: there are no devices."
            )
    price = extra.get("price_per_device_hour")
    return ClusterFile(
        cluster=cluster, price=None if price is None else float(price), source=str(extra.get("price_source", ""))
    )
