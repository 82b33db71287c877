"""The planner's estimates against published training runs, rows that the calibration saw and others apart.

    python -m benchmarks.planner_truth --truth DIR [--worst N] [--json FILE]

DIR holds llama_a100_layouts.csv, megatron_sc21_table1.csv, megascale_175b_530b.csv and bigscience_v100_layouts.csv.
The calibration is fitted on the 13B rows of the first alone; ``planner_rows`` and ``planner_v100`` state what is
assumed of each source, ``planner_fit`` how it is fitted.  "Not fitted" isn't "not seen": what is assumed and which
figures are cited was settled with all of these rows in view, so only rows that were kept back can confirm it.  Each
line says what is asked and whether it is reached.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.planner_fit import cross_validated, fit_margin, fit_time, log_error
from benchmarks.planner_rows import Row, llama_rows, megascale_rows, megatron_rows
from benchmarks.planner_v100 import v100_rows
from stretto.planner.calibration import FITTED, Calibration
from stretto.planner.memory import Margin, fits, memory
from stretto.planner.step import step_time

NEEDS = (
    "llama_a100_layouts.csv", "megatron_sc21_table1.csv", "megascale_175b_530b.csv", "bigscience_v100_layouts.csv",
)  # fmt: skip
ONE_STACK = "flash_attention2 + RMS kernel"
"""The kernel stack of the line "one kernel stack": the only one of which both models have many rows."""
LEAST = 4
"""Rows that a group must have for a rank correlation."""
LINES: list[dict[str, object]] = []
"""What was reported, for the file."""


def main() -> None:
    """Fit, then print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, required=True, help="folder with the published figures")
    parser.add_argument("--worst", type=int, default=5, help="how many of the worst rows to list")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    missing = [name for name in NEEDS if not (options.truth / name).is_file()]
    if missing:
        parser.error(f"{options.truth} lacks {', '.join(missing)}.")
    rows = llama_rows(options.truth)
    seen = [row for row in rows if row.fitted]
    calibration = fit_time([row for row in seen if row.seconds])
    margin = fit_margin(seen)
    fitted = ", ".join(f"{name} {getattr(calibration, name):.3g}" for name in FITTED)
    print(f"fitted on {len(seen)} rows of 13B, {len(FITTED)} + 1 numbers: {fitted}, ", end="")
    print(f"fragmentation {margin.fragmentation:.2f}")
    for name, some in (("fitted (13B)", seen), ("not fitted (30B)", [row for row in rows if not row.fitted])):
        section(name)
        print_times(some, calibration)
        print_memory(some, margin)
        print_choice(some, calibration, margin)
    print_speed(rows, calibration, margin)
    print_worst([row for row in rows if not row.fitted], calibration, margin, options.worst)
    print_validation(seen)
    print_expected([row for row in rows if row.seconds and not row.fitted], calibration)
    print_megatron(megatron_rows(options.truth), calibration)
    print_megascale(megascale_rows(options.truth), calibration)
    print_v100(v100_rows(options.truth), margin)
    if options.json:
        found = {name: getattr(calibration, name) for name in FITTED} | {"fragmentation": margin.fragmentation}
        options.json.write_text(json.dumps({"fitted": found, "figures": LINES}, indent=1) + "\n")


def section(title: str) -> None:
    """What the following lines are of."""
    print(f"\n{title}")
    LINES.append({"section": title})


def report(what: str, figure: str, asked: str = "", reached: bool | None = None) -> None:
    """One line of the table."""
    verdict = "" if reached is None else "reached" if reached else "MISSED"
    print(f"  {what:<46}{figure:<36}{asked:<20}{verdict}")
    LINES.append({"what": what.strip(), "figure": figure, "asked": asked, "reached": reached})


def errors(rows: Sequence[Row], calibration: Calibration) -> list[float]:
    """Absolute relative errors of the measured rows, ascending."""
    return sorted(abs(math.expm1(log_error(row, calibration))) for row in rows if row.seconds)


def percentile_90(values: Sequence[float]) -> float:
    """The smallest of ``values`` (ascending) that nine tenths don't exceed."""
    return values[math.ceil(0.9 * len(values)) - 1]


