"""The page: self-contained, and its columns say what the timeline says."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from stretto.schedule import Schedule
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.render.html import page
from stretto.schedule.render.scene import scene
from stretto.schedule.simulate import Costs, Timeline, figures_of, run


class Reader(HTMLParser):
    """The elements of a page by id, the text of its scripts and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.texts: dict[str, str] = {}
        self.refers: list[str] = []
        self.cells: list[str] = []
        self.open: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.open = (tag, values)
        self.ids += [values["id"]] if values.get("id") else []
        self.refers += [f"{tag} {name}" for name in values if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        tag, values = self.open
        if tag in ("script", "style", "title"):
            key = values.get("id") or values.get("type") or tag
            self.texts[key] = self.texts.get(key, "") + data
        if tag in ("td", "th", "small"):
            self.cells.append(data.strip())

    def handle_endtag(self, tag: str) -> None:
        self.open = ("", {})


def drawn(
    *schedules: Schedule, costs: Costs | None = None, limit: float | None = None
) -> tuple[Reader, list[Timeline]]:
    timelines = [run(schedule, costs or Costs()) for schedule in schedules]
    figures = [figures_of(timeline, 1.0) for timeline in timelines]
    return Reader(page(timelines, figures=figures, memory_limit=limit)), timelines


def columns(reader: Reader) -> list[dict[str, Any]]:
    """Decode the page's columns as its script does."""
    data = np.frombuffer(zlib.decompress(base64.b64decode(reader.texts["columns"])), dtype=np.uint8)
    at, found = 0, []
    for about in json.loads(reader.texts["header"])["schedules"]:
        values = dict(about)
        for name, length in about["columns"]:
            planes = data[at : at + 4 * length].reshape(4, length).T
            steps = np.ascontiguousarray(planes).view("<i4").ravel()
            values[name] = np.cumsum(steps.astype(np.int64))
            at += 4 * length
        found.append(values)
    assert at == len(data)
    return found


@pytest.mark.parametrize(("comm", "F"), [(0.0, 1.0), (0.3, 18.522), (1e-5, 0.00123), (0.0, 1e6)])
def test_columns_are_the_timeline(comm: float, F: float) -> None:
    schedule = split_backward(build("interleaved", ranks=4, microbatches=8, chunks=2))
    reader, (timeline,) = drawn(schedule, costs=Costs(F=F, comm=comm))
    (decoded,) = columns(reader)
    shown = scene(timeline)
    for name in ("kind", "stage", "microbatch"):
        assert np.array_equal(decoded[name], getattr(schedule, name))
    for name in ("cause", "source", "critical"):
        assert np.array_equal(decoded[name], getattr(shown, name))
    for name, times in (("start", shown.start), ("end", shown.end), ("memoryAt", shown.memory_at)):
        assert decoded[name] / 10.0 ** decoded["digits"] == pytest.approx(times, rel=1e-7, abs=1e-8 * shown.makespan)
        assert decoded[name].max() < 2**31
    header = json.loads(reader.texts["header"])
    assert decoded["memory"] / header["memory_scale"] == pytest.approx(shown.memory, abs=1e-6)


def test_nothing_is_fetched() -> None:
    reader, _ = drawn(build("1f1b", ranks=2, microbatches=2))
    assert not reader.refers
    script = reader.texts["module"]
    assert not re.search(r"\bfetch\(|XMLHttp|\bimport\b|https?:", script)
    assert "url(" not in reader.texts["style"] and "@import" not in reader.texts["style"]


def test_scripts_and_page_name_the_same_elements() -> None:
    reader, _ = drawn(build("1f1b", ranks=2, microbatches=2))
    script = reader.texts["module"]
    wanted = set(re.findall(r'(?:element|getElementById)\("(\w+)"\)', script))
    assert wanted and wanted <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert "{{" not in "".join(reader.texts.values())
    styles = set(re.findall(r"--(\w+):", reader.texts["style"]))
    assert {kind.name for kind in Kind} <= styles


def test_names_from_files_are_escaped() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    named = Schedule.from_orders(
        [schedule.ops(rank) for rank in range(2)],
        name="</script><b>{{columns}}",
        num_stages=2,
        num_microbatches=2,
        placement=schedule.placement,
    )
    reader, _ = drawn(named)
    assert json.loads(reader.texts["header"])["schedules"][0]["name"] == named.name
    assert reader.texts["title"].startswith(named.name)
    assert len(columns(reader)) == 1


def test_comparison_says_the_difference() -> None:
    reader, _ = drawn(build("gpipe", ranks=4, microbatches=8), build("zb-h1", ranks=4, microbatches=8))
    assert [about["name"] for about in columns(reader)] == ["gpipe", "zb-h1"]
    at = reader.cells.index("makespan")
    assert reader.cells[at + 1 : at + 3] == ["33", "-18.2%"]


def test_memory_limit_is_in_the_picture() -> None:
    reader, _ = drawn(build("1f1b", ranks=2, microbatches=2), limit=5.0)
    header = json.loads(reader.texts["header"])
    assert header["memory_limit"] == 5.0 and header["memory_top"] > 5.0


def test_a_large_page_is_small() -> None:
    """49,152 operations; at 64 ranks and 512 micro-batches (98,304) it is 85 kB."""
    schedule = build("zb-h1", ranks=32, microbatches=512)
    timeline = run(schedule, Costs())
    text = page([timeline], figures=[figures_of(timeline, 1.0)])
    assert len(text) < 150_000
