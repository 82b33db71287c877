"""The synthesizer over the whole grid: what ``auto`` finds, how far that can be from the best, and what others reach.

    python -m benchmarks.synthesize_grid [--truth DIR] [--time-budget 10] [--workers 2] [--only TEXT ...] [--redo]

Cells: p in {4, 8, 16, 32}, m in {p, 2p, 4p}, memory limits from 1/3 to 2 x 1F1B's peak, six sets of costs, and the
zero-bubble paper's profiled settings at their own p and m.  Every cell that isn't proven optimal is held to the best
of this project's families in the same memory (one replica of the weights, all stages visited), and with ``--truth``
all are to the best public generator in pipeline_generators.csv of DIR (bidirectional ones aside; exact searches apart).

Each finished cell is a line of results/synthesize_grid.jsonl; a run goes on where the last one stopped (``--redo``:
starts anew).  The table is written to docs/synthesize.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

from stretto.schedule.families import FAMILIES, build
from stretto.schedule.simulate import Costs, simulate
from stretto.schedule.synthesize.seeds import COSTED, FEW_OPERATIONS
from stretto.schedule.synthesize.space import Layout, layouts
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "synthesize_grid.jsonl"
PAGE = HERE.parent / "docs" / "synthesize.md"
RANKS = (4, 8, 16, 32)
LIMITS = tuple(map(Fraction, ("1/3", "1/2", "2/3", "1", "3/2", "2")))
LAYERS_PER_RANK = 4
"""Layers of a rank's whole share, where one set of costs counts in layers."""
UNIFORM = {
    "unit": Costs(),
    "zbpaper": Costs(F=18.5, I=18.1, W=9.3, comm=0.6),
    "comm10": Costs(comm=0.1),
    "long-context": Costs(F=20, I=36, W=6, comm=0.5),
}
UNEVEN = ("slow-rank", "vocabulary")
PROFILED = {
    (8, 24): (18.522, 18.086, 9.337, 0.601), (8, 32): (18.513, 18.086, 9.331, 0.626),
    (8, 64): (18.546, 18.097, 9.321, 0.762), (16, 48): (11.347, 11.248, 8.132, 0.377),
    (16, 64): (11.307, 11.254, 8.101, 0.379), (16, 128): (11.325, 11.308, 8.109, 0.378),
    (32, 96): (10.419, 10.207, 7.715, 0.408), (32, 128): (10.408, 10.204, 7.703, 0.408),
    (32, 256): (10.402, 10.248, 7.698, 0.46),
}  # fmt: skip
"""F, I, W and a message in ms of the 1.5B, 14.6B and 28.3B models (Qi et al. 2024, table 6)."""
COLUMNS = (
    "costs", "p", "m", "limit", "space", "auto", "placement", "bound", "gap", "proven", "families", "public",
    "exact", "seconds",
)  # fmt: skip
"""Of the table."""
APART = ("auto", "chimera", "bitpipe", "dualpipe", "skip-pipe", "forward-only")
"""Families with two replicas, or that don't do the whole work."""
PLACED = {"linear": "loop ", "loop": "loop ", "V": "zigzag ", "zigzag": "zigzag "}
"""Our names of the file's placements; the number of chunks follows."""
EXACT_COSTS = ("unit", "zbpaper", "comm10")
"""Costs of which figures of others are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One problem of the grid."""

    costs: str
    ranks: int
    microbatches: int
    limit: str
    """Memory limit, as a multiple of 1F1B's peak (``ranks`` units)."""
    space: str = "all"
    """Name of the one layout that is allowed, or all."""

    @property
    def memory_limit(self) -> float:
        """In micro-batches over a rank's whole share."""
        return float(Fraction(self.limit) * self.ranks)

    @property
    def key(self) -> str:
        """What names it."""
        return f"{self.costs} p={self.ranks} m={self.microbatches} limit={self.limit} space={self.space}"

    @property
    def layouts(self) -> list[Layout]:
        """What the search may choose from."""
        return [layout for layout in layouts(self.ranks) if self.space in ("all", layout.name)]


