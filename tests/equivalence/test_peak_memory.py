"""What training keeps at its most is what the simulator says, within 5%: three rows of benchmarks.activation_memory."""

from __future__ import annotations

from typing import Any

from benchmarks.activation_memory import BOUND, RANKS, measure

from ranks import Ranks


def peaks_on_rank(rank: int, world: int) -> list[dict[str, Any]]:
    return [measure(name, rank, width=64) for name in ("zb-v", "zb-h1, full recompute", "1f1b, vocabulary 2")]


def test_peak_activations_are_those_of_the_simulator(ranks: Ranks) -> None:
    for row in ranks.run(peaks_on_rank, RANKS)[0]:
        assert abs(row["worst"]) <= BOUND, row
