"""A few schedules, kept as text: any change of an order or of a time shows in the diff.

After an intended change, ``python tests/golden/test_schedules_as_text.py`` writes the files anew.
"""

from pathlib import Path

import pytest

from stretto.schedule import Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.rendezvous import lower_rendezvous
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run

SCHEDULES: dict[str, Schedule] = {
    "gpipe-4x6": build("gpipe", ranks=4, microbatches=6),
    "1f1b-4x8": build("1f1b", ranks=4, microbatches=8),
    "1f1b-split-4x8": split_backward(build("1f1b", ranks=4, microbatches=8)),
    "1f1b-lowered-3x4": lower(build("1f1b", ranks=3, microbatches=4)),
    "1f1b-rendezvous-3x4": lower_rendezvous(build("1f1b", ranks=3, microbatches=4)),
    "interleaved-4x8x2": build("interleaved", ranks=4, microbatches=8, chunks=2),
    "interleaved-4x6x2": build("interleaved", ranks=4, microbatches=6, chunks=2),
    "interleaved-4x3x2": build("interleaved", ranks=4, microbatches=3, chunks=2),
    "zb-h1-4x6": build("zb-h1", ranks=4, microbatches=6),
    "zb-h2-4x8": build("zb-h2", ranks=4, microbatches=8),
    "zb-auto-4x8": build("zb-auto", ranks=4, microbatches=8),
    "v-min-4x6": build("v-min", ranks=4, microbatches=6),
    "v-half-3x5": build("v-half", ranks=3, microbatches=5),
    "zb-v-4x8": build("zb-v", ranks=4, microbatches=8),
    "group-interleaved-4x8x2": build("group-interleaved", ranks=4, microbatches=8, chunks=2, options={"group": 2}),
    "breadth-first-4x6x2": build("breadth-first", ranks=4, microbatches=6, chunks=2),
    "breadth-first-sharded-2x3x3": build("breadth-first", ranks=2, microbatches=3, chunks=3, options={"sharded": True}),
    "modular-2x4x3": build("modular", ranks=2, microbatches=4, chunks=3),
    "hanayo-4x5": build("hanayo", ranks=4, microbatches=5),
    "hanayo-4x8x2": build("hanayo", ranks=4, microbatches=8, options={"waves": 2}),
    "chimera-4x8": build("chimera", ranks=4, microbatches=8),
    "bitpipe-4x5": build("bitpipe", ranks=4, microbatches=5),
    "bitpipe-4x8": build("bitpipe", ranks=4, microbatches=8),
    "dualpipe-4x5": build("dualpipe", ranks=4, microbatches=5),
    "dualpipe-4x10": build("dualpipe", ranks=4, microbatches=10),
    "dualpipe-lowered-2x4": lower(build("dualpipe", ranks=2, microbatches=4)),
    "dualpipe-v-3x7": build("dualpipe-v", ranks=3, microbatches=7),
    "zeropp-4x7x2": build("zeropp", ranks=4, microbatches=7, chunks=2),
    "zeropp-4x9x2": build("zeropp", ranks=4, microbatches=9, chunks=2, options={"unit": 4, "sharded": False}),
    "forward-only-4x6x2": build("forward-only", ranks=4, microbatches=6, chunks=2),
}
FOLDER = Path(__file__).parent


def shown(schedule: Schedule) -> str:
    """The drawing, and the order of each rank."""
    return f"{draw(run(schedule, Costs()))}\n\n{schedule}\n"


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedule_is_as_it_was(name: str) -> None:
    assert shown(SCHEDULES[name]) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_no_file_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(SCHEDULES)


if __name__ == "__main__":
    for name, schedule in SCHEDULES.items():
        (FOLDER / f"{name}.txt").write_text(shown(schedule), encoding="utf-8")
