"""A run's trace, read back and held against its schedule.

trace/rank-*  ──► Trace: pipelines side by side, the steps that all ranks recorded
                    │ played(pipeline, step)
                    ▼
                  Played: start and end of every row of the schedule, seconds from the first operation on
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.schedule.document import load as load_schedule
from stretto.schedule.measured.format import FOLDER, SCHEDULE, RankTrace, path_of, read
from stretto.schedule.measured.identity import check_identity, places_documents
from stretto.schedule.op import Kind, text
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ConfigError, ScheduleError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.simulate.stage_costs import Values

NANOSECOND = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Played:
    """One step of one pipeline as it was measured; N operations of the schedule, R ranks, seconds."""

    step: int
    """Which."""
    schedule: Schedule
    """What was played, with its messages."""
    start: Values
    """(N,), the first operation at 0."""
    end: Values
    """(N,)"""
    num_bytes: npt.NDArray[np.int64]
    """What each message carried (N,)."""
    settling: Values
    """Time of each rank in the reduction of what is left and of the norm, after the schedule (R,)."""
    optimizer: Values
    """Time of each rank's update (R,)."""
    whole: float
    """From the begin of the step on the first rank to its end on the last."""

    @property
    def makespan(self) -> float:
        """From the first operation of the schedule to the last."""
        return float(self.end.max())

    def ranks(self) -> npt.NDArray[np.int64]:
        """The schedule's rank of each row (N,)."""
        import numpy as np

        return np.repeat(np.arange(self.schedule.num_ranks), np.diff(self.schedule.offsets))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """What all ranks of a run recorded."""

    schedule: Schedule
    """What was played, with its messages."""
    ranks: tuple[RankTrace, ...]
    """By rank of the world."""
    pipelines: tuple[tuple[int, ...], ...]
    """``pipelines[p][r]``: the rank of the world that plays the schedule's rank r in pipeline p."""
    steps: tuple[int, ...]
    """Those that every rank recorded, without the first of the run where there are others: it sets things up."""
    num_hosts: int
    """Machines; between them clocks agree only as well as the machines keep time."""

    def played(self, pipeline: int, step: int) -> Played:
        """One step of one pipeline.  Raises ConfigError where it isn't the schedule's."""
        import numpy as np

        members = [self.ranks[rank] for rank in self.pipelines[pipeline]]
        epochs = {member.source.host: member.source.epoch for member in reversed(members)}
        shifts = [epochs[member.source.host] - members[0].source.epoch for member in members]
        steps = [member.steps[step] for member in members]
        scheduled, settling, optimizer = [], [], []
        for position, found in enumerate(steps):
            count = int(np.diff(self.schedule.offsets)[position])
            self._check(members[position].source.rank, position, found.rows[:count])
            scheduled.append(found.rows[:count])
            taken = (found.rows["end"] - found.rows["start"])[count:]
            settling.append(taken[found.rows["kind"][count:] == Kind.REDUCE_GRAD].sum() * NANOSECOND)
            optimizer.append(taken[found.rows["kind"][count:] == Kind.OPT].sum() * NANOSECOND)
        start, end = (
            np.concatenate([rows[name] + shift for rows, shift in zip(scheduled, shifts, strict=True)])
            for name in ("start", "end")
        )
        first = start.min()
        begin = min(found.begin + shift for found, shift in zip(steps, shifts, strict=True))
        over = max(found.end + shift for found, shift in zip(steps, shifts, strict=True))
        return Played(
            step=step,
            schedule=self.schedule,
            start=(start - first) * NANOSECOND,
            end=(end - first) * NANOSECOND,
            num_bytes=np.concatenate([rows["bytes"] for rows in scheduled]),
            settling=np.array(settling),
            optimizer=np.array(optimizer),
            whole=(over - begin) * NANOSECOND,
        )

    def _check(self, rank: int, position: int, rows: npt.NDArray[np.void]) -> None:
        """Raise ConfigError where a rank played something else."""
        expected = [row[:3] for row in self.schedule.rows(position)]
        names = ("kind", "stage", "microbatch")
        found = list(zip(*(rows[name].tolist() for name in names), strict=True))
        if found == expected:
            return
        pairs = zip([*found, *[None] * len(expected)], expected, strict=False)
        at = next(index for index, (mine, due) in enumerate(pairs) if mine != due)
        known = at < len(found) and 0 <= found[at][0] < len(Kind)
        was = text(*found[at]) if known else "nothing that is known" if at < len(found) else "nothing"
        raise ConfigError(
            f"The trace of rank {rank} is not of the schedule beside it: operation {at} is {was} where "
            f"{self.schedule.name} has {text(*expected[at])}; record the run again."
        )


