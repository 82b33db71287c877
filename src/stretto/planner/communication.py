"""Time of collectives: latency plus volume over bandwidth (alpha-beta), per level of links.

    all-reduce of B bytes over n    ring   2(n - 1) hops of alpha, 2 (n - 1)/n B over the bandwidth
                                    tree   2 log2(n) hops,         2 B over the bandwidth
    all-gather or reduce-scatter    half of the ring's

whichever is less (Thakur et al. 2005; NCCL chooses likewise).

Links have levels: modules (``module_devices``), the node, the network.  A group whose neighbours are ``stride``
ranks apart has L = devices per node / stride members in a node.  L = n: only links inside the node count.  Otherwise
the ring enters and leaves a node through the network adapters of its L members (or as many as the software gives a
ring), while the other groups of the node use theirs.  Beyond the node flows of all groups share the switches' uplinks,
as many as there are adapters where nothing is oversubscribed, and the fullest decides (``congestion``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from stretto.planner import video
from stretto.planner.calibration import Calibration
from stretto.planner.compute import attention_seconds
from stretto.planner.congestion import slowdown
from stretto.planner.linear_layers import kind_of, mean
from stretto.planner.workload import Workload
from stretto.spec.cluster import ClusterSpec
from stretto.spec.sequence import Arrangement

ACTIVATION_BYTES = 2
"""Of an activation that is sent, 16-bit."""
SUM_SHARE = 2.0
"""Bytes of a sum that isn't complete (float32) over those of an activation."""
STATIC = ("a100", "mi250x", "leonardo", "fire-flyer")
"""Machines whose networks (HDR InfiniBand, first Slingshot) are taken to keep a flow on one path."""
ADAPTIVE_SPLITS = 8
"""Parts that others are taken to split a flow into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Ranks that communicate with each other, and what they do it over."""

    size: int
    bytes_per_second: float
    latency: float

    def all_reduce(self, num_bytes: float) -> float:
        """Seconds until all ranks hold the sum of ``num_bytes``."""
        if self.size == 1:
            return 0.0
        ring = 2 * (self.size - 1) * (self.latency + num_bytes / self.size / self.bytes_per_second)
        tree = 2 * ceil(log2(self.size)) * self.latency + 2 * num_bytes / self.bytes_per_second
        return min(ring, tree)

    def all_gather(self, num_bytes: float) -> float:
        """Seconds until all ranks hold all of ``num_bytes``; a reduce-scatter takes as long."""
        if self.size == 1:
            return 0.0
        return (self.size - 1) * (self.latency + num_bytes / self.size / self.bytes_per_second)

    def all_to_all(self, num_bytes: float) -> float:
        """Seconds until every rank has its part of the others' ``num_bytes``."""
        return self.all_gather(num_bytes)


