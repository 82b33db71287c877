"""docs/run-file.md has every key of a run file, with its default and what its docstring says."""

from __future__ import annotations

import dataclasses
import re
import runpy
import tomllib
import typing
from pathlib import Path

import pytest

from stretto.spec.fields import is_table, keys_of, sections, strip_none

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "run-file.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^#+ \[+([\w.]+)\]+$", flags=re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*?) ?\| (.+) \|$", flags=re.MULTILINE)


def tables() -> dict[str, type]:
    """Name -> dataclass of every table that a run file may have, those inside a section too."""
    found = {}
    for name, cls in sections().items():
        found[name] = cls
        for key, annotation in keys_of(cls).items():
            inner, _ = strip_none(annotation)
            found |= {f"{name}.{key}": part for part in (inner, *typing.get_args(inner)) if is_table(part)}
    return found


def shown(name: str) -> dict[str, str]:
    """Key -> default as the page writes it, of one table."""
    parts = HEADING.split(PAGE)
    return {row[1]: row[3] for row in ROW.finditer(parts[parts.index(name) + 1])}


def test_page_has_every_table_once() -> None:
    assert sorted(HEADING.findall(PAGE)) == sorted(tables())


@pytest.mark.parametrize("name", tables())
def test_keys_and_defaults(name: str) -> None:
    cells = shown(name)
    fields = dataclasses.fields(tables()[name])
    assert list(cells) == [field.name for field in fields]
    for field in fields:
        cell, default = cells[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or default is None:
            assert cell == ("" if default is None else "must be written")
        else:
            value = tomllib.loads(f"value = {cell.strip('`')}")["value"]
            assert value == (list(default) if isinstance(default, tuple) else default), field.name


def test_page_is_what_its_script_writes() -> None:
    """If not: python docs/run_file.py."""
    assert runpy.run_path(str(DOCS / "run_file.py"))["page"]() == PAGE


def test_page_speaks_of_keys_not_of_python() -> None:
    assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b|``|Spec\b", PAGE)
