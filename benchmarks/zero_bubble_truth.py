"""The simulator and the automatic schedules against the bubble rates that the zero-bubble paper prints.

    python -m benchmarks.zero_bubble_truth --truth DIR

DIR holds zero_bubble_pass_times.csv (profiled times of F, B, W and a message, in ms: Qi et al. 2024, table 6) and
zero_bubble_rates.csv (the bubble rates that the authors computed from them, table 5).  A rate is
1 - m(F+I+W) / span, the largest per-rank time between first and last operation, with B for our I.

* 1F1B, ZB-H1 and ZB-H2 are given orders: ours must give the same rates.
* 1F1B-I has one layer per chunk: the paper chose layer counts two short of a multiple of the ranks, an embedding and a
  head counting as a layer each, so there are (layers + 2) / ranks chunks.  In that order the first micro-batch on
  its way there and the last one on its way back wait for 2(ranks x chunks - 1) latencies, which nothing hides; the
  printed rates hold ``ranks`` latencies fewer, in every row to their last digit (column ``latencies``), so the paper's
  definition leaves one of the rounds through the ranks out.  They are within 0.005 all the same.
* ZB-1p and ZB-2p are what their search finds within 1x and 2x the memory of 1F1B.  Ours must be no worse, in the same
  memory; where several of our families search, the best of them counts.  W keeps less than F did: of the 34sbh + 5abs^2
  bytes of a layer 32sbh (the paper's table 1), so act_w = 32 / (34 + 5as/h).  It matters: with act_w = 1 ZB-2p's rates
  are out of reach with a stage per rank, whose last rank must put off more W than 2x the memory holds.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stretto.schedule.families import build
from stretto.schedule.simulate import Costs, Figures, simulate
from stretto.schedule.validate import validate

RESULTS = Path(__file__).parent / "results"
NEEDS = ("zero_bubble_pass_times.csv", "zero_bubble_rates.csv")
GIVEN = {
    "1F1B": ("1f1b", 0.0005),
    "ZB-H1": ("zb-h1", 0.0005),
    "ZB-H2": ("zb-h2", 0.0005),
    "1F1B-I": ("interleaved", 0.005),
}
"""Family of each order that the paper compares, and how far its rate may be from ours."""
SEARCHED = {"ZB-1p": 1, "ZB-2p": 2}
"""Memory of each searched schedule, as a multiple of 1F1B's peak."""
SEARCHES = ("zb-auto", "auto")
"""Our families that search within a memory limit."""
ROUNDING = 0.00005
"""Half of the last digit that the paper prints."""
Line = dict[str, str]
"""A published rate and the pass times that belong to it, by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published rate against ours."""

    model: str
    ranks: int
    microbatches: int
    schedule: str
    """Its name in the paper."""
    family: str
    """Ours."""
    published: float
    ours: float
    good: bool
    """Whether it is as near, or as low, as it must be."""
    peak: float
    """Largest activation memory of a rank."""
    latencies: float
    """Time by which our span is longer, in message latencies."""
    seconds: float
    """Time that building the schedule took."""


HEAD = "model    p    m  schedule family       published    ours  difference  latencies  peak  seconds"


def main() -> None:
    """Compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, required=True, metavar="DIR", help=f"folder with {' and '.join(NEEDS)}")
    parser.add_argument("--search", nargs="+", default=SEARCHES, metavar="NAME", help="families for ZB-1p and ZB-2p")
    arguments = parser.parse_args()
    truth = arguments.truth
    for name in NEEDS:
        if not (truth / name).is_file():
            parser.error(f"{truth} has no {name}; this benchmark needs {' and '.join(NEEDS)}.")
    rows = []
    print(HEAD)
    for row in compared(truth, arguments.search):
        rows.append(row)
        print(text(row), flush=True)
    met: dict[tuple[object, ...], bool] = {}
    for row in rows:
        rate = row.model, row.ranks, row.microbatches, row.schedule
        met[rate] = met.get(rate, False) or row.good
    print(f"{sum(met.values())} of {len(met)} published rates are met")
    document = {"rows": [asdict(row) for row in rows]}
    (RESULTS / "zero_bubble_truth.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def text(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.model:<6}{row.ranks:>4}{row.microbatches:>5}  {row.schedule:<9}{row.family:<13}{row.published:>9.4f}"
        f"{row.ours:>8.4f}{row.ours - row.published:>+12.5f}{row.latencies:>+11.1f}{row.peak:>6.1f}{row.seconds:>9.2f}"
        f"{'' if row.good else '  missed'}"
    )


def compared(truth: Path, search: Sequence[str]) -> Iterator[Row]:
    """Each published rate for which there are pass times."""
    times = {_setting(line): line for line in _lines(truth / NEEDS[0])}
    for rate in _lines(truth / NEEDS[1]):
        if _setting(rate) in times:
            line = rate | times[_setting(rate)]
            if line["schedule"] in GIVEN:
                yield _given(line)
            elif line["schedule"] in SEARCHED:
                yield from (_searched(line, family) for family in search)


def _given(line: Line) -> Row:
    """A rate of a given order."""
    ranks = int(line["p"])
    family, tolerance = GIVEN[line["schedule"]]
    chunks = (int(line["layers"]) + 2) // ranks if family == "interleaved" else None
    began = time.perf_counter()
    schedule = build(family, ranks=ranks, microbatches=int(line["m"]), chunks=chunks)
    seconds = time.perf_counter() - began
    figures = simulate(schedule, _costs(line))
    good = abs(figures.bubble_rate_span - float(line["bubble_rate"])) <= tolerance
    return _row(line, figures, family=family, good=good, seconds=seconds)


def _searched(line: Line, family: str) -> Row:
    """A rate of a schedule that was searched for."""
    ranks, costs = int(line["p"]), _costs(line)
    limit = float(SEARCHED[line["schedule"]] * ranks)
    began = time.perf_counter()
    schedule = build(family, ranks=ranks, microbatches=int(line["m"]), costs=costs, memory_limit=limit)
    seconds = time.perf_counter() - began
    validate(schedule)
    figures = simulate(schedule, costs)
    low = figures.bubble_rate_span <= float(line["bubble_rate"]) + ROUNDING
    good = low and max(figures.peak_activation) <= limit + 1e-6
    return _row(line, figures, family=family, good=good, seconds=seconds)


def _row(line: Line, figures: Figures, *, family: str, good: bool, seconds: float) -> Row:
    """What is known of one rate."""
    published = float(line["bubble_rate"])
    longer = figures.span - max(figures.busy) / (1 - published)
    return Row(
        model=line["model"],
        ranks=figures.ranks,
        microbatches=figures.microbatches,
        schedule=line["schedule"],
        family=family,
        published=published,
        ours=figures.bubble_rate_span,
        good=good,
        peak=max(figures.peak_activation),
        latencies=longer / float(line["T_comm_ms"]),
        seconds=seconds,
    )


def _lines(path: Path) -> list[Line]:
    """A table of the paper."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _setting(line: Line) -> tuple[str, ...]:
    """Model, ranks and micro-batches, which both tables have."""
    return line["model"], line["p"], line["m"]


def _costs(line: Line) -> Costs:
    """The profiled times, the paper's B being our I, and the part of an activation that W needs."""
    per_hidden = 34 + 5 * int(line["heads"]) * int(line["seq_len"]) / int(line["hidden"])
    return Costs(
        F=float(line["T_F_ms"]),
        I=float(line["T_B_ms"]),
        W=float(line["T_W_ms"]),
        comm=float(line["T_comm_ms"]),
        act_w=32 / per_hidden,
    )


if __name__ == "__main__":
    main()