def load(run: Path) -> Trace:
    """The trace of a run's directory.

    Raises ConfigError where there is no run, no trace, no schedule, or a rank's part is missing, and where it is of
    another plan than the run's, or of steps without a schedule of their own.
    """
    folder = run / FOLDER
    ranks, common = recorded(run)
    if places_documents(ranks[0].source.plan):
        raise ConfigError(
            f"The steps of the run in {run} have as many micro-batches as their documents need "
            '(plan.context_groups = "dynamic"), so that no one schedule says what they played; stretto diagnose '
            f"{run} reads them by themselves."
        )
    try:
        schedule = load_schedule(folder / SCHEDULE)
    except ScheduleError as error:
        raise ConfigError(f"The schedule that the run in {run} played is unknown: {error} {_again(run)}") from None
    pipelines = _pipelines(ranks, schedule, folder)
    return Trace(
        schedule=schedule,
        ranks=ranks,
        pipelines=pipelines,
        steps=common,
        num_hosts=len({rank.source.host for rank in ranks}),
    )


def recorded(run: Path) -> tuple[tuple[RankTrace, ...], tuple[int, ...]]:
    """What all ranks of a run recorded, and the steps that all of them did: without the first, where there are others.

    Raises ConfigError where there is no run, no trace, or a rank's part is missing, and where it is of another plan.
    """
    folder = run / FOLDER
    _check_run(run, folder)
    size = read(path_of(folder, 0)).source.world_size
    missing = next((rank for rank in range(size) if not path_of(folder, rank).is_file()), None)
    if missing is not None:
        raise ConfigError(f"The trace in {folder} lacks rank {missing} of {size}; it was moved in part, or the "
                          f"rank wrote to another disk. Put all files together.")  # fmt: skip
    ranks = tuple(read(path_of(folder, rank)) for rank in range(size))
    common = sorted(set.intersection(*(set(rank.steps) for rank in ranks)))
    if not common:
        raise ConfigError(f"The trace in {folder} holds no step of all ranks. {_again(run)}")
    check_identity(run, [rank.source.plan for rank in ranks])
    return ranks, tuple(step for step in common if step > 1) or tuple(common)


def _check_run(run: Path, folder: Path) -> None:
    """Raise ConfigError where nothing can be read."""
    if not run.is_dir():
        raise ConfigError(f"There is no run in {run}; name the directory of a run (its run.dir).")
    if path_of(folder, 0).is_file():
        return
    if not (run / "run.toml").is_file() and not (run / "metrics.jsonl").is_file():
        raise ConfigError(f"{run} is not the directory of a run: it has neither run.toml nor a trace.")
    raise ConfigError(f"The run in {run} has no trace. {_again(run)}")


def _again(run: Path) -> str:
    """How to record."""
    return (
        f"Record one: stretto train {run / 'run.toml'} --set run.trace=last (or steps, run.trace=20-30); where the run "
        "is finished, also give it more steps (training.steps) or another run.dir."
    )


def _pipelines(ranks: tuple[RankTrace, ...], schedule: Schedule, folder: Path) -> tuple[tuple[int, ...], ...]:
    """Ranks of the world by pipeline and position."""
    found: dict[int, dict[int, int]] = {}
    for number, rank in enumerate(ranks):
        found.setdefault(rank.source.pipeline, {})[rank.source.position] = number
    positions = set(range(schedule.num_ranks))
    if any(set(pipeline) != positions for pipeline in found.values()):
        raise ConfigError(
            f"The trace in {folder} is not of one run: {schedule.name} has {schedule.num_ranks} ranks, but the files' "
            "places in the pipelines are others."
        )
    return tuple(tuple(found[pipeline][position] for position in sorted(positions)) for pipeline in sorted(found))
