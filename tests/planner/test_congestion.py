"""Flows on shared paths: against throwing balls, and what splitting is worth."""

from __future__ import annotations

import random

import pytest

from stretto.planner.congestion import slowdown


@pytest.mark.parametrize(("flows", "paths"), [(8, 64), (32, 64), (64, 64), (256, 256)])
def test_is_the_fullest_bin(flows: int, paths: int) -> None:
    draw = random.Random(1)
    fullest = []
    for _ in range(400):
        bins = [0] * paths
        for _ in range(flows):
            bins[draw.randrange(paths)] += 1
        fullest.append(max(bins))
    assert slowdown(flows, paths) == pytest.approx(sum(fullest) / len(fullest), rel=0.05)


def test_splitting_tends_to_packet_spraying() -> None:
    """Parts on paths of their own level the load (Addanki et al. 2024): towards the mean, which is 1 here."""
    times = [slowdown(512, 512, splits) for splits in (1, 4, 16, 64, 256, 4096)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 5 and times[-2] < 1.25 and times[-1] == 1.0


def test_oversubscribed_paths_are_shared() -> None:
    assert slowdown(512, 128, 4096) == 4.0
