"""Where the axes of a plan lie on the machines.

Ranks are numbered with tp innermost, then cp, the data axes and pp outermost, and nodes hold consecutive ranks.  An
axis of degree n whose neighbours are s ranks apart therefore spans n x s consecutive ranks: within a node if that is no
more than a node's devices (and they divide evenly), else across nodes.

    tp 8 │ cp 1 │ dp_shard 4 │ dp_replicate 1 │ pp 8     devices per node 8
    span 8       32                             256      tp inside a node, the others across
"""

from __future__ import annotations

from stretto.planner.groups import group_words
from stretto.spec.cluster import ClusterSpec
from stretto.spec.plan import PlanSpec

INNERMOST_FIRST = ("tp", "cp", "dp_shard", "dp_replicate", "pp")
"""Axes of the mesh, neighbours nearest to neighbours furthest."""


def placed(plan: PlanSpec, cluster: ClusterSpec) -> dict[str, str]:
    """Each axis above 1: ``node`` where its groups lie inside one node, else ``network``.

    >>> from stretto.spec.presets_cluster import cluster_preset
    >>> placed(PlanSpec(tp=8, pp=2), cluster_preset("h100:16"))
    {'tp': 'node', 'pp': 'network'}
    """
    found: dict[str, str] = {}
    span = 1
    for axis in INNERMOST_FIRST:
        degree = getattr(plan, axis)
        span *= degree
        if degree > 1:
            inside = plan.num_ranks <= cluster.devices_per_node or cluster.devices_per_node % span == 0
            found[axis] = "node" if inside else "network"
    return found


def placement_words(plan: PlanSpec, cluster: ClusterSpec) -> str:
    """The same as a sentence."""
    found = placed(plan, cluster)
    inside = [axis for axis, where in found.items() if where == "node"]
    across = [axis for axis, where in found.items() if where == "network"]
    if not found:
        return "placement: one rank"
    words = [f"{' and '.join(inside)} inside a node"] if inside else []
    words += [f"{' and '.join(across)} across nodes"] if across else []
    line = f"placement: {', '.join(words)} (ranks in order, node by node)"
    mix = group_words(plan, cluster)
    if not mix:
        return line
    return f"{line}\n{mix}: start the nodes in this order; every replica has the same mix and the same batch"
