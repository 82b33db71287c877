"""The schedule file: a schedule as JSON, format ``stretto.schedule/1``.

    {"format": "stretto.schedule/1", "name": "1f1b", "ranks": 2, "stages": 2, "microbatches": 2,
     "placement": [[0, 1]],                  one list per model replica: the rank of each stage
     "voice": [0, 0],                        which replica each micro-batch flows through
     "actions": [["0F0", "0F1", "0B0", "0B1"],
                 ["1F0", "1B0", "1F1", "1B1"]]}       one list per rank, in order

Optional: ``paths`` (the stages that each micro-batch visits, in order), ``frozen`` (stages without
backward), ``forward_only``.  The peers of messages follow from the placement and aren't written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stretto.schedule.op import Op, text
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError, nearest

FORMAT = "stretto.schedule/1"
REQUIRED = ("format", "name", "ranks", "stages", "microbatches", "placement", "voice", "actions")
OPTIONAL = ("paths", "frozen", "forward_only")


def to_json(schedule: Schedule) -> str:
    """The schedule as the text of a schedule file."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": schedule.name,
        "ranks": schedule.num_ranks,
        "stages": schedule.num_stages,
        "microbatches": schedule.num_microbatches,
        "placement": schedule.placement,
        "voice": schedule.voice,
        "actions": [[text(*row[:3]) for row in schedule.rows(rank)] for rank in range(schedule.num_ranks)],
    }
    if schedule.paths is not None:
        document["paths"] = schedule.paths
    if schedule.frozen:
        document["frozen"] = sorted(schedule.frozen)
    if schedule.forward_only:
        document["forward_only"] = True
    return json.dumps(document)


def from_json(content: str) -> Schedule:
    """Read the text of a schedule file.  Raises ScheduleError where it is malformed; does not validate the order."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"The schedule file is not JSON: {error}.") from None
    if not isinstance(document, dict):
        raise ScheduleError("The schedule file holds no JSON object.")
    _check_keys(document)
    ranks = _integer(document, "ranks")
    actions = _lists(document, "actions", str)
    if len(actions) != ranks:
        raise ScheduleError(f"The schedule file has ranks={ranks}, but actions of {len(actions)} ranks.")
    paths = document.get("paths")
    return Schedule.from_orders(
        [_order(rank, tokens) for rank, tokens in enumerate(actions)],
        name=document["name"],
        num_stages=_integer(document, "stages"),
        num_microbatches=_integer(document, "microbatches"),
        placement=_lists(document, "placement", int),
        voice=_list(document["voice"], "voice", int),
        paths=None if paths is None else _lists(document, "paths", int),
        frozen=_list(document.get("frozen", []), "frozen", int),
        forward_only=document.get("forward_only", False),
    )


def save(schedule: Schedule, path: Path | str) -> None:
    """Write a schedule file."""
    Path(path).write_text(to_json(schedule) + "\n", encoding="utf-8")


def load(path: Path | str) -> Schedule:
    """Read a schedule file.  Raises ScheduleError where it can't be read or is malformed."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"The schedule file {path} can't be read: {error}.") from None
    try:
        return from_json(content)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None


def _check_keys(document: dict[str, Any]) -> None:
    """Raise ScheduleError for a wrong format, missing and unknown keys, and wrong plain values."""
    if document.get("format") != FORMAT:
        raise ScheduleError(
            f"The schedule file has the format {document.get('format')!r}; this version reads {FORMAT!r}."
        )
    for key in REQUIRED:
        if key not in document:
            raise ScheduleError(f"The schedule file has no {key!r}; it needs {', '.join(REQUIRED)}.")
    known = REQUIRED + OPTIONAL
    for key in document:
        if key not in known:
            raise ScheduleError(f"The schedule file has the unknown key {key!r}{nearest(key, known) or '.'}")
    if not isinstance(document["name"], str):
        raise ScheduleError(f"The schedule file has the name {document['name']!r}; a name is a string.")
    if not isinstance(document.get("forward_only", False), bool):
        raise ScheduleError(f"The schedule file has forward_only={document['forward_only']!r}; it is true or false.")


def _integer(document: dict[str, Any], key: str) -> int:
    """An integer of at least 1."""
    value = document[key]
    if type(value) is not int or value < 1:
        raise ScheduleError(f"The schedule file has {key}={value!r}; it is an integer of at least 1.")
    return value


def _list(value: Any, where: str, kind: type) -> list[Any]:
    """A list whose items are all of one type; JSON's true is not taken for 1."""
    what = "strings" if kind is str else "integers"
    if not isinstance(value, list):
        raise ScheduleError(f"The schedule file has {where}={value!r}; it is a list of {what}.")
    for position, item in enumerate(value):
        if type(item) is not kind:
            raise ScheduleError(f"The schedule file has {where}[{position}]={item!r}; it is a list of {what}.")
    return value


def _lists(document: dict[str, Any], key: str, kind: type) -> list[list[Any]]:
    """A list of lists."""
    value = document[key]
    if not isinstance(value, list):
        raise ScheduleError(f"The schedule file has {key}={value!r}; it is a list of lists.")
    return [_list(item, f"{key}[{index}]", kind) for index, item in enumerate(value)]


def _order(rank: int, tokens: list[str]) -> list[Op]:
    """One rank's operations; an error says where the token stands."""
    order = []
    for position, token in enumerate(tokens):
        try:
            order.append(Op.parse(token))
        except ScheduleError as error:
            raise ScheduleError(f"Rank {rank}, operation {position}: {error}") from None
    return order