def print_times(rows: Sequence[Row], calibration: Calibration) -> None:
    """Errors of step time, over all kernel stacks and of each; rank correlation inside groups."""
    found = errors(rows, calibration)
    middle, high = statistics.median(found), percentile_90(found)
    figure = f"{middle:.1%} / {high:.1%}  ({len(found)} rows)"
    report("step time, median / p90 error, all stacks", figure, "<= 6% / <= 14%", middle <= 0.06 and high <= 0.14)
    for kernels in dict.fromkeys(row.kernels for row in rows):
        found = errors([row for row in rows if row.kernels == kernels], calibration)
        if found:
            middle, high = statistics.median(found), percentile_90(found)
            reached = middle <= 0.035 and high <= 0.09 if kernels == ONE_STACK else None
            asked = "<= 3.5% / <= 9%" if kernels == ONE_STACK else ""
            report(f"    {kernels}", f"{middle:.1%} / {high:.1%}  ({len(found)} rows)", asked, reached)
    correlations = []
    for group in by_group(rows).values():
        measured = [row for row in group if row.seconds]
        if len(measured) >= LEAST:
            predicted = [step_time(row.work, calibration).total for row in measured]
            correlations.append(rank_correlation(predicted, [row.seconds or 0.0 for row in measured]))
    middle = statistics.median(correlations)
    figure = f"{middle:.3f}, worst {min(correlations):.3f}  ({len(correlations)} groups)"
    report("rank correlation inside a group, median", figure, ">= 0.95", middle >= 0.95)


def print_memory(rows: Sequence[Row], margin: Margin) -> None:
    """Whether a run fits, said and true."""
    judged = [(fits(row.work, margin), row.seconds is not None) for row in rows]
    right = sum(said == true for said, true in judged) / len(judged)
    out = sum(not true for _, true in judged)
    missed = sum(said and not true for said, true in judged)
    alarms = sum(true and not said for said, true in judged)
    figure = f"{right:.1%}, {alarms} false alarms  ({len(judged)} rows)"
    report("fits or runs out, accuracy", figure, ">= 95%", right >= 0.95)
    report("missed out-of-memory", f"{missed} of {out} = {missed / out:.1%}", "<= 3%", missed / out <= 0.03)


def print_choice(rows: Sequence[Row], calibration: Calibration, margin: Margin) -> None:
    """What taking the fastest plan that is said to fit would have cost."""
    regrets, ran_out, groups = [], 0, 0
    for group in by_group(rows).values():
        measured = [row.seconds for row in group if row.seconds]
        fitting = [row for row in group if fits(row.work, margin)]
        if not measured or not fitting:
            continue
        groups += 1
        pick = min(fitting, key=lambda row: step_time(row.work, calibration).total)
        if pick.seconds:
            regrets.append(pick.seconds / min(measured) - 1)
        else:
            ran_out += 1
    report("fastest plan said to fit runs out", f"{ran_out} of {groups} groups", "0", ran_out == 0)
    middle, worst = statistics.median(regrets), max(regrets)
    figure = f"median {middle:.1%}, worst {worst:.1%}"
    report("regret of the pick", figure, "<= 1%, <= 5%", middle <= 0.01 and worst <= 0.05)


def print_speed(rows: Sequence[Row], calibration: Calibration, margin: Margin) -> None:
    """Time of one estimate, memory and step time together."""
    start = time.perf_counter()
    for row in rows:
        memory(row.work, margin)
        step_time(row.work, calibration)
    milliseconds = (time.perf_counter() - start) / len(rows) * 1e3
    print()
    report("time for one estimate", f"{milliseconds:.3f} ms", "<= 1 ms", milliseconds <= 1)


def print_worst(rows: Sequence[Row], calibration: Calibration, margin: Margin, number: int) -> None:
    """The rows that are furthest off, and every row whose memory is judged wrongly."""
    print("\nworst step times of rows not fitted")
    measured = sorted((row for row in rows if row.seconds), key=lambda row: -abs(log_error(row, calibration)))
    for row in measured[:number]:
        error = math.expm1(log_error(row, calibration))
        print(f"  {error:+.0%}  {row.model} {row.work.plan.num_ranks} GPUs {row.kernels}: {row.layout}")
    print("memory judged wrongly, rows not fitted")
    for row in rows:
        if fits(row.work, margin) != (row.seconds is not None):
            peak = max(rank.total for rank in memory(row.work, margin)) / 2**30
            true = "ran" if row.seconds else "ran out"
            print(f"  {peak:.1f} GiB, {true}: {row.work.plan.num_ranks} GPUs {row.kernels}: {row.layout}")