def group(work: Workload, size: int, stride: int, calibration: Calibration) -> Group:
    """The group of ``size`` ranks that lie ``stride`` apart."""
    cluster = work.cluster
    link = inner_rate(cluster, size * stride) * calibration.link
    local = max(1, cluster.devices_per_node // stride)
    if size <= local:
        return Group(size=size, bytes_per_second=link, latency=calibration.link_latency)
    adapters = min(local, work.stack.adapters_per_ring or local)
    rate = adapters * cluster.network_bytes_per_second * calibration.network
    nodes = max(1, work.plan.num_ranks // cluster.devices_per_node)
    flows = nodes * min(cluster.devices_per_node, adapters * stride)
    rate /= slowdown(flows, nodes * cluster.devices_per_node, flow_splits(work, calibration))
    return Group(size=size, bytes_per_second=min(link or float("inf"), rate), latency=calibration.network_latency)


def inner_rate(cluster: ClusterSpec, span: int) -> float:
    """Bytes a second of a device to others of its node, the nearest ``span`` of them."""
    return cluster.module_bytes_per_second if span <= cluster.module_devices else cluster.link_bytes_per_second


def flow_splits(work: Workload, calibration: Calibration) -> int:
    """Parts of a flow that take paths of their own in the network of these machines."""
    static = work.cluster.name.partition(":")[0] in STATIC
    return calibration.flow_splits or (1 if static else ADAPTIVE_SPLITS)


def tensor_seconds(work: Workload, calibration: Calibration) -> tuple[float, float, float]:
    """Tensor-parallel collectives of one layer and micro-batch: forward, backward, recompute.

    Forward sums the outputs of attention and feed-forward, backward the gradients of their inputs.
    Sequence parallelism makes each of them a reduce-scatter and an all-gather (the same volume), and
    gathers the two inputs once more for the gradients of the weights.
    """
    plan = work.plan
    ring = group(work, plan.tp, 1, calibration)
    moved = work.tokens * work.model.hidden_size * ACTIVATION_BYTES
    once = 2 * ring.all_reduce(moved)
    if not work.stack.sequence_parallel:
        return once, once, once if plan.recompute == "full" else 0.0
    once = 4 * ring.all_gather(moved)
    again = 2 * ring.all_gather(moved) if work.stack.gathers_again else 0.0
    return once, once + again, once if plan.recompute == "full" else 0.0


def logits_seconds(work: Workload, calibration: Calibration) -> float:
    """Gathering the logits of one micro-batch over tp, where the loss wants them whole."""
    if work.stack.sharded_logits:
        return 0.0
    return group(work, work.plan.tp, 1, calibration).all_gather(work.tokens * work.model.vocab_size * ACTIVATION_BYTES)


def context_seconds(work: Workload, calibration: Calibration) -> tuple[float, float]:
    """What one layer and micro-batch waits for the sequence of other cp ranks: forward, backward.

    A ring hands keys and values (a token ring queries and outputs) from seat to seat, each under the attention to those
    at hand: n - 1 messages under n blocks, and only what a message takes longer than a block is waited for; backward
    the gradients travel too.  All-gather brings all keys and values first, Ulysses exchanges heads for sequence before
    and after attention, and a mesh does so in groups of ``plan.ulysses`` and goes round over the others (volumes:
    ``sequence_volume``).  Each seat of a mesh has all tokens of its ranks, and a share of their heads; what these
    exchange is hidden under the part of their block that needs nothing of the others.  What is hidden takes processors
    from attention.  Clips exchange frames for patches and back, and nothing hides that.
    """
    plan, model = work.plan, work.model
    if plan.cp == 1:
        return 0.0, 0.0
    if model.video is not None:
        return _switched(work, group(work, plan.cp, plan.tp, calibration))
    if len(set(model.attention)) > 1:
        forward = mean(work, lambda one: context_seconds(one, calibration)[0])
        return forward, mean(work, lambda one: context_seconds(one, calibration)[1])
    if model.keeps_states:
        return _states_seconds(work, calibration)
    ways = group(work, plan.cp, plan.tp, calibration)
    row = work.tokens * model.head_size / plan.tp * ACTIVATION_BYTES
    keys, queries, seen = 2 * model.kv_heads * row, 2 * model.num_heads * row, _seen_share(work)
    again = not plan.context_keep
    if plan.context == "all-gather":
        gathered = ways.all_gather(seen * keys * plan.cp)
        return gathered, (again + SUM_SHARE) * gathered
    seats = {"ulysses": 1, "mesh": plan.cp // plan.ulysses}.get(plan.context, plan.cp)
    attention = attention_seconds(work, calibration)
    exchanged = _exchanged(group(work, plan.cp // seats, plan.tp, calibration), work, calibration, (keys, queries))
    if seats == 1:
        return exchanged
    carried = seen * keys * _repeated(work, plan.cp // seats)
    back = (again + SUM_SHARE) * carried
    if plan.context == "token-ring":
        carried, back = seen * (0.5 + SUM_SHARE) * queries, seen * (1 + 1.5 * SUM_SHARE) * queries
    pieces = Arrangement.of(plan).pieces
    ring = group(work, seats, plan.tp * plan.cp // seats, calibration)
    return (
        exchanged[0] + under(ring, carried, attention.forward, calibration, pieces),
        exchanged[1] + under(ring, back, attention.backward, calibration, pieces),
    )


def _seen_share(work: Workload) -> float:
    """Of the tokens of other seats those that a window lets a seat see, and that travel: one window back from each of
    its pieces."""
    plan, window = work.plan, work.model.sliding_window
    if window is None or window >= work.sequence_length:
        return 1.0
    pieces = 2 if plan.context_layout == "zigzag" else 1
    return min(1.0, pieces * (window - 1) / (work.sequence_length * (plan.cp - 1) / plan.cp))


def _exchanged(
    sharers: Group, work: Workload, calibration: Calibration, sizes: tuple[float, float]
) -> tuple[float, float]:
    """What the ranks of a seat wait for each other's heads: forward, backward.

    Of a seat's block each of its n ranks can do own queries to own keys (1/n^2) without the others, and own queries to
    all keys (1/n) as these come.  Forward that hides what comes, and in the last block what leaves, or half of each
    where first and last block are the same; backward own queries to others' keys hide what comes, own to own what
    leaves.  With a ring outside keys alone are waited for first, and hide as late.
    """
    if sharers.size == 1:
        return 0.0, 0.0
    (keys, queries), n = sizes, sharers.size
    repeated = _repeated(work, n)
    attention, seats = attention_seconds(work, calibration), work.plan.cp // n
    forward, backward = attention.forward / seats, attention.backward / seats

    def waits(num_bytes: float, block: float) -> float:
        travels = sharers.all_to_all(num_bytes)
        left = max(0.0, travels - block)
        return left + calibration.overlap * (travels - left)

    own, row = 1 / n**2, 1 / n / (2 if seats == 1 else 1)
    there, back = keys * repeated + queries / 2, queries / 2
    if seats > 1 and work.plan.context_inner == "ulysses":  # the ring's messages go first
        return (
            waits(keys * repeated, forward * own) + waits(queries / 2 + back, 2 * forward * row),
            waits(keys * repeated + back, 2 * backward * own) + waits(queries / 2, backward * row),
        )
    return (
        waits(there, forward * max(own, row)) + waits(back, forward * row),
        waits(back, backward * (1 / n - own)) + waits(there, backward * own),
    )


def _repeated(work: Workload, sharers: int) -> float:
    """How many ranks of a seat get each key/value head, where there are fewer of these than ranks."""
    return max(1.0, sharers * work.plan.tp / work.model.kv_heads)


def _switched(work: Workload, ways: Group) -> tuple[float, float]:
    """All-to-alls of a layer over clips, of the rank that sends most, which is the first."""
    volume = video.switch_volume(work, 0, element_bytes=ACTIVATION_BYTES)
    waits = (ways.size - 1) * ways.latency * video.switches(work)
    again = 2 if work.plan.recompute == "full" else 1
    layers = work.model.num_layers
    forward, backward = (sent / layers / ways.bytes_per_second for sent in (volume.forward, volume.backward))
    return waits + forward, again * waits + backward


def _states_seconds(work: Workload, calibration: Calibration) -> tuple[float, float]:
    """States of one linear layer over cp, in sums' type: gathered by all at once, or handed along the whole row.

    Volumes: ``state_volume``.  Taken as waited for, though queries meet keys meanwhile.
    """
    plan, model = work.plan, work.model
    ways = group(work, plan.cp, plan.tp, calibration)
    heads = plan.micro_batch_size * model.kv_heads / plan.tp * max(4.0, work.stack.parameter_bytes)
    state, stretches = heads * model.head_size**2, 2 if plan.context_layout == "zigzag" else 1
    if plan.linear_context == "all-gather":
        turns = state if kind_of(model) == "delta" else heads
        whole = plan.cp * stretches
        return ways.all_gather(whole * (state + turns)), ways.all_gather(whole * state)
    hop = ways.latency + state / ways.bytes_per_second
    chain = (plan.cp - 1) * stretches * hop
    return chain, chain


def under(ring: Group, message: float, attention: float, calibration: Calibration, pieces: int = 1) -> float:
    """What a seat waits for n - 1 messages of so many bytes, beside n blocks of its attention.

    Each hides under one block, and all but the last of its pieces under its own keys' block besides.
    """
    travels = (ring.size - 1) * (pieces * ring.latency + message / ring.bytes_per_second)
    waits = max(0.0, travels - attention * (1 - 1 / (ring.size * pieces)))
    return waits + calibration.overlap * (travels - waits)


def boundary_seconds(work: Workload, calibration: Calibration) -> float:
    """One message of activations between neighbouring stages.

    Stages lie furthest apart, so that a message leaves its node unless the whole mesh is one.
    """
    plan, cluster = work.plan, work.cluster
    if plan.pp == 1:
        return 0.0
    inside = plan.num_ranks <= cluster.devices_per_node
    rate = cluster.link_bytes_per_second if inside else cluster.network_bytes_per_second
    split = plan.tp if work.stack.sharded_messages or work.stack.sequence_parallel else 1
    num_bytes = work.tokens * work.model.hidden_size * ACTIVATION_BYTES / split
    return calibration.network_latency + num_bytes / (rate * calibration.message)


def data_seconds(work: Workload, calibration: Calibration) -> float:
    """All that the data ranks of the fullest pipeline rank exchange in a step, hidden or not."""
    return sum(data_parts(work, calibration))


def data_parts(work: Workload, calibration: Calibration, held: float | None = None) -> tuple[float, float]:
    """Reduction of gradients and gathering of parameters of a pipeline rank, hidden or not.

    ``held``: its parameters; None: those of the fullest.

    Gradients are summed once a step and scattered over those who keep shards of them, and what each rank has stepped is
    gathered by those who share its parameters.  Divided parameters (ZeRO-3) are gathered for the forward and for the
    backward pass of every micro-batch, and their gradients reduced after each (Rajbhandari et al. 2020, section 7), as
    are those of ZeRO-2 where nobody keeps them whole (``stack.reduces_each``).  Where factors differ (P | G | O of
    ``spec.states``) each collective is between the ranks that the larger factor adds, the nearest first.

    Returns:
        Seconds of what is done for each micro-batch, over all of them, and of what is done once.
    """
    plan, stack, states = work.plan, work.stack, work.states
    ranks = plan.dp * plan.cp * work.num_replicas  # those of a bidirectional pipeline hold the same parameters
    held = work.largest_share if held is None else held

    def over(size: int, inner: int) -> Group:
        """Ranks with the same shard of ``inner``, ``size`` of them."""
        return group(work, size, plan.tp * inner, calibration)

    def between(small: int, large: int, num_bytes: float) -> float:
        """Gathering so many bytes over ``small`` ranks' shards of ``large``, or scattering their sums."""
        return over(large // small, small).all_gather(num_bytes / small)

    p, g, o = states.parameters, states.gradients, states.optimizer
    gathered, trains = between(1, p, held * stack.parameter_bytes), held * work.largest_trained / work.largest_share
    gradients, stepped = trains * stack.reduction_bytes, trains * stack.parameter_bytes
    scattered = between(1, p, gradients) + between(p, g, gradients)
    rest = between(p, g, stepped) + between(g, o, stepped)
    summed = o if stack.scatters_once else g
    rest += between(g, summed, gradients) + over(ranks // summed, summed).all_reduce(gradients / summed)
    number = work.num_microbatches
    if states.parameters > 1:
        return number * (2 * gathered + scattered), rest
    if stack.reduces_each and states.gradients > 1:
        return number * scattered, rest
    return 0.0, scattered + rest
