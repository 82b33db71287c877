"""The schedules that ``stretto simulate`` is asked for: built or read, changed by passes, proven right.

--schedule NAME --pp R --microbatches M        a family
--schedule-file FILE                           a file
--against NAME[:KEY=VALUE,...] or FILE         another of either kind, in the same shape
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stretto.spec.errors import ConfigError, ScheduleError, UnsupportedError, nearest

if TYPE_CHECKING:
    from stretto.schedule.schedule import Schedule
    from stretto.schedule.simulate import Costs, Figures, Timeline
    from stretto.schedule.synthesize.auto import Result

MOST = 10_000_000
"""Stages x micro-batches that a schedule may have here: some 30 million operations."""
TOLERANCE = 1e-6
"""How far above its limit memory may come out, for the sake of rounding."""


class Timed(NamedTuple):
    """A schedule and what came out of timing it."""

    schedule: Schedule
    timeline: Timeline
    figures: Figures
    search: Result | None
    """Where it was searched for: the lower bound of the space, and the gap."""


def asked_for(options: argparse.Namespace, costs: Costs) -> list[Timed]:
    """The schedule of ``--schedule`` or ``--schedule-file``, then those of ``--against``; proven right and timed.

    Raises ConfigError for arguments that don't fit each other and ScheduleError for a schedule that can't be, is
    wrong or keeps more than ``--memory-limit``.
    """
    if options.memory_limit is not None and not options.memory_limit > 0:
        raise ConfigError(
            f"--memory-limit {options.memory_limit:g} leaves no room for a micro-batch; give a limit above 0."
        )
    return [_first(options, costs), *(_other(text, options, costs) for text in options.against)]


def _first(options: argparse.Namespace, costs: Costs) -> Timed:
    """The schedule of ``--schedule`` or ``--schedule-file`` after the passes, held against the memory limit."""
    from stretto.schedule.passes import change

    schedule, search = _asked(options, costs)
    for text in options.passes:
        name, settings = _named(text, "--pass")
        schedule, costs = change(schedule, name, options=settings, costs=costs)
        search = None  # its bound is for what was searched, not for what a pass makes of it
    timed = _timed(schedule, options, costs, search)
    check_limit(timed.figures, options.memory_limit)
    return timed


def _asked(options: argparse.Namespace, costs: Costs) -> tuple[Schedule, Result | None]:
    """The schedule before the passes."""
    from stretto.schedule.families import FAMILIES

    shape = {"--pp": options.pp, "--microbatches": options.microbatches, "--chunks": options.chunks}
    search = {"time_budget": options.time_budget, "seed": options.seed}
    search = {name: value for name, value in search.items() if value is not None}
    if options.schedule_file is not None:
        given = [name for name, value in shape.items() if value is not None] + ["--option"] * bool(options.option)
        given += [f"--{name.replace('_', '-')}" for name in search]
        if given:
            raise ConfigError(f"The schedule file says its own shape; leave out {', '.join(given)}.")
        return _read(options.schedule_file), None
    missing = [name for name in ("--pp", "--microbatches") if shape[name] is None]
    if missing:
        raise ConfigError(f"--schedule {options.schedule} also needs {' and '.join(missing)}.")
    chosen = _pairs(options.option, "--option") | search
    family = FAMILIES.get(options.schedule)
    later = bool(options.passes) and family is not None and not family.costed  # passes may bring memory down
    return _built(options.schedule, chosen, options, costs, limit=None if later else options.memory_limit)


def _read(path: Path) -> Schedule:
    """The schedule of a file; UnsupportedError where a run's steps have none, since each places its own documents."""
    from stretto.schedule.document import load
    from stretto.schedule.measured.document_format import documents_path

    if not path.is_file() and documents_path(path.parent, 0).is_file():
        run = path.parent.parent
        raise UnsupportedError(
            f'There is no {path}: with plan.context_groups = "dynamic" each step has as many micro-batches as its '
            f"documents need, so that no one schedule can be simulated; stretto diagnose {run} says where the time of "
            f"its steps goes, and stretto plan {run / 'run.toml'} what they should take."
        )
    return load(path)


def _other(text: str, options: argparse.Namespace, costs: Costs) -> Timed:
    """A schedule of ``--against``: a file, or a family in the shape of the first.

    It shows what would be otherwise: no pass changes it, and only families that can fit themselves to the limit do.
    """
    from stretto.schedule.families import FAMILIES

    if text.endswith(".json") or os.sep in text:
        return _timed(_read(Path(text)), options, costs, None)
    name, settings = _named(text, "--against")
    if options.pp is None or options.microbatches is None:
        raise ConfigError(f"--against {name} takes its shape from --schedule; against a schedule file, name another.")
    fits_itself = name in FAMILIES and FAMILIES[name].costed
    schedule, search = _built(name, settings, options, costs, limit=options.memory_limit if fits_itself else None)
    return _timed(schedule, options, costs, search)


