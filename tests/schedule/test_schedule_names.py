"""The room's public face."""

import stretto.schedule
from stretto.schedule import simulate
from stretto.schedule.families import FAMILIES

NAMES = """
    gpipe 1f1b interleaved breadth-first zb-h1 zb-h2 zb-auto zb-v v-half v-min hanayo chimera bitpipe dualpipe
    dualpipe-v zeropp group-interleaved skip-pipe forward-only auto
"""
"""Families that run files and command lines name."""


def test_the_names_others_import() -> None:
    assert sorted(stretto.schedule.__all__) == ["Kind", "Op", "Schedule"]
    assert sorted(simulate.__all__) == [
        "Attribution", "Costs", "Curve", "Figures", "Network", "StageCosts", "Timeline", "attribution", "critical_path",
        "figures_of", "lower_bound", "memory_curve", "peak_activation", "run", "simulate",
    ]  # fmt: skip
    assert set(FAMILIES) >= set(NAMES.split())
