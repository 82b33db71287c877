"""The SVG drawing: well-formed, to scale, complete."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from stretto.schedule.families import build
from stretto.schedule.render.svg import LEFT, RIGHT, draw, round_step
from stretto.schedule.simulate import Costs, run

SVG = "{http://www.w3.org/2000/svg}"


def boxes(text: str) -> dict[str, list[tuple[float, float, float]]]:
    """x, y and width of the rectangles of each class."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for path in ElementTree.fromstring(text).iter(f"{SVG}path"):
        pieces = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path.get("d", ""))
        found.setdefault(path.get("class", ""), []).extend((float(x), float(y), float(w)) for x, y, w in pieces)
    return found


def test_every_operation_is_drawn_to_scale() -> None:
    schedule = build("zb-h1", ranks=4, microbatches=8)
    timeline = run(schedule, Costs(F=2))
    drawn = boxes(draw(timeline, width=1000))
    assert {name: len(drawn[name]) for name in "FIW"} == {"F": 32, "I": 32, "W": 32}
    scale = (1000 - LEFT - RIGHT) / timeline.makespan
    assert {round(width + 1) for _, _, width in drawn["F"]} == {round(2 * scale)}
    assert {round(width + 1) for _, _, width in drawn["W"]} == {round(scale)}
    assert max(x + width for x, _, width in drawn["W"]) <= 1000 - RIGHT


def test_labels_have_one_form_and_the_name_is_escaped() -> None:
    text = draw(run(build("interleaved", ranks=4, microbatches=8, chunks=2), Costs()))
    labels = re.findall(r'class="on [a-z]*" [^>]*>([^<]+)<', text)
    assert labels and len({bool(re.match(r"\d*[A-Z]", label)) for label in labels}) == 1
    assert "prefers-color-scheme: dark" in text


def test_streams_have_a_strip_of_their_own() -> None:
    schedule = build("breadth-first", ranks=2, microbatches=4, chunks=2, options={"sharded": True})
    drawn = boxes(draw(run(schedule, Costs(UNSHARD=0.5))))
    assert {y for _, y, _ in drawn["UNSHARD"]}.isdisjoint({y for _, y, _ in drawn["F"]})


@pytest.mark.parametrize(("rough", "step"), [(0.9, 1), (1.1, 2), (2.5, 5), (70, 100), (0.003, 0.005)])
def test_ruler_steps_are_round(rough: float, step: float) -> None:
    assert round_step(rough) == step