def _built(
    name: str, chosen: Mapping[str, Any], options: argparse.Namespace, costs: Costs, *, limit: float | None
) -> tuple[Schedule, Result | None]:
    """A family's schedule; ``chunks`` among what is chosen goes before ``--chunks``."""
    from stretto.schedule.families import build

    chosen = dict(chosen)
    chunks = chosen.pop("chunks", options.chunks if _takes(name, options) else None)
    if chunks is not None and type(chunks) is not int:
        raise ConfigError(f"Schedule {name} can't have chunks={chunks}; it is a whole number of at least 1.")
    waves = chosen.get("waves")  # each goes down the ranks and up again
    _check_size(options.pp * (2 * waves if type(waves) is int else chunks or 1), options.microbatches)
    if name == "auto":
        result = _searched(chosen, chunks, options, costs)
        return result.schedule, result
    schedule = build(
        name,
        ranks=options.pp,
        microbatches=options.microbatches,
        chunks=chunks,
        options=chosen,
        costs=costs,
        memory_limit=limit,
    )
    return schedule, None


def _check_size(stages: int, microbatches: int) -> None:
    """Raise ConfigError for more operations than fit in memory."""
    if stages * microbatches > MOST:
        raise ConfigError(
            f"{stages} stages x {microbatches} micro-batches are too many to hold in memory; their product may be "
            f"up to {MOST:,}."
        )


def _searched(chosen: Mapping[str, Any], chunks: int | None, options: argparse.Namespace, costs: Costs) -> Result:
    """What the search finds; all that ``build`` would check of a family's arguments is checked here."""
    from stretto.schedule.families.auto import OPTIONS, find

    for value, what in ((options.pp, "ranks"), (options.microbatches, "micro-batches"), (chunks, "chunks")):
        if value is not None and value < 1:
            raise ScheduleError(f"Schedule auto can't have {value} {what}; it needs at least 1.")
    for option in chosen:
        if option not in OPTIONS:
            close = nearest(option, OPTIONS) or "."
            raise ScheduleError(f"Schedule auto has no option {option!r}{close} Its options: {', '.join(OPTIONS)}.")
    return find(
        ranks=options.pp,
        microbatches=options.microbatches,
        chunks=chunks,
        costs=costs,
        memory_limit=options.memory_limit,
        **chosen,
    )


def _takes(name: str, options: argparse.Namespace) -> bool:
    """Whether ``--chunks`` is meant for a family: for the first always, for one it is compared with where that can."""
    from stretto.schedule.families import FAMILIES

    if name == options.schedule or name not in FAMILIES:
        return True
    family = FAMILIES[name]
    return family.chunked and (family.chunk_counts is None or options.chunks in family.chunk_counts)


def _timed(schedule: Schedule, options: argparse.Namespace, costs: Costs, search: Result | None) -> Timed:
    """The schedule proven right, and timed."""
    from stretto.schedule.simulate import Network, figures_of, lower_bound, run
    from stretto.schedule.validate import validate

    validate(schedule)
    timeline = run(schedule, costs, Network.parse(options.network))
    bound = lower_bound(schedule, costs) if search is None else search.lower_bound
    return Timed(schedule, timeline, figures_of(timeline, bound), search)


def check_limit(figures: Figures, limit: float | None) -> None:
    """Raise ScheduleError where a rank keeps more than ``--memory-limit``."""
    peaks = figures.peak_activation
    peak = max(peaks)
    if limit is not None and peak > limit + TOLERANCE:
        raise ScheduleError(
            f"{figures.name} keeps {peak:.9g} micro-batches on rank {peaks.index(peak)}, above the memory limit of "
            f"{limit:.9g}; allow {peak:.9g}, or take a family that keeps less (--list)."
        )


def _named(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """``NAME[:KEY=VALUE,...]`` in its parts."""
    name, _, settings = text.partition(":")
    return name, _pairs([item for item in settings.split(",") if item], flag)


def _pairs(texts: Iterable[str], flag: str) -> dict[str, Any]:
    """Each ``KEY=VALUE`` once."""
    found: dict[str, Any] = {}
    for name, value in (_pair(text, flag) for text in texts):
        if name in found:
            raise ConfigError(f"{flag} {name} is given twice.")
        found[name] = value
    return found


def _pair(text: str, flag: str) -> tuple[str, Any]:
    """``KEY=VALUE``; numbers, true, false and lists are JSON, and a name is the string that it is."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"{flag} {text}: write KEY=VALUE, for example waves=2.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
