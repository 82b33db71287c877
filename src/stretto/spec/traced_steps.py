"""``run.trace``: which steps of a run are recorded."""

from __future__ import annotations

import re

from stretto.spec.errors import ConfigError

_PART = re.compile(r"([1-9][0-9]{0,11})(?:-([1-9][0-9]{0,11}))?")


def traced_steps(text: str) -> tuple[tuple[int, int], ...] | None:
    """First and last step of each range that is recorded; none for ``off``, None for ``last``.

    Raises ConfigError for what is neither.

    >>> traced_steps("5,10-12")
    ((5, 5), (10, 12))
    """
    if text in ("off", "last"):
        return () if text == "off" else None
    ranges = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigError(
                f'run.trace = "{text}" says no steps; write "off", "last" (the last steps of the run), '
                'or steps such as "20" or "5,10-12".'
            )
        ranges.append((first, last))
    return tuple(ranges)
