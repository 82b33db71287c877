"""The checks of ``[cluster]``: machines that there can be, rates that can be, and enough devices for the plan."""

from __future__ import annotations

from stretto.spec.cluster import ClusterSpec, DeviceGroup
from stretto.spec.errors import ConfigError
from stretto.spec.run import RunSpec

MOST = 2**24
"""Devices that there may be, and ranks of a plan along an axis."""
COUNTS = ("num_nodes", "devices_per_node", "memory_bytes")
"""What must be above 0."""
RATES = (
    "peak_flops_bfloat16",
    "peak_flops_float32",
    "memory_bytes_per_second",
    "link_bytes_per_second",
    "network_bytes_per_second",
    "module_devices",
    "module_bytes_per_second",
)
"""What may be 0: not known, or none."""


def check_cluster(run: RunSpec) -> None:
    """ConfigError for machines that can't be, or fewer devices than the plan has ranks."""
    cluster = run.cluster
    for place, machines in _each(cluster):
        for key in COUNTS:
            if getattr(machines, key) <= 0:
                raise ConfigError(f"{place}.{key} = {getattr(machines, key)} must be positive.")
        for key in RATES:
            if getattr(machines, key, 0) < 0:
                raise ConfigError(
                    f"{place}.{key} = {getattr(machines, key)} must not be negative; leave out what isn't known."
                )
        if machines.module_devices and not machines.module_bytes_per_second:
            raise ConfigError(
                f"{place}.module_devices = {machines.module_devices} are linked faster than their node, but "
                f"{place}.module_bytes_per_second doesn't say how fast; write it, or leave module_devices out."
            )
    devices = cluster.num_nodes * cluster.devices_per_node
    if devices > MOST:
        raise ConfigError(f"cluster {cluster.name!r} has {devices} devices; there may be up to {MOST:,}.")
    if cluster.groups and sum(group.devices for group in cluster.groups) != devices:
        raise ConfigError(
            f"cluster.groups have {sum(group.devices for group in cluster.groups)} devices together, but "
            f"cluster.num_nodes x cluster.devices_per_node are {devices}; write as many."
        )
    # Processes on a CPU may be as many as one likes; devices are counted.
    if cluster.name.partition(":")[0] != "local-cpu" and run.plan.num_ranks > devices:
        raise ConfigError(
            f"The plan needs {run.plan.num_ranks} ranks, but cluster {cluster.name!r} has {devices} devices; "
            f"take smaller degrees, or a larger cluster, for example by cluster.num_nodes."
        )


def _each(cluster: ClusterSpec) -> list[tuple[str, ClusterSpec | DeviceGroup]]:
    """The cluster and its groups, and how a run file names them."""
    return [("cluster", cluster), *((f"cluster.groups[{n}]", group) for n, group in enumerate(cluster.groups))]
