"""What a group's ranks send, in the closed form that the solver asks, is what is counted message by message."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.planner.document_costs import costs_of
from stretto.planner.document_groups import assign
from stretto.planner.document_mix import Mix
from stretto.planner.group_messages import Links, state_bytes, token_cost
from stretto.planner.sequence_volume import Heads, sequence_volume
from stretto.planner.state_volume import state_volume
from stretto.spec.cluster import ClusterSpec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, cut_sequence
from stretto.spec.training import TrainingSpec

BYTES = Links(near=0, near_byte=1.0, byte=1.0)
WAYS = [
    (4, PlanSpec(context="ulysses")),
    (8, PlanSpec(context="mesh", ulysses=4)),
    (8, PlanSpec(context="mesh", ulysses=2, inner_ring=2)),
    (2, PlanSpec(context="mesh", ulysses=4)),
    (8, PlanSpec(inner_ring=4)),
]


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize(("ranks", "plan"), WAYS)
def test_bytes_are_those_of_the_messages(ranks: int, plan: PlanSpec, kv_heads: int) -> None:
    who = Arrangement.of_group(plan, ranks)
    heads = Heads(rows=1, heads=8, kv_heads=kv_heads, head_size=16, element_bytes=2)
    shares = cut_sequence(160, ranks, "zigzag")
    counted = [sequence_volume(who, shares, rank, heads) for rank in range(ranks)]
    assert {volume.forward + volume.backward for volume in counted} == {160 * token_cost(who, heads, BYTES)}


def test_heads_that_are_read_unevenly_count_as_the_most() -> None:
    who = Arrangement.of_group(PlanSpec(context="ulysses"), 4)
    heads = Heads(rows=1, heads=12, kv_heads=3, head_size=16, element_bytes=2)
    most = max(sum_of(who, rank, heads) for rank in range(4))
    assert most <= 160 * token_cost(who, heads, BYTES) <= 1.1 * most


def sum_of(who: Arrangement, rank: int, heads: Heads) -> int:
    volume = sequence_volume(who, cut_sequence(160, who.ranks, "zigzag"), rank, heads)
    return volume.forward + volume.backward


def run_of(attention: tuple[str, ...] = ("softmax",), **plan: object) -> RunSpec:
    model = ModelSpec(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        attention=attention,
    )
    cluster = ClusterSpec(
        devices_per_node=4,
        num_nodes=2,
        link_bytes_per_second=4e9,
        network_bytes_per_second=1e9,
        peak_flops_float32=2e12,
    )
    return RunSpec(model=model, cluster=cluster, plan=PlanSpec(cp=2, dp_shard=4, **plan))  # type: ignore[arg-type]


def test_heads_are_shared_where_links_are_fast() -> None:
    """Between two nodes of four: Ulysses sends 4 of 7 messages across, the mesh with it inside only its ring."""
    ring, ulysses, mesh = (
        costs_of(run_of(**way)) for way in ({}, {"context": "ulysses"}, {"context": "mesh", "ulysses": 4})
    )
    assert ring.messages is None and set(ulysses.messages or ()) == {2, 4, 8}
    assert ulysses.sent(4) == mesh.sent(4) < ring.sent(4)
    # Per layer and byte of a token 1 near, 4 between: heads of 8 numbers of 4 bytes, one query head and one key head.
    near, byte = 250.0, 1000.0
    assert ulysses.sent(8) == pytest.approx(3 * 4 * 2 * 32 / 8 * (3 * near + 4 * byte))
    # Shared by four inside a node (2 query heads, 1 of keys), the other node's keys passed once.
    assert mesh.sent(8) == pytest.approx(3 * (4 * 3 * 32 / 8 * 3 * near + 6 * 32 / 2 * byte))


def test_groups_that_heads_cant_be_split_over_are_left_out() -> None:
    costs = costs_of(run_of(context="ulysses", tp=2))
    assert set(costs.messages or ()) == {2, 4} and not costs.serves(8) and costs.serves(1)
    # A double ring goes between nodes once.
    double, ring = costs_of(run_of(inner_ring=4)), costs_of(run_of())
    assert double.sent(4) == ring.sent(4) and double.sent(8) < ring.sent(8)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_states_are_sent_whatever_the_length(layout: str) -> None:
    run = run_of(("linear", "delta", "softmax"), context_layout=layout)
    heads = Heads(rows=1, heads=8, kv_heads=4, head_size=8, element_bytes=4)
    shares = cut_sequence(160, 4, layout)
    kinds = [state_volume("all-gather", kind, shares, 0, heads) for kind in ("linear", "delta")]
    assert 3 * state_bytes(run, sum_bytes=4) == sum(volume.forward + volume.backward for volume in kinds)
    costs, plain = costs_of(run), costs_of(run_of())
    assert costs.exchange * 3 == plain.exchange and costs.pair * 3 == plain.pair, "one layer of three has keys"
    short, long = (costs.time(n, 4) - costs.token * n / 4 - costs.pair * costs.pairs(n) / 4 for n in (10**5, 10**6))
    assert short == pytest.approx(long, rel=1e-3) == pytest.approx(3 * 250.0 * state_bytes(run, sum_bytes=4), rel=1e-3)


def test_over_many_nodes_shared_heads_are_worth_it() -> None:
    """Documents over 32 of 64 H100s: keys of every head on a ring are all that a step waits for; 32 heads divide well,
    and a mesh whose ring goes between nodes is almost as good."""
    model, cluster = replace(model_preset("llama-2-7b"), max_positions=65536), cluster_preset("h100:64")
    training = TrainingSpec(global_batch_size=64, sequence_length=65536, dtype="bfloat16")
    ways = ({}, {"inner_ring": 8}, {"context": "ulysses"}, {"context": "mesh", "ulysses": 8})
    times = []
    for way in ways:
        plan = PlanSpec(cp=8, dp_shard=8, context_groups="dynamic", **way)  # type: ignore[arg-type]
        costs = costs_of(RunSpec(model=model, cluster=cluster, training=training, plan=plan))
        placement = assign(Mix().draw(64 * 65536, seed=0), 64, costs, memory_tokens=2048)
        assert max(piece.ranks for piece in placement.pieces) == 32
        times.append(placement.makespan)
    ring, double, ulysses, mesh = times
    assert 4.5 < ring / ulysses < 5 and 1.4 < double / ulysses < 1.7 and mesh < 1.2 * ulysses
