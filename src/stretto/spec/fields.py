"""Which keys a run file has and which value each takes, read off the dataclasses.

The dataclasses of this room are the only list of keys.  A value that comes from outside (TOML, an
override) is held against its field's annotation here; what is wrong is a ConfigError that names the
place, the key and the choices.

What a user wrote is kept apart from what it becomes: ``Given`` is only the keys that were written,
so that a preset can be laid underneath later (see ``resolve``).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from stretto.spec.errors import ConfigError, UnsupportedError, nearest
from stretto.spec.run import RunSpec

Given = dict[str, dict[str, Any]]
"""Section -> key -> value, only what was written; a table inside a section is a dict of its own."""

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "strings"}


@functools.cache
def keys_of(cls: type) -> Mapping[str, Any]:
    """Field name -> annotation of a dataclass, in the order of its definition."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def sections() -> Mapping[str, type]:
    """Section name -> dataclass of a run file."""
    return dict(keys_of(RunSpec))


def is_table(cls: Any) -> bool:
    """Whether an annotation stands for a TOML table."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


def is_open_table(annotation: Any) -> bool:
    """Whether an annotation stands for a TOML table whose keys are not fixed here."""
    return typing.get_origin(annotation) is Mapping


def strip_none(annotation: Any) -> tuple[Any, bool]:
    """The annotation without ``| None``, and whether it had one.

    >>> strip_none(int | None)
    (<class 'int'>, True)
    """
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        assert len(rest) == 1, annotation
        return rest[0], True
    return annotation, False


def find_section(name: str, place: str) -> type:
    """Dataclass of section ``name``; ConfigError with the nearest section where there is none."""
    if name not in sections():
        owner = next((f"{s}.{name}" for s, cls in sections().items() if name in keys_of(cls)), None)
        hint = (
            f"; did you mean {owner!r}?"
            if owner
            else nearest(name, sections()) or f"; choose from {_list(sections())}."
        )
        raise ConfigError(f"{place}: there is no section [{name}]{hint}")
    return sections()[name]


def find_key(section: str, name: str, place: str) -> Any:
    """Annotation of ``section.name``; ConfigError with the nearest key where there is none."""
    keys = keys_of(find_section(section, place))
    if name not in keys:
        raise ConfigError(f"{place}: unknown key {section}.{name}{_nearest_key(section, name)}")
    return keys[name]


OWN_AUTO = ("schedule", "attention_backend")
"""Keys of the plan whose ``auto`` isn't the planner's: a schedule that is searched for, whichever kernel can."""


def accept_section(name: str, table: Any, place: str) -> dict[str, Any]:
    """Check a section as it was read and return its keys with values of the fields' types."""
    cls = find_section(name, place)
    if name == "plan" and table == "auto":
        raise UnsupportedError(
            f'{place}: plan = "auto" needs the planner, and a resolved run has been through it; '
            "write a [plan] section with the degrees, for example pp = 1, tp = 1, dp_replicate = 2."
        )
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place}: {name} must be a section, not {table!r}; write [{name}] and the keys under it.")
    given = {}
    for key, value in table.items():
        annotation = find_key(name, key, place)
        if name == "plan" and value == "auto" and key not in OWN_AUTO:
            if key == "stages":
                continue  # None: the balanced split, which needs no planner
            default = getattr(cls(), key)
            raise UnsupportedError(
                f'{place}: plan.{key} = "auto" needs the planner, and a resolved run has been through it; '
                f"write a value, for example plan.{key} = {_toml(default)}."
            )
        given[key] = accept(_as_word(name, key, value), annotation, key=f"{name}.{key}", place=place)
    return given


def _as_word(section: str, key: str, value: Any) -> Any:
    """plan.compile was true or false once, and the run.toml of finished runs still says so."""
    if (section, key) == ("plan", "compile") and isinstance(value, bool):
        return "blocks" if value else "none"
    return value


