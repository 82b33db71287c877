"""The verbs as Python functions: what ``stretto.train(run)`` and its like call.

They take a RunSpec, or the path of a run file, and raise StrettoError where the command line would
print one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.cli.run_file import fill_in
from stretto.spec.check import check
from stretto.spec.errors import ConfigError, RankError
from stretto.spec.resolve import load_run as read_run
from stretto.spec.run import RunSpec

if TYPE_CHECKING:
    from stretto.planner.plan import Answer
    from stretto.planner.request import Objective
    from stretto.schedule.measured.diagnosis import Diagnosis
    from stretto.schedule.measured.document_diagnosis import DocumentDiagnosis
    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate import Costs, Figures
    from stretto.trainer.verify import VerifyReport

STOPPED = 143
"""Exit code of a run that was asked to stop (128 + SIGTERM), as shells count."""


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunSpec:
    """Read a run file, write ``overrides`` over it, fill in presets, and have the planner fill in ``auto``."""
    return read_run(path, overrides, planner=fill_in)


def plan(
    run: RunSpec | str | Path,
    *,
    pins: Mapping[str, Any] | None = None,
    objective: Objective = "time",
    price: float | None = None,
    top: int = 5,
) -> Answer:
    """The ``top`` best plans of a run's model on its machines, best first, with ``pins`` kept.

    Of a run file, what its [plan] writes is pinned too; the plan of a RunSpec isn't looked at.  ``answer.best`` is an
    estimate, ``answer.run()`` a RunSpec to train, ``answer.reasons`` why each beats the next.  Raises ConfigError where
    nothing fits or the pins can't be.
    """
    from stretto.planner.pins import accept_pins
    from stretto.planner.plan import answer
    from stretto.planner.request import Request
    from stretto.spec import toml
    from stretto.spec.resolve import resolve_open

    written: Mapping[str, Any] = {}
    if not isinstance(run, RunSpec):
        run, written, _ = resolve_open(toml.read(run), str(run))
    request = Request(run=run, pins={**written, **accept_pins(pins or {})}, objective=objective, price=price)
    return answer(request, top=top)


def train(run: RunSpec | str | Path, overrides: Iterable[str] = ()) -> Path:
    """Train ``run`` and return its directory.

    Raises ConfigError before a process starts where the run can't work, RankError where it failed or
    was stopped by a signal (its state is then saved).
    """
    spec, file = _resolve(run, overrides)
    check(spec)
    from stretto.trainer.launch import run_training

    code = run_training(spec, run_file=file)
    if code == STOPPED:
        raise RankError(f"The run in {spec.run.dir} was asked to stop before its last step; train it again to go on.")
    if code:
        raise RankError(f"The run in {spec.run.dir} ended with exit code {code}; what its ranks said is above.")
    return Path(spec.run.dir)


def verify(run: RunSpec | str | Path, overrides: Iterable[str] = ()) -> VerifyReport:
    """Compare ``run``'s plan with one rank; the report says whether they are equal and what differs most."""
    spec, _ = _resolve(run, overrides)
    check(spec, data=False)
    from stretto.trainer.verify import verify as compare

    return compare(spec)


def generate(
    source: str | Path,
    *,
    prompt: str = "",
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Text that continues ``prompt``, piece by piece, by the model of a run's directory, a checkpoint or a
    Hugging Face directory; the sampling is that of ``stretto.inference.Sampling``."""
    from stretto.inference import Sampling, generate_text, load_source

    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    return generate_text(load_source(source), prompt, max_tokens=max_tokens, sampling=sampling)


def convert(source: str | Path, target: str | Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint as a Hugging Face directory, or the other way round, and return where it lies."""
    from stretto.trainer.convert import convert as write

    return write(str(source), str(target), dtype=dtype)


def simulate(
    schedule: Schedule | str | Path,
    *,
    pp: int | None = None,
    microbatches: int | None = None,
    chunks: int | None = None,
    costs: Costs | str | Path | None = None,
    memory_limit: float | None = None,
    **options: Any,
) -> Figures:
    """Check a schedule and time it: a family's by its name and shape, a schedule file's by its path, or a Schedule.

    ``costs`` is what ``--cost`` takes (``"F=1,comm=0.1"``), the path of a costs file, or a Costs; ``options`` are the
    family's.  Raises ScheduleError where it can't be, deadlocks, or keeps more than ``memory_limit`` allows.
    """
    from stretto.cli.schedules import check_limit
    from stretto.schedule.families import build
    from stretto.schedule.simulate import Costs
    from stretto.schedule.simulate import simulate as figures_of
    from stretto.schedule.validate import validate

    if isinstance(costs, str | Path):
        costs = Costs.load(costs) if str(costs).endswith(".json") else Costs.parse(str(costs))
    found = _made(schedule)
    if found is not None and (pp, microbatches, chunks, options) != (None, None, None, {}):
        raise ConfigError(
            "A schedule, or a schedule file, has its own shape; give pp and the rest for a family's name."
        )
    if found is None:
        if pp is None or microbatches is None:
            raise ConfigError(f"Schedule {schedule} also needs pp and microbatches.")
        found = build(
            str(schedule),
            ranks=pp,
            microbatches=microbatches,
            chunks=chunks,
            options=options,
            costs=costs,
            memory_limit=memory_limit,
        )
    validate(found)
    figures = figures_of(found, costs)
    check_limit(figures, memory_limit)
    return figures


def diagnose(run: str | Path, *, step: int | None = None) -> Diagnosis | DocumentDiagnosis:
    """Measured over simulated, of the run in a directory that recorded steps (``run.trace``).

    Of a run whose documents have groups of their own: where the time of each rank goes, and which documents it is.
    ``step`` is looked at instead of the one of median length.  Raises ConfigError where nothing was recorded.
    """
    from stretto.schedule.measured.diagnosis import diagnose as of_run
    from stretto.schedule.measured.document_diagnosis import diagnose_documents, has_documents

    return diagnose_documents(run, step=step) if has_documents(Path(run)) else of_run(run, step=step)


def _made(schedule: Schedule | str | Path) -> Schedule | None:
    """A schedule as it is, or that of a file; None where it is the name of a family."""
    if isinstance(schedule, str | Path):
        from stretto.schedule.document import load

        return load(schedule) if isinstance(schedule, Path) or schedule.endswith(".json") else None
    return schedule


def _resolve(run: RunSpec | str | Path, overrides: Iterable[str]) -> tuple[RunSpec, Path | None]:
    if not isinstance(run, RunSpec):
        return load_run(run, overrides), Path(run)
    if list(overrides):
        raise ConfigError("Overrides are for a run file; change a RunSpec by dataclasses.replace.")
    return run, None
