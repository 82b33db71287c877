"""A run as TOML text and back, exactly: ``from_text(to_text(run)) == run``.

A key that is absent is the field's default (None for all that may be None), lists are tuples, and
what has fields of its own is a table.  Nothing is looked up here: a preset's name is only a name.
``resolve.load_run`` is what reads a user's file.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stretto.spec.errors import ConfigError, nearest
from stretto.spec.fields import Given, accept_section, build, sections
from stretto.spec.run import RunSpec


def to_text(run: RunSpec) -> str:
    """The run as a run file in which every key is written out (keys that are None are left out)."""
    import tomli_w

    return tomli_w.dumps({name: _table(getattr(run, name)) for name in sections()})


def from_text(text: str, place: str = "run.toml") -> RunSpec:
    """The run that ``text`` says literally, presets not applied; ``place`` names the text in errors."""
    return build_run(accept_file(parse(text, place), place))


def save(run: RunSpec, path: str | Path) -> Path:
    """Write the resolved run to ``path`` (whole or not at all) and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_text(run), encoding="utf-8")
    return partial.replace(path)


def read(path: str | Path) -> str:
    """Text of a run file; ConfigError where it is missing, a folder, or not UTF-8."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a run file; name the file in it, for example {path / 'run.toml'}.")
    if not path.exists():
        folder = path.parent
        others = sorted(p.name for p in folder.glob("*.toml") if p.name != "pyproject.toml") if folder.is_dir() else []
        hint = nearest(path.name, others) or (f"; {folder} has {', '.join(others[:8])}." if others else ".")
        raise ConfigError(f"The run file {path} doesn't exist{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"The run file {path} can't be read as UTF-8 text: {error}.") from error


def parse(text: str, place: str) -> dict[str, Any]:
    """TOML as plain values; ConfigError with line and column where it isn't TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{place} is not valid TOML: {error}.") from error


def accept_file(raw: dict[str, Any], place: str) -> Given:
    """Check every section and key of a parsed file."""
    return {name: accept_section(name, table, place) for name, table in raw.items()}


def build_run(given: Given) -> RunSpec:
    """A RunSpec from what is given, the rest by default."""
    return RunSpec(**{name: build(cls, given.get(name, {})) for name, cls in sections().items()})


def _table(value: Any) -> dict[str, Any]:
    fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {name: _plain(part) for name, part in fields if part is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return _table(value) if dataclasses.is_dataclass(value) else value
