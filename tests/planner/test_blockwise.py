"""Attention cut over cp: tiles as the runtime walks them, what a ring waits for, what overlapping costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stretto.planner.blockwise import TILE, blockwise_seconds, tiles
from stretto.planner.calibration import Calibration, published
from stretto.planner.communication import context_seconds, group
from stretto.planner.compute import attention_seconds, layer_seconds, recompute_seconds
from stretto.planner.memory import layer_activation_bytes, memory
from stretto.planner.own_stack import own_stack
from stretto.planner.request import Request
from stretto.planner.search import search
from stretto.planner.step import exposed_seconds
from stretto.planner.workload import Workload
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.sequence import Arrangement, Range, cut_sequence
from stretto.spec.training import TrainingSpec


def work_of(length: int = 8192, **plan: object) -> Workload:
    """Llama 3 8B on one node."""
    return Workload(
        model=model_preset("llama-3-8b"),
        plan=PlanSpec(**plan),
        cluster=cluster_preset("h100:8"),
        sequence_length=length,
        global_batch_size=8,
        stack=own_stack(TrainingSpec(dtype="bfloat16")),
    )


def walked(plan: PlanSpec, length: int) -> int:
    """Tiles in which some query sees some key, on the rank that has most: each pair of pieces, cut in tiles."""
    who = Arrangement.of(plan)
    seats = who.seated(cut_sequence(length, plan.cp, plan.context_layout))

    def cut(piece: Range) -> list[Range]:
        return [(at, min(at + TILE, piece[1])) for at in range(piece[0], piece[1], TILE)]

    counts = []
    for seat in seats:
        queries = [tile for piece in seat for tile in cut(piece)]
        keys = [tile for other in seats for piece in other for tile in cut(piece)]
        counts.append(sum(key[0] < query[1] for query in queries for key in keys))
    return max(counts)


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize(
    "plan",
    [
        PlanSpec(cp=2),
        PlanSpec(cp=4),
        PlanSpec(cp=4, context_layout="contiguous"),
        PlanSpec(cp=8, context="ulysses"),
        PlanSpec(cp=8, context="mesh", ulysses=2),
    ],
)
def test_tiles_are_those_of_the_runtime(plan: PlanSpec, length: int) -> None:
    work = replace(work_of(length), plan=plan)
    number, side = tiles(work)
    assert number == walked(plan, length)
    assert side <= TILE


def test_cut_attention_costs_more_than_its_kernel() -> None:
    """The scores of a tile go through memory; a kernel keeps them on the chip."""
    calibration = published("h100:8")
    own = work_of(cp=4, attention_backend="blockwise")
    with_kernel = replace(own, plan=replace(own.plan, attention_backend="auto"))
    dropping = replace(with_kernel, model=replace(own.model, dropout=0.1))
    assert attention_seconds(dropping, calibration) == attention_seconds(own, calibration)
    assert attention_seconds(own, calibration).forward == blockwise_seconds(own, calibration)[0]
    assert attention_seconds(own, calibration).forward > 5 * attention_seconds(with_kernel, calibration).forward


def test_recompute_keeps_the_results_of_cut_attention() -> None:
    calibration = Calibration()
    work = work_of(cp=4, recompute="full")
    again = layer_seconds(work, calibration).forward - attention_seconds(work, calibration).forward
    assert recompute_seconds(work, calibration) == pytest.approx(again)


def test_cut_attention_has_bytes_of_its_own() -> None:
    """Full recompute keeps its results; a tile of scores is alive in every backward pass."""
    own = work_of(cp=4, recompute="full", attention_backend="blockwise")
    plain = replace(own, stack=replace(own.stack, context_kernel="same"))
    fused = replace(own, plan=replace(own.plan, attention_backend="auto"))
    assert memory(own)[0].temporaries - memory(fused)[0].temporaries == 16 * 512 * 512 * 32
    of_results = 2048 * 32 * (2 * 128 + 4)
    assert layer_activation_bytes(own) - layer_activation_bytes(plain) == of_results
    more = memory(own)[0].temporaries - memory(plain)[0].temporaries
    assert more == 16 * 512 * 512 * 32 + 2048 * (4 * 32 * 128 + 2 * 2 * 8 * 128 * 6)


def test_a_ring_hides_a_message_under_one_block() -> None:
    """Three messages beside four blocks: the last block has none to hide."""
    work = replace(work_of(cp=4), stack=replace(own_stack(TrainingSpec(dtype="bfloat16")), context_kernel="same"))
    slow = replace(work, cluster=replace(work.cluster, link_bytes_per_second=1e9))
    calibration = Calibration()
    ring = group(slow, 4, 1, calibration)
    message = 2 * slow.model.kv_heads * slow.tokens * slow.model.head_size * 2
    travels = ring.latency + message / ring.bytes_per_second
    block = attention_seconds(slow, calibration).forward / 4
    assert travels > block
    assert context_seconds(slow, calibration)[0] == pytest.approx(3 * (travels - block))
    assert context_seconds(work, calibration)[0] == 0
    assert context_seconds(work, published("h100"))[0] > 0


def test_a_mesh_hides_its_exchange_under_its_own_block() -> None:
    """What isn't hidden is the exchange; where attention is long, here in tiles, nothing is waited for."""
    calibration, tiles = Calibration(), {"cp": 4, "attention_backend": "blockwise"}
    work = replace(work_of(cp=4, context="ulysses"), cluster=replace(work_of(cp=4).cluster, link_bytes_per_second=1e8))
    whole = group(work, 4, 1, calibration).all_to_all(2 * work.tokens * 128 * 2 * (8 + 32))
    forward, backward = context_seconds(work, calibration)
    attention = attention_seconds(work, calibration)
    assert forward == pytest.approx(whole - attention.forward / 4, rel=1e-4)
    assert backward == pytest.approx(whole - attention.backward / 4, rel=1e-4)
    assert context_seconds(work_of(context="ulysses", **tiles), calibration) == (0, 0)
    assert context_seconds(work_of(context="mesh", ulysses=2, **tiles), calibration) == (0, 0)


