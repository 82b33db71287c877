"""Values of a family's options, which are text where they come from a command line or a run file."""

from __future__ import annotations

from stretto.spec.errors import ScheduleError


def whole(name: str, value: int | str) -> int:
    """A whole number of at least 1.  Raises ScheduleError for anything else.

    >>> whole("waves", "2")
    2
    """
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ScheduleError(f"Option {name} is {value!r}, but it is a whole number of at least 1.")
    return int(text)


def flag(name: str, value: bool | str) -> bool:
    """True or false.  Raises ScheduleError for anything else.

    >>> flag("sharded", "true")
    True
    """
    said = str(value).strip().lower()
    if said not in ("true", "false"):
        raise ScheduleError(f"Option {name} is {value!r}, but it is true or false.")
    return said == "true"