def print_validation(rows: Sequence[Row]) -> None:
    """Errors inside the fitted rows, each group under a fit that hasn't seen it."""
    section("cross-validation inside the fitted rows, a group (kernels and sequence length) left out at a time")
    found = cross_validated(rows)
    values = sorted(abs(error) for _, error in found)
    report("all groups, median / p90", f"{statistics.median(values):.1%} / {percentile_90(values):.1%}")
    for group in dict.fromkeys(row.group for row, _ in found):
        values = sorted(abs(error) for row, error in found if row.group == group)
        figure = f"{statistics.median(values):.1%} / {percentile_90(values):.1%}  ({len(values)} rows)"
        report(f"    {group[3]}, {group[1]}", figure)


def print_expected(rows: Sequence[Row], calibration: Calibration) -> None:
    """How often a row lies within what its estimate expects; two thirds would be one standard deviation."""
    section("expected error, rows not fitted")
    inside = [abs(log_error(row, calibration)) <= step_time(row.work, calibration).expected_error for row in rows]
    twice = [abs(log_error(row, calibration)) <= 2 * step_time(row.work, calibration).expected_error for row in rows]
    report("within the expected error, within twice", f"{sum(inside) / len(rows):.0%}, {sum(twice) / len(rows):.0%}")


def print_v100(rows: Sequence[Row], margin: Margin) -> None:
    """BigScience's V100s, those whose activations ZeRO-3 divided or kept on the host apart."""
    section("BigScience V100, nothing fitted")
    plain = [row for row in rows if row.work.plan.zero != 3]
    out = [row for row in rows if not row.seconds]
    right = sum(not fits(row.work, margin) for row in out)
    report("out-of-memory rows judged right", f"{right} of {len(out)}", "all", right == len(out))
    good = sum(fits(row.work, margin) == (row.seconds is not None) for row in plain)
    report("accuracy without ZeRO-3", f"{good / len(plain):.1%}  ({len(plain)} rows)")
    divided = [row for row in rows if row.work.plan.zero == 3]
    good = sum(fits(row.work, margin) == (row.seconds is not None) for row in divided)
    report("accuracy with ZeRO-3", f"{good / len(divided):.1%}  ({len(divided)} rows)")


def print_megatron(rows: Sequence[Row], calibration: Calibration) -> None:
    """Table 1 of SC21 with one scalar, the median ratio."""
    scale = math.exp(-statistics.median(log_error(row, calibration) for row in rows))
    found = [(math.exp(log_error(row, calibration)) * scale - 1, row) for row in rows]
    middle = statistics.median(abs(error) for error, _ in found)
    section(f"SC21 table 1, A100 calibration above, one scalar {scale:.3f}")
    report("step time, median error", f"{middle:.1%}", "<= 4%", middle <= 0.04)
    print("  " + ", ".join(f"{row.model} {error:+.1%}" for error, row in found))


def print_megascale(rows: Sequence[Row], calibration: Calibration) -> None:
    """Each system's scalar from its row at 256 GPUs; the others follow."""
    section("MegaScale 175B, one scalar per system from its row at 256 GPUs")
    for system in dict.fromkeys(row.kernels for row in rows):
        own = [row for row in rows if row.kernels == system]
        scale = math.exp(-log_error(own[0], calibration))
        found = [(math.exp(log_error(row, calibration)) * scale - 1, row) for row in own]
        last = found[-1][0]
        report(f"{system} at 12,288 GPUs", f"{last:+.1%}, scalar {scale:.3f}", "within 5%", abs(last) <= 0.05)
        print("  " + ", ".join(f"{row.layout.removeprefix('gpus=')} {error:+.1%}" for error, row in found))


def by_group(rows: Sequence[Row]) -> dict[tuple[str, int, int, str], list[Row]]:
    """Rows by the question that they answer."""
    groups: dict[tuple[str, int, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    return groups


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    return statistics.correlation(_ranks(left), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, equal ones sharing the mean of theirs."""
    below = [sum(other < value for other in values) for value in values]
    within = [sum(other <= value for other in values) for value in values]
    return [(low + high) / 2 for low, high in zip(below, within, strict=True)]


if __name__ == "__main__":
    main()