def test_a_window_sends_what_it_sees() -> None:
    calibration = Calibration()
    work = replace(work_of(cp=4, context="all-gather"), sequence_length=8192)
    work = replace(work, cluster=replace(work.cluster, link_bytes_per_second=1e8))
    short = replace(work, model=replace(work.model, sliding_window=513))
    ratio = context_seconds(short, calibration)[0] / context_seconds(work, calibration)[0]
    assert ratio == pytest.approx(2 * 512 / (8192 * 3 / 4), rel=0.05)


def test_hidden_reduction_takes_processors() -> None:
    work = work_of(dp_shard=8, zero=3)
    free = exposed_seconds(work, 1e3, Calibration())
    taken = exposed_seconds(work, 1e3, replace(Calibration(), overlap=0.1))
    assert free == 0
    assert taken > 0


def test_the_fastest_way_to_cut_is_chosen() -> None:
    """Against every way pinned, one after the other."""
    training = TrainingSpec(global_batch_size=1, sequence_length=8192, dtype="bfloat16")
    run = RunSpec(model=model_preset("llama-3-8b"), cluster=cluster_preset("h100:8"), training=training)
    pins = {"pp": 1, "tp": 1, "cp": 8, "recompute": "full", "micro_batch_size": 1}
    free = search(Request(run=run, pins=pins), top=1).plans[0]
    ways: list[dict[str, object]] = [{"context": way} for way in ("ring", "ulysses", "token-ring", "all-gather")]
    ways += [{"context": "mesh", "ulysses": sharers} for sharers in (2, 4)]
    each = [search(Request(run=run, pins={**pins, **way}), top=1).plans[0].seconds for way in ways]
    assert free.seconds == min(each)
    assert len(set(each)) > 2
