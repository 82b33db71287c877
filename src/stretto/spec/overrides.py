"""Dotted overrides from the command line: ``--set plan.pp=4 plan.stages=[3,5] run.dir=runs/a``.

A value is read as TOML where it is TOML, and as the plain string that it is otherwise, so that
paths and names need no quotes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any

from stretto.spec.automatic import AUTO, every_key_auto
from stretto.spec.errors import ConfigError
from stretto.spec.fields import accept_section, find_key, find_section, is_open_table, is_table, strip_none

PLACE = "--set"


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of a parsed run file with ``section.key=value`` written over it.

    ConfigError names an override without ``=``, an unknown section or key with the nearest one, and
    a value of the wrong type.
    """
    result = {name: dict(table) if isinstance(table, dict) else table for name, table in raw.items()}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        names = [name.strip() for name in dotted.split(".")]
        if not equals or not all(names):
            raise ConfigError(f"{PLACE} {override}: write section.key=value, for example {PLACE} plan.pp=4.")
        if names == ["plan"] and value_of(text.strip()) == AUTO:
            result["plan"] = AUTO
            continue
        if len(names) == 1:
            find_section(names[0], PLACE)
            raise ConfigError(f"{PLACE} {override}: {names[0]} is a section; name one of its keys.")
        _write(result, names, text.strip())
    return result


def _write(raw: dict[str, Any], names: list[str], text: str) -> None:
    section, key = names[:2]
    find_section(section, PLACE)
    annotation, _ = strip_none(find_key(section, key, PLACE))
    value = value_of(text)
    if annotation is str and not isinstance(value, str):
        value = text  # data.path=2024 is a path, not a number
    if len(names) > 2:
        if len(names) > 3 or not (is_table(annotation) or is_open_table(annotation)):
            raise ConfigError(f"{PLACE}: {section}.{key} has no keys of its own, so {'.'.join(names)} is unknown.")
        accept_section(section, {key: {names[2]: value}}, PLACE)
        before = raw.get(section, {}).get(key, {})
        value = {**(before if isinstance(before, dict) else {}), names[2]: value}
    elif not (section == "plan" and value == AUTO):  # whether there is a planner, resolve knows
        accept_section(section, {key: value}, PLACE)
    if section == "plan" and raw.get("plan") == AUTO:
        raw["plan"] = every_key_auto()
    raw[section] = {**raw.get(section, {}), key: value}


def value_of(text: str) -> Any:
    """A value as TOML, or the string that it is otherwise.

    >>> value_of("[3, 5]"), value_of("runs/a")
    ([3, 5], 'runs/a')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A newline inside the text could have smuggled in further keys; then it is just a string.
    return parsed["value"] if set(parsed) == {"value"} else text