def cells() -> Iterator[Cell]:
    """All cells, the large ones last."""
    for layout in layouts(4):
        for costs in EXACT_COSTS:
            for limit in LIMITS:
                yield Cell(costs=costs, ranks=4, microbatches=8, limit=str(limit), space=layout.name)
    for ranks in RANKS:
        for microbatches in (ranks, 2 * ranks, 4 * ranks):
            for costs in (*UNIFORM, *UNEVEN):
                for limit in LIMITS:
                    yield Cell(costs=costs, ranks=ranks, microbatches=microbatches, limit=str(limit))
        for microbatches in (count for at, count in PROFILED if at == ranks):
            for limit in LIMITS:
                yield Cell(costs="profiled", ranks=ranks, microbatches=microbatches, limit=str(limit))


def price(cell: Cell, layout: Layout) -> Costs:
    """Costs of a cell on one layout."""
    if cell.costs in UNIFORM:
        return UNIFORM[cell.costs]
    if cell.costs == "profiled":
        forward, inputs, weights, comm = PROFILED[cell.ranks, cell.microbatches]
        return Costs(F=forward, I=inputs, W=weights, comm=comm)
    share = layout.num_ranks / layout.num_stages
    times = [share] * layout.num_stages
    if cell.costs == "slow-rank":
        times = [share * (1.5 if rank == cell.ranks // 2 else 1.0) for rank in layout.placement[0]]
    else:
        times[-1] += 2.5 / LAYERS_PER_RANK
    return replace(Costs(), F=times, I=times, W=times)


def best_family(cell: Cell) -> tuple[float, str]:
    """Least makespan of this project's families in the cell's memory, and its family."""
    found = [(float("inf"), "none")]
    for name, family in FAMILIES.items():
        if name in APART or (name in COSTED and 6 * cell.ranks * cell.microbatches > FEW_OPERATIONS):
            continue  # the latter join the search itself, and would take longer than it
        counts = (1, 2, 3, 4) if family.chunked and family.chunk_counts is None else (None,)
        for chunks in counts:
            for options in _options(name, cell.ranks):
                try:
                    found.append((_makespan(cell, name, chunks, options), f"{name} {chunks or ''}".strip()))
                except ScheduleError:  # not this shape, or not in this memory
                    continue
    return min(found)


def _options(name: str, ranks: int) -> list[dict[str, object]]:
    return [{"waves": waves} for waves in (1, 2)] if name == "hanayo" else [{}]


def _makespan(cell: Cell, name: str, chunks: int | None, options: dict[str, object]) -> float:
    """Of a family's schedule in the cell; its costs are those of the layout that it turns out to have."""
    shape = {"ranks": cell.ranks, "microbatches": cell.microbatches, "chunks": chunks, "options": options}
    costs = price(cell, layouts(cell.ranks, chunks=(1,))[0])
    if cell.costs in UNEVEN:
        plain = build(name, **shape)
        costs = price(cell, Layout(name=name, num_ranks=cell.ranks, placement=plain.placement[:1]))
    schedule = build(name, **shape, costs=costs, memory_limit=cell.memory_limit)
    if cell.space != "all" and schedule.placement != cell.layouts[0].placement:
        raise ScheduleError("another placement")
    figures = simulate(schedule, costs)
    if max(figures.peak_activation) > cell.memory_limit + 1e-6:
        raise ScheduleError("more than the limit")
    return figures.makespan


def measure(job: tuple[Cell, float]) -> dict[str, object]:
    """Run one cell."""
    from stretto.schedule.synthesize.auto import synthesize

    cell, time_budget = job
    started = time.perf_counter()
    result = synthesize(
        microbatches=cell.microbatches,
        space=cell.layouts,
        costs=lambda layout: price(cell, layout),
        memory_limit=cell.memory_limit,
        time_budget=time_budget,
    )
    seconds = time.perf_counter() - started
    costs = price(cell, Layout(name="", num_ranks=cell.ranks, placement=result.schedule.placement[:1]))
    figures = simulate(result.schedule, costs)
    validate(result.schedule)
    assert abs(figures.makespan - result.makespan) <= 1e-6 * result.makespan, "the search and the simulator disagree"
    assert max(figures.peak_activation) <= cell.memory_limit + 1e-6, "above the memory limit"
    # what is proven optimal needs no comparison, and families that search take longer than it did
    family, family_name = (float("inf"), "not needed") if result.proven else best_family(cell)
    return asdict(cell) | {
        "makespan": result.makespan,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "proven": result.proven,
        "layout": result.layout,
        "bubble_rate": figures.bubble_rate,
        "family": None if family == float("inf") else family,
        "family_name": family_name,
        "seconds": round(seconds, 2),
    }


def public(truth: Path) -> dict[str, tuple[float, str, float | None]]:
    """Per cell key: best public generator, its name, and the best exact search."""
    found: dict[str, tuple[float, str, float | None]] = {}
    with (truth / "pipeline_generators.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["makespan"] and row["peak_mem_max_device"]]
    exact_rows = []
    with (truth / "pipeline_generators.csv").open() as file:
        exact_rows = [
            row for row in csv.DictReader(file) if "makespan objective" in row["generator"] and row["makespan"]
        ]
    for cell in cells():
        if cell.costs not in EXACT_COSTS:
            continue

        def matches(row: dict[str, str], cell: Cell = cell) -> bool:
            same = (row["p"], row["m"], row["costs"]) == (str(cell.ranks), str(cell.microbatches), cell.costs)
            return same and (cell.space == "all" or cell.space == PLACED.get(row["placement"], "") + row["v"])

        here = [
            (float(row["makespan"]), row["generator"])
            for row in rows
            if matches(row)
            and "CP-SAT" not in row["generator"]
            and row["placement"] != "bidir"
            and float(row["peak_mem_max_device"]) <= cell.memory_limit + 1e-6
        ]
        exact = [
            float(row["makespan"])
            for row in exact_rows
            if matches(row) and Fraction(row["mem_limit"]) <= Fraction(cell.limit)
        ]
        if here or exact:
            best = min(here) if here else (float("inf"), "none")
            found[cell.key] = (*best, min(exact) if exact else None)
    return found


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, help="folder with pipeline_generators.csv")
    parser.add_argument("--time-budget", type=float, default=10.0, help="seconds a cell (10)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time (1)")
    parser.add_argument("--only", nargs="*", default=[], help="cells whose key holds one of these texts")
    parser.add_argument("--redo", action="store_true", help="measure anew what has been measured")
    options = parser.parse_args()
    done = (
        {} if not RESULTS.exists() else {_key(line): line for line in map(json.loads, RESULTS.read_text().splitlines())}
    )
    asked = [cell for cell in cells() if not options.only or any(text in cell.key for text in options.only)]
    jobs = [(cell, options.time_budget) for cell in asked if options.redo or cell.key not in done]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for record in pool.imap_unordered(measure, jobs):
            done[_key(record)] = record
            RESULTS.write_text("".join(json.dumps(done[cell.key]) + "\n" for cell in cells() if cell.key in done))
            print(_key(record), f"{record['makespan']:.4f} gap {record['gap']:.2%} {record['seconds']} s", flush=True)
    others = public(options.truth) if options.truth else {}
    PAGE.write_text(page(done, others))
    print(PAGE)


def _key(record: dict[str, object]) -> str:
    return Cell(**{name: record[name] for name in ("costs", "ranks", "microbatches", "limit", "space")}).key  # type: ignore[arg-type]


def page(done: dict[str, dict], others: dict[str, tuple[float, str, float | None]]) -> str:
    """The table with its summary."""
    records = [done[cell.key] for cell in cells() if cell.key in done]
    lines = [
        "# The synthesizer on its grid",
        "",
        "Written by `python -m benchmarks.synthesize_grid --truth DIR`. Makespans over the work of a rank, m(F+I+W):",
        "1 is a pipeline without bubbles. *bound*: no schedule of the space (loops and zigzags of 1 to 4 chunks, or",
        "the one placement named) in this memory is shorter. *families*: the best of this project's families in the",
        "same memory and space; empty where `auto` is proven optimal and nothing was compared, `none` where no",
        "family fits. *public*: the best published generator, where its figure is known; *exact*: the best makespan",
        "known from exact searches (over one placement; the best of them where the space is larger).",
        "`slow-rank`: every chunk of rank p/2 takes 1.5 times as long. `vocabulary`: the last stage does 2.5 layers",
        f"more, of {LAYERS_PER_RANK} layers per rank. `profiled`: the zero-bubble paper's times at their own p and m.",
        f"Above {FEW_OPERATIONS} operations the families that search themselves ({', '.join(COSTED)}) are only part of",
        "the search, and not run a second time for the comparison.",
        "",
        *summary(records, others),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for record in records:
        work = record["microbatches"] * _work(record)
        best, _, exact = others.get(_key(record), (None, None, None))
        figures = [record["makespan"] / work, record["lower_bound"] / work]
        rest = [None if value in (None, float("inf")) else value / work for value in (record["family"], best, exact)]
        shown = [
            record["costs"],
            record["ranks"],
            record["microbatches"],
            record["limit"],
            record["space"],
            f"{figures[0]:.4f}",
        ]
        shown += [record["layout"], f"{figures[1]:.4f}", f"{record['gap']:.1%}", "yes" if record["proven"] else ""]
        shown += ["" if value is None else f"{value:.4f}" for value in rest]
        if record["family_name"] == "none":
            shown[-3] = "none"
        lines.append("| " + " | ".join(map(str, [*shown, f"{record['seconds']:.1f}"])) + " |")
    return "\n".join(lines) + "\n"


def _work(record: dict) -> float:
    """Time that the busiest rank computes for one micro-batch on one chunk per rank."""
    cell = Cell(**{name: record[name] for name in ("costs", "ranks", "microbatches", "limit", "space")})
    layout = layouts(cell.ranks, chunks=(1,))[0]
    costs = price(cell, layout).of(layout)
    return float((costs.F + costs.I + costs.W).max())


def summary(records: list[dict], others: dict[str, tuple[float, str, float | None]]) -> list[str]:
    """How it stands in all."""
    lines = []
    whole = [r for r in records if r["space"] == "all"]
    for name, chosen in (
        ("limits of 1x and above", [r for r in whole if Fraction(r["limit"]) >= 1]),
        ("limits below 1x", [r for r in whole if Fraction(r["limit"]) < 1]),
    ):
        if chosen:
            gaps = [r["gap"] for r in chosen]
            lines.append(
                f"- {name}: {len(chosen)} cells, median gap {statistics.median(gaps):.2%}, largest {max(gaps):.1%}, "
                f"{sum(r['proven'] for r in chosen)} proven optimal"
            )
    lines.append(_against_families(records))
    rows = [(r, others[_key(r)]) for r in records if _key(r) in others]
    for index, name in ((0, "public generators"), (2, "exact searches")):
        held = [(r, other[index]) for r, other in rows if other[index] not in (None, float("inf"))]
        if held:
            worse_keys = [_key(r) for r, other in held if r["makespan"] > other * (1 + 1e-6)]
            better_count = sum(r["makespan"] < other * (1 - 1e-6) for r, other in held)
            tail = f": {'; '.join(worse_keys)}" if worse_keys else ""
            lines.append(
                f"- against {name}: better in {better_count}, worse in {len(worse_keys)} of {len(held)} cells{tail}"
            )
    return lines


def _against_families(records: list[dict]) -> str:
    """Cells proven optimal are never compared with a family, so they count on no side."""
    compared = [r for r in records if r["family_name"] != "not needed"]
    fitting = [r for r in compared if r["family"] is not None]
    alone = len(compared) - len(fitting)
    better = alone + sum(r["makespan"] < r["family"] * (1 - 1e-9) for r in fitting)
    worse = sum(r["makespan"] > r["family"] * (1 + 1e-9) for r in fitting)
    return (
        f"- against the families: {len(compared)} cells compared, better in {better} (in {alone} of them no family "
        f"fits), equal in {len(compared) - better - worse}, worse in {worse}; the other "
        f"{len(records) - len(compared)} are proven optimal and were not compared"
    )


if __name__ == "__main__":
    main()
