"""The schedule file: a schedule as JSON, format ``stretto.schedule/1``.

    {"format": "stretto.schedule/1", "name": "1f1b", "ranks": 2, "stages": 2, "microbatches": 2,
     "placement": [[0, 1]],                  one list per model replica: the rank of each stage
     "voice": [0, 0],                        which replica each micro-batch flows through
     "actions": [["0F0", "0F1", "0B0", "0B1"],
                 ["1F0", "1B0", "1F1", "1B1"]]}       one list per rank, in order

Optional: ``paths`` (the stages that each micro-batch visits, in order), ``frozen`` (stages without
backward), ``forward_only``.  The peers of messages follow from the placement and aren't written.

A pair that overlaps is one token where the messages are written too, ``2F7+5B3``; elsewhere it is written
flat, forward first, and read back as two operations one after the other.
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from stretto.schedule.op import numbers, shortened, text
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError, nearest

FORMAT = "stretto.schedule/1"
REQUIRED = ("format", "name", "ranks", "stages", "microbatches", "placement", "voice", "actions")
LARGEST = 999_999_999
"""Largest number in a file; what an operation can be written with."""
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
        "actions": [_tokens(schedule, rank) for rank in range(schedule.num_ranks)],
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
    import numpy as np

    try:
        document = json.loads(content, object_pairs_hook=once)
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
    orders = [_rows(rank, tokens) for rank, tokens in enumerate(actions)]
    kind, stage, microbatch, joined = np.array([row for order in orders for row in order]).reshape(-1, 4).T
    return Schedule.from_columns(
        kind=kind,
        stage=stage,
        microbatch=microbatch,
        joined=joined,
        offsets=list(accumulate(map(len, orders), initial=0)),
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
            f"The schedule file has the format {shortened(document.get('format'))}; this version reads {FORMAT!r}."
        )
    for key in REQUIRED:
        if key not in document:
            raise ScheduleError(f"The schedule file has no {key!r}; it needs {', '.join(REQUIRED)}.")
    known = REQUIRED + OPTIONAL
    for key in document:
        if key not in known:
            raise ScheduleError(f"The schedule file has the unknown key {shortened(key)}{nearest(key, known) or '.'}")
    if not isinstance(document["name"], str):
        raise ScheduleError(f"The schedule file has the name {shortened(document['name'])}; a name is a string.")
    if not isinstance(document.get("forward_only", False), bool):
        raise ScheduleError(
            f"The schedule file has forward_only={shortened(document['forward_only'])}; it is true or false."
        )


def _integer(document: dict[str, Any], key: str) -> int:
    """An integer of at least 1."""
    value = document[key]
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ScheduleError(f"The schedule file has {key}={shortened(value)}; it is an integer from 1 to {LARGEST}.")
    return value


def _list(value: Any, where: str, kind: type) -> list[Any]:
    """A list whose items are all of one type; JSON's true is not taken for 1."""
    what = "strings" if kind is str else "integers"
    if not isinstance(value, list):
        raise ScheduleError(f"The schedule file has {where}={shortened(value)}; it is a list of {what}.")
    for position, item in enumerate(value):
        if type(item) is not kind:
            raise ScheduleError(f"The schedule file has {where}[{position}]={shortened(item)}; it is a list of {what}.")
        if isinstance(item, int) and abs(item) > LARGEST:
            raise ScheduleError(f"The schedule file has {where}[{position}]={shortened(item)}; the most is {LARGEST}.")
    return value


def _lists(document: dict[str, Any], key: str, kind: type) -> list[list[Any]]:
    """A list of lists."""
    value = document[key]
    if not isinstance(value, list):
        raise ScheduleError(f"The schedule file has {key}={shortened(value)}; it is a list of lists.")
    return [_list(item, f"{key}[{index}]", kind) for index, item in enumerate(value)]


def _tokens(schedule: Schedule, rank: int) -> list[str]:
    """One rank's operations as text; pairs as one token in a lowered schedule."""
    tokens = [text(*row[:3]) for row in schedule.rows(rank)]
    if schedule.joined is None or not schedule.lowered:
        return tokens
    joined = schedule.joined[schedule.offsets[rank] : schedule.offsets[rank + 1]].tolist()
    after = [0, *joined[:-1]]
    return [f"{token}+{tokens[at + 1]}" if joined[at] else token for at, token in enumerate(tokens) if not after[at]]


def _rows(rank: int, tokens: list[str]) -> list[tuple[int, int, int, int]]:
    """One rank's operations as numbers, the last 1 where it is joined to the next; an error says where it stands."""
    rows = []
    for position, token in enumerate(tokens):
        *first, last = token.split("+")
        try:
            if len(first) > 1:
                raise ScheduleError(f"{shortened(token)} joins {len(first) + 1} operations; a pair has two.")
            rows += [(*numbers(part), 1) for part in first]
            rows.append((*numbers(last), 0))
        except ScheduleError as error:
            raise ScheduleError(f"Rank {rank}, operation {position}: {error}") from None
    return rows


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values, each key once; ValueError for a second (``json.loads``' object_pairs_hook)."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shortened(key)} occurs twice")
        found[key] = value
    return found
