"""Every family against public schedule generators, at their memory or less.

    python -m benchmarks.families_truth --truth DIR [--only FAMILY]

DIR holds pipeline_generators.csv: makespan and peak memory of what the public generators give, timed by the rules of
the simulator.  A family that fits itself to costs and memory gets the costs of the row, and its memory limit where it
has one.  Ours is better or worse where its makespan is shorter or longer, or where it needs less or more memory in the
same time.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stretto.schedule.families import FAMILIES, build
from stretto.schedule.simulate import Costs, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

RESULTS = Path(__file__).parent / "results"
NEEDS = "pipeline_generators.csv"
COSTS = {"unit": Costs(), "zbpaper": Costs(F=18.5, I=18.1, W=9.3, comm=0.6), "comm10": Costs(comm=0.1)}
FAMILY_OF = {
    "gpipe(own)": "gpipe",
    "1f1b[basic1f1b]": "1f1b",
    "interleaved-v2[vpp]": "interleaved",
    "interleaved-v4[vpp]": "interleaved",
    "group-interleaved-v2-gs=p/2": "group-interleaved",
    "group-interleaved-v2-gs=p": "group-interleaved",
    "group-interleaved-v2-gs=1": "group-interleaved",
    "group-interleaved-v4-gs=p/2": "group-interleaved",
    "zb-h1(hand)": "zb-h1",
    "zb-h2(hand)": "zb-h2",
    "zb-auto[zb.py heuristic]": "zb-auto",
    "zb-v[zbv default]": "zb-v",
    "zb-v(hand, legacy)": "zb-v",
    "zb-v[zbv max_mem]": "zb-v",
    "v-half[zbv_greedy]": "v-half",
    "v-min[zbv_greedy]": "v-min",
    "v-adaptive[v_auto_schedule]": "zb-v",
    "dualpipev(unfused)": "dualpipe-v",
    "dualpipe(unfused)": "dualpipe",
    "chimera[AutoGeneratePipelineRank]": "chimera",
}
"""Family of ours for each generator; those left out have no counterpart."""
SAME = 1e-6
"""Times and memory closer than this count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table and what ours gives."""

    generator: str
    family: str
    ranks: int
    microbatches: int
    costs: str
    limit: str
    """Memory limit, over that of 1F1B; empty where there is none."""
    makespan: float
    ours: float
    peak: float
    ours_peak: float
    verdict: str
    seconds: float
    """Time that building took."""


def main() -> None:
    """Compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, required=True, metavar="DIR", help=f"folder with {NEEDS}")
    parser.add_argument("--only", choices=sorted(FAMILIES), help="one family alone; nothing is written then")
    given = parser.parse_args()
    if not (given.truth / NEEDS).is_file():
        parser.error(f"{given.truth} has no {NEEDS}.")
    rows = []
    print(f"{'generator':<34}{'costs':<9}{'limit':>5}{'p':>4}{'m':>4}{'theirs':>10}{'ours':>10}{'peak':>6}{'ours':>6}")
    for row in compared(given.truth / NEEDS, given.only):
        rows.append(row)
        print(
            f"{row.generator:<34}{row.costs:<9}{row.limit:>5}{row.ranks:>4}{row.microbatches:>4}{row.makespan:>10.2f}"
            f"{row.ours:>10.2f}{row.peak:>6.2f}{row.ours_peak:>6.2f}  {row.verdict}",
            flush=True,
        )
    print()
    for generator in dict.fromkeys(row.generator for row in rows):
        counts = Counter(row.verdict for row in rows if row.generator == generator)
        print(f"{generator:<34}" + ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())))
    if given.only is None:
        document = {"rows": [asdict(row) for row in rows]}
        (RESULTS / "families_truth.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def compared(path: Path, only: str | None) -> Iterator[Row]:
    """Each row of the table that ours has a family for."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        family = FAMILY_OF.get(line["generator"])
        if family in FAMILIES and only in (None, family) and line["makespan"]:
            yield _row(line, str(family))


def _row(line: dict[str, str], family: str) -> Row:
    """Build ours and compare."""
    costs = COSTS[line["costs"]]
    limit = float(line["mem_limit_units"]) if line["mem_limit"] else None
    options: dict[str, Any] = {}
    if family == "group-interleaved":
        options["group"] = {"p": int(line["p"]), "p/2": int(line["p"]) // 2, "1": 1}[line["generator"].split("gs=")[1]]
    began = time.perf_counter()
    schedule = build(
        family,
        ranks=int(line["p"]),
        microbatches=int(line["m"]),
        chunks=int(line["v"]) if FAMILIES[family].chunked else None,
        options=options,
        costs=costs,
        memory_limit=limit if FAMILIES[family].costed else None,
    )
    seconds = time.perf_counter() - began
    validate(schedule)
    figures = simulate(schedule, costs)
    makespan, peak = float(line["makespan"]), float(line["peak_mem_max_device"])
    ours = figures.makespan, max(figures.peak_activation)
    if limit is not None and FAMILIES[family].costed and ours[1] > limit + SAME:
        raise ScheduleError(f"{family} keeps {ours[1]:g} above its limit of {limit:g}.")
    return Row(
        generator=line["generator"],
        family=family,
        ranks=figures.ranks,
        microbatches=figures.microbatches,
        costs=line["costs"],
        limit=line["mem_limit"],
        makespan=makespan,
        ours=ours[0],
        peak=peak,
        ours_peak=ours[1],
        verdict=_verdict(ours[0] - makespan, ours[1] - peak if limit is None else 0.0),
        seconds=seconds,
    )


def _verdict(longer: float, more: float) -> str:
    """Better, equal or worse; time first."""
    if more > SAME:
        return "more memory" if longer < SAME else "worse"
    decides = longer if abs(longer) > SAME else more
    return "equal" if abs(decides) <= SAME else "worse" if decides > 0 else "better"


if __name__ == "__main__":
    main()
