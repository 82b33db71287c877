"""Machines of unequal devices in one run: which pipeline ranks lie on which group, and what each group is.

    ranks   0 ........ 15 │ 16 ...................... 47      pipeline ranks are outermost, so each of them is one run
    pp      0             │ 1             2                  of ranks; whole pipeline ranks lie in one group.  Its
    group   h100:16       │ a100:32                           stages have as many layers as its devices can do

All replicas of the data axes run through the same mix, since a pipeline rank's ranks are all in one group.  So every
rank has the same batch, which is all that this version can run: groups that share the batch unevenly (Cephalo) can't be
replicas of each other.  Groups with networks that don't speak to each other meet only in messages between stages, which
are small (Holmes): gradients never leave a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import permutations
from math import gcd

from stretto.planner.workload import Workload, looped
from stretto.spec.cluster import ClusterSpec, DeviceGroup
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import CLUSTERS

RATES = ("peak_flops_bfloat16", "memory_bytes_per_second", "link_bytes_per_second", "network_bytes_per_second")
"""What must be known of a group."""
ORDERS = 24
"""Orders of the groups that are tried: all of four."""


def mixed(each: Sequence[ClusterSpec], *, name: str, between: float | None, place: str) -> ClusterSpec:
    """One cluster of several groups.

    Its own rates serve what has no group: the mean peak (for MFU), the most memory, the slowest links, and
    ``between`` (bytes a second of a device to other groups; None: the slowest group's network).
    """
    if name.partition(":")[0] in CLUSTERS:
        raise ConfigError(f"{place}: {name!r} is the name of a preset; name mixed machines otherwise, or not at all.")
    for number, one in enumerate(each, start=1):
        unknown = [rate for rate in RATES if not getattr(one, rate)]
        if unknown:
            raise ConfigError(
                f"{place}: group {number} ({one.name}) doesn't tell {', '.join(unknown)}; write it, or take a preset "
                f"({', '.join(preset for preset in CLUSTERS if preset != 'local-cpu')})."
            )
    groups = tuple(DeviceGroup(**{part.name: getattr(one, part.name) for part in fields(DeviceGroup)}) for one in each)
    devices, per_node = sum(group.devices for group in groups), gcd(*(group.devices_per_node for group in groups))
    return ClusterSpec(
        name=name,
        num_nodes=devices // per_node,
        devices_per_node=per_node,
        memory_bytes=max(group.memory_bytes for group in groups),
        peak_flops_bfloat16=sum(group.peak_flops_bfloat16 * group.devices for group in groups) / devices,
        memory_bytes_per_second=min(group.memory_bytes_per_second for group in groups),
        link_bytes_per_second=min(group.link_bytes_per_second for group in groups),
        network_bytes_per_second=between or min(group.network_bytes_per_second for group in groups),
        groups=groups,
    )


def divides(cluster: ClusterSpec, pp: int) -> bool:
    """Whether whole pipeline ranks fill each group."""
    devices = sum(group.devices for group in cluster.groups)
    return devices % pp == 0 and all(group.devices % (devices // pp) == 0 for group in cluster.groups)


def of_ranks(plan: PlanSpec, cluster: ClusterSpec) -> tuple[ClusterSpec, ...]:
    """The machines of each pipeline rank; UnsupportedError where a pipeline rank would lie on two groups."""
    if not cluster.groups:
        return (cluster,) * plan.pp
    if not divides(cluster, plan.pp) or not looped(plan):
        listed = ", ".join(f"{group.name} ({group.devices})" for group in cluster.groups)
        raise UnsupportedError(
            f"pp={plan.pp} under {plan.schedule} doesn't put whole pipeline ranks on each group of {listed}; in this "
            "version every data-parallel replica has the same mix of devices and the same batch."
        )
    ranks = sum(group.devices for group in cluster.groups) // plan.pp
    return tuple(plain(group) for group in cluster.groups for _ in range(group.devices // ranks))


def plain(group: DeviceGroup) -> ClusterSpec:
    """A group as a cluster of its own."""
    return ClusterSpec(**{part.name: getattr(group, part.name) for part in fields(group)})


def limits(work: Workload) -> tuple[float, ...]:
    """Memory of the devices of each pipeline rank, in bytes."""
    return tuple(machines.memory_bytes for machines in of_ranks(work.plan, work.cluster))


def apart(work: Workload) -> dict[ClusterSpec, list[int]]:
    """Pipeline ranks by the machines that they lie on."""
    found: dict[ClusterSpec, list[int]] = {}
    for rank, machines in enumerate(of_ranks(work.plan, work.cluster)):
        found.setdefault(machines, []).append(rank)
    return found


def arranged(cluster: ClusterSpec) -> Iterator[ClusterSpec]:
    """The cluster with its groups in every order, which decides who has the first stages."""
    seen = dict.fromkeys(permutations(cluster.groups))
    for number, order in enumerate(seen):
        if number < ORDERS:
            yield replace(cluster, groups=order)


def group_words(plan: PlanSpec, cluster: ClusterSpec) -> str:
    """Which ranks lie on which group: ``ranks 0-15 on h100:16 (pipeline rank 0), ...``; empty without groups."""
    if not cluster.groups:
        return ""
    words, rank, size = [], 0, plan.num_ranks // plan.pp
    for group in cluster.groups:
        last = rank + group.devices - 1
        first, end = rank // size, last // size
        stages = f"pipeline rank {first}" if first == end else f"pipeline ranks {first}-{end}"
        words.append(f"ranks {rank}-{last} on {group.name} ({stages})")
        rank = last + 1
    return "; ".join(words)
