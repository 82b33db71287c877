"""What passes and skip-pipe make of a small schedule, kept as text: any change shows in the diff.

After an intended change, ``python tests/golden/passes/test_passes_as_text.py`` writes the files anew.
"""

from pathlib import Path

import pytest

from stretto.schedule import Schedule
from stretto.schedule.families import build
from stretto.schedule.passes import change
from stretto.schedule.passes.asynchronous import asynchronous
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run

COSTS = Costs(S=0.5, T=0.5, O=0.5, L=0.5, UNSHARD=0.5, REDUCE_GRAD=0.5)
PLAIN = build("1f1b", ranks=4, microbatches=8)
CHUNKED = build("interleaved", ranks=2, microbatches=4, chunks=2)
CHANGED: dict[str, tuple[Schedule, Costs]] = {
    "vocabulary-1-1f1b-4x8": change(PLAIN, "vocabulary", options={"algorithm": 1}, costs=COSTS),
    "vocabulary-2-1f1b-4x8": change(PLAIN, "vocabulary", options={"algorithm": 2}, costs=COSTS),
    "recompute-1f1b-4x8": change(PLAIN, "recompute"),
    "offload-1f1b-4x8": change(PLAIN, "offload", costs=COSTS),
    "offload-limit-1f1b-4x8": change(PLAIN, "offload", options={"limit": 3}, costs=COSTS),
    "fill-bubbles-1f1b-3x3": change(
        build("1f1b", ranks=3, microbatches=3), "fill-bubbles", options={"frozen": "0.5+0.5", "units": 6}
    ),
    "sharding-interleaved-2x4x2": change(CHUNKED, "sharding", options={"blocks": 2}, costs=COSTS),
    "asynchronous-1f1b-4x8": (asynchronous(PLAIN), Costs(OPT=0.5)),
    "skip-pipe-4x6": (build("skip-pipe", ranks=4, microbatches=6), Costs()),
}
FOLDER = Path(__file__).parent


def shown(schedule: Schedule, costs: Costs) -> str:
    """The drawing, and the order of each rank."""
    return f"{draw(run(schedule, costs))}\n\n{schedule}\n"


@pytest.mark.parametrize("name", sorted(CHANGED))
def test_schedule_is_as_it_was(name: str) -> None:
    assert shown(*CHANGED[name]) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_no_file_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(CHANGED)


if __name__ == "__main__":
    for name, changed in CHANGED.items():
        (FOLDER / f"{name}.txt").write_text(shown(*changed), encoding="utf-8")
