"""The room's public face."""

import stretto.schedule
from stretto.schedule import simulate
from stretto.schedule.families import FAMILIES


def test_the_names_others_import() -> None:
    assert sorted(stretto.schedule.__all__) == ["Kind", "Op", "Schedule"]
    assert sorted(simulate.__all__) == [
        "Attribution", "Costs", "Curve", "Figures", "Network", "StageCosts", "Timeline", "attribution", "critical_path",
        "figures_of", "lower_bound", "memory_curve", "peak_activation", "run", "simulate",
    ]  # fmt: skip
    assert list(FAMILIES) == ["gpipe", "1f1b", "interleaved", "forward-only"]
