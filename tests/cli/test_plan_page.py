"""``stretto plan --html``: one file that holds all it shows, and agrees with the figures."""

from __future__ import annotations

import base64
import itertools
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stretto.cli.main import main
from stretto.planner.axis import Axis
from stretto.planner.estimate import estimate
from stretto.planner.front import front, points
from stretto.planner.picture import MOST_DRAWN, picture
from stretto.planner.plan import Answer, answer
from stretto.planner.report_bars import times
from stretto.planner.report_page import page
from stretto.planner.request import Request
from stretto.planner.roofline import roofline
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec

VOID = {"meta", "img", "br", "link", "input"}
DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"


class Reader(HTMLParser):
    """Elements of a page: names and attributes; fails where they aren't nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def found() -> Answer:
    """Llama 3 8B on 16 A100s."""
    training = TrainingSpec(sequence_length=4096, global_batch_size=64, dtype="bfloat16")
    run = RunSpec(model=model_preset("llama-3-8b"), cluster=cluster_preset("a100:16"), training=training)
    return answer(Request(run=run, pins={"cp": 1, "tp": 1}), top=3)


@pytest.fixture(scope="module")
def text(found: Answer) -> str:
    """Its page."""
    return page(found, "stretto plan <&>")


def test_page_stands_alone(text: str) -> None:
    read = Reader(text)
    assert not read.open
    for tag, attributes in read.found:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert "stretto plan &lt;&amp;&gt;" in text and "prefers-color-scheme: dark" in text
    ids = [attributes["id"] for _, attributes in read.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a for t, a in read.found for key in ("aria-controls", "aria-labelledby", "data-cloud") if (a.get(key))]
    assert all((a.get("aria-controls") or a.get("aria-labelledby") or a.get("data-cloud")) in ids for a in named)
    assert len(text) < 600_000


def test_every_figure_is_reached_by_keyboard(text: str, found: Answer) -> None:
    read = Reader(text)
    tipped = [attributes for _, attributes in read.found if "data-tip" in attributes]
    ranks = sum(len(plan.memory) for plan in found.plans)
    assert len(tipped) >= len(found.plans) * 2 + ranks + len(roofline(found.best.work))
    assert all(a["aria-label"] and a["tabindex"] in ("0", "-1") for a in tipped)
    groups = re.findall(r"data-roving>(.*?)(?=data-roving>|</section>)", text, re.S)
    assert len(groups) == 3 + len(found.plans)
    assert all(group.count('tabindex="0" data-tip') == 1 for group in groups)


def test_front_is_what_nothing_beats(found: Answer) -> None:
    every = points(found)
    edge = front(every)
    assert len({point.plan for point in every}) == len(every)
    for point in every:
        assert any(one.peak <= point.peak and one.seconds <= point.seconds * (1 + 1e-8) for one in edge)
    assert all(a.peak < b.peak and a.seconds > b.seconds for a, b in itertools.pairwise(edge))
    limit = found.request.cluster.memory_bytes
    assert min(point.seconds for point in every if point.peak <= limit) == pytest.approx(found.best.seconds)
    assert edge[0].peak < 0.5 * found.best.peak_bytes  # the search alone doesn't look there


def test_front_has_what_a_smaller_device_would_take(found: Answer) -> None:
    half = 0.5 * found.request.cluster.memory_bytes
    smaller = replace(found.request.run, cluster=replace(found.request.run.cluster, memory_bytes=half))
    best = answer(
        replace(found.request, run=smaller, pins={"cp": 1, "tp": 1, "schedule": "1f1b", "micro_batch_size": 2}), top=1
    ).best
    fastest = min(point.seconds for point in points(found) if point.peak <= half)
    assert fastest <= best.seconds * (1.03 if best.plan.stages else 1 + 1e-9)


def test_times_add_up(found: Answer) -> None:
    for plan in found.plans:
        assert sum(times(plan).values()) == pytest.approx(plan.seconds)
        assert min(times(plan).values()) >= 0


def test_parts_stay_under_the_roof(found: Answer) -> None:
    cluster = found.best.work.cluster
    for part in roofline(found.best.work):
        assert part.rate <= min(cluster.peak_flops_bfloat16, part.intensity * cluster.memory_bytes_per_second)
    layer = [part for part in roofline(found.best.work) if part.unit.startswith("layer")]
    work, model = found.best.work, found.best.work.model
    products = sum(part.operations for part in layer if "projections" in part.name or part.name == "feed-forward")
    width = model.head_size * (2 * model.num_heads + 2 * model.kv_heads)
    weights = model.hidden_size * (width + 3 * model.intermediate_size)
    assert products == pytest.approx(6 * work.tokens * weights / work.plan.tp)


@pytest.mark.parametrize(("plan", "words"), [
    (PlanSpec(pp=4, dp_shard=4), "16 micro-batches take"),
    (PlanSpec(pp=2, dp_shard=8, schedule="interleaved", chunks=2, recompute="full"), "8 micro-batches take"),
    (PlanSpec(pp=16, schedule="zb-h1"), "drawn are the first"),
])  # fmt: skip
@pytest.mark.parametrize("machines", ["a100:16", "h100:16"])
def test_schedule_is_the_plans_own(plan: PlanSpec, words: str, machines: str, found: Answer) -> None:
    request = replace(found.request, run=replace(found.request.run, cluster=cluster_preset(machines)))
    made = estimate(request, plan)
    drawn = picture(made)
    assert words in drawn.words
    ET.fromstring(drawn.svg)
    assert drawn.svg.count("M") < 4 * MOST_DRAWN
    span = float(re.search(r"take ([\d.e+]+) s", drawn.words)[1])  # type: ignore[index]
    assert span == pytest.approx(made.time.work + made.time.bubble, rel=0.03)


def test_mixed_machines_have_their_own_limits(tmp_path: Path) -> None:
    path, out = tmp_path / "machines.toml", tmp_path / "plan.html"
    path.write_text('[[groups]]\nname = "h100:8"\nmemory_bytes = 60e9\n[[groups]]\nname = "a100:8"\n')
    asked = ["--model", "llama-3-8b", "--cluster", str(path), "--seq-len", "4096", "--global-batch", "16"]
    assert main(["plan", *asked, "--pin", "pp=2", "cp=1", "tp=1", "--top", "1", "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert not Reader(text).open and "A device has 60.0 GB and 80.0 GB" in text
    assert len(set(re.findall(r'class="limit" style="left:([\d.]+)%', text))) == 2


def test_axis_marks_are_round_and_few() -> None:
    for low, high in ((14.1, 70.0), (1e-3, 2.0), (0.9, 1.1), (100.0, 104.0)):
        marks = Axis(low=low, high=high, logarithmic=True).marks()
        assert 2 <= len(marks) <= 9 and all(low <= mark <= high * (1 + 1e-9) for mark in marks)


def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.html"
    assert main(["plan", str(DEMO), "--html", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 4
    text = out.read_text(encoding="utf-8")
    assert f"stretto plan {DEMO} --html {out} --json" in text and "assumed" in text
    drawing = base64.b64decode(re.search(r"svg\+xml;base64,([^\"]+)", text)[1])  # type: ignore[index]
    assert b"pipeline ranks, time in" in drawing


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--html", "no/such/plan.html"], "--html no/such/plan.html can't be written"),
        (["--html", "a.html", "--out", "a.html"], "both name a.html"),
        (["--html", "a.html", "--why-not", "pp=2"], "leave out --html"),
    ],
)
def test_page_that_cannot_be_written(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEMO), *more]) == 2
    assert message in capsys.readouterr().err
