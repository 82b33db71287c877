"""How a name with settings is written in one word: ``NAME[:KEY=VALUE,...]``, as passes are asked for.

vocabulary:algorithm=2
2bp:when=late,behind=3
offload:stages=0-3+6,fraction=0.5
"""

from __future__ import annotations

import json
from typing import Any

from stretto.spec.errors import ConfigError


def read_named(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """Name and settings; ``where`` says in errors what holds the text.

    Numbers, true, false and lists are read as JSON, and anything else is the string that it is.  Raises ConfigError
    for a setting without ``=`` and for one that occurs twice.

    >>> read_named("2bp:when=late,behind=3", "--pass")
    ('2bp', {'when': 'late', 'behind': 3})
    """
    name, _, settings = text.partition(":")
    found: dict[str, Any] = {}
    for item in settings.split(",") if settings else []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{where} {text}: write NAME:KEY=VALUE,..., for example 2bp:when=late,behind=3.")
        if key in found:
            raise ConfigError(f"{where} {text}: {key} is written twice.")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return name, found