def accept(value: Any, annotation: Any, *, key: str, place: str) -> Any:
    """``value`` as the type that ``annotation`` says; ConfigError with the expected type otherwise.

    Lists become tuples.  A table that is a field of its own stays a dict of what was written; a
    list of tables becomes a tuple of their dataclass.
    """
    annotation, _ = strip_none(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return _accept_choice(value, typing.get_args(annotation), key=key, place=place)
    if origin is tuple:
        return _accept_list(value, typing.get_args(annotation)[0], key=key, place=place)
    if is_open_table(annotation):
        return _accept_options(value, key=key, place=place)
    if is_table(annotation):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place}: {key} must be a table with {_list(keys_of(annotation))}, not {value!r}.")
        return _accept_table(value, annotation, key=key, place=place)
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        raise ConfigError(f"{place}: {key} must be {_NAMES[annotation]}, not {value!r}.")
    return value


def build(cls: type, given: Mapping[str, Any], base: Any = None) -> Any:
    """An instance of dataclass ``cls``: what is given, the rest from ``base`` or from the defaults."""
    values = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            table, _ = strip_none(keys_of(cls)[key])
            if is_open_table(table):
                values[key] = dict(value)
                continue
            value = build(table, value, None if base is None else getattr(base, key))
        values[key] = value
    return cls(**values) if base is None else dataclasses.replace(base, **values)


def _accept_choice(value: Any, choices: tuple[Any, ...], *, key: str, place: str) -> Any:
    # bool is an int to ==, so that True would pass for 1.
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    listed = ", ".join(_toml(choice) for choice in choices)
    near = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    raise ConfigError(f"{place}: {key} = {_toml(value)} is none of {listed}{near or '.'}")


def _accept_list(value: Any, item: Any, *, key: str, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        what = f"tables with {_list(keys_of(item))}" if is_table(item) else _PLURALS[item]
        raise ConfigError(f"{place}: {key} must be a list of {what}, not {value!r}.")
    parts = [accept(part, item, key=f"{key}[{i}]", place=place) for i, part in enumerate(value)]
    if not is_table(item):
        return tuple(parts)
    for index, part in enumerate(parts):
        for field in dataclasses.fields(item):
            if field.name not in part and field.default is field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{place}: {key}[{index}] lacks {field.name}.")
    return tuple(build(item, part) for part in parts)


def _accept_table(value: Mapping[str, Any], cls: type, *, key: str, place: str) -> dict[str, Any]:
    given = {}
    for name, part in value.items():
        if name not in keys_of(cls):
            near = nearest(name, keys_of(cls)) or f"; choose from {_list(keys_of(cls))}."
            raise ConfigError(f"{place}: unknown key {key}.{name}{near}")
        given[name] = accept(part, keys_of(cls)[name], key=f"{key}.{name}", place=place)
    return given


def _accept_options(value: Any, *, key: str, place: str) -> dict[str, Any]:
    """A table of numbers, strings, true, false and lists of them; lists become tuples."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}: {key} must be a table of options, for example {{ waves = 2 }}, not {value!r}.")
    given: dict[str, Any] = {}
    for name, part in value.items():
        items = part if isinstance(part, list | tuple) else [part]
        if any(type(item) not in (bool, int, float, str) for item in items):
            raise ConfigError(f"{place}: {key}.{name} must be a number, a string, true, false or a list, not {part!r}.")
        given[name] = tuple(part) if isinstance(part, list | tuple) else part
    return given


def _nearest_key(section: str, name: str) -> str:
    # The same word in another section is a better guess than a similar word in this one.
    for other, cls in sections().items():
        if name in keys_of(cls):
            return f"; did you mean {other + '.' + name!r}?"
    own = keys_of(sections()[section])
    near = nearest(name, own)
    return near.replace("mean '", f"mean '{section}.") if near else f"; [{section}] has {_list(own)}."


def _list(names: Any) -> str:
    return ", ".join(names)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
