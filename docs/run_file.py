"""Writes docs/run-file.md: every key of a run file, read off the dataclasses of stretto.spec and their docstrings.

    python docs/run_file.py

What Python calls None is a key that isn't written; ``docs/x.md`` in a docstring becomes a link.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from stretto.spec.fields import is_open_table, is_table, keys_of, sections, strip_none

PAGE = Path(__file__).parent / "run-file.md"
WIDTH = 120
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "string"}
INTRODUCTION = """\
# Every key of a run file

Written by `python docs/run_file.py` from the docstrings of `src/stretto/spec`.

A run file is TOML with the sections below, each of them optional. A key that isn't here is an error that names the
nearest one, and so is a value that a key can't have. `--set plan.pp=2 plan.stages=[3,5]` on the command line writes
over the file, and the run's directory keeps the whole of it, defaults written out, as `run.toml`.

An empty default is a key that isn't written: the text says what that means, else there is then no such thing. What a
preset (`name` of `[model]` and `[cluster]`) or a Hugging Face directory (`path`) says takes the place of the defaults,
and what is written beside it wins. `plan = "auto"`, or `"auto"` as the value of any key of `[plan]`, leaves whatever of
the plan isn't written to the [planner](planner.md#the-command); only `schedule`, `stages` (balanced) and
`attention_backend` have an `auto` of their own.
"""


def page() -> str:
    """The page's text."""
    parts = [INTRODUCTION]
    for name, cls in sections().items():
        parts += _section(f"## [{name}]", cls)
        for key, annotation in keys_of(cls).items():
            for table, brackets in _tables(annotation):
                parts += _section(f"### {brackets[0]}{name}.{key}{brackets[1]}", table)
    return "\n".join(parts)


def docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string that follows it in the class's source, on one line."""
    tree = ast.parse(inspect.getsource(cls))
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _section(heading: str, cls: type) -> list[str]:
    texts = docstrings(cls)
    rows = [
        f"| `{field.name}` | {_type(keys_of(cls)[field.name])} | {_default(field)} | {_text(texts[field.name])} |\n"
        for field in dataclasses.fields(cls)
    ]
    about = _wrapped(_text(inspect.getdoc(cls) or ""))
    return [f"{heading}\n\n{about}\n| key | type | default | what |\n|---|---|---|---|\n{''.join(rows)}"]


def _tables(annotation: Any) -> Iterator[tuple[type, tuple[str, str]]]:
    """Dataclasses that a key's value is made of, and how its heading is written."""
    annotation, _ = strip_none(annotation)
    if is_table(annotation):
        yield annotation, ("[", "]")
    for item in typing.get_args(annotation):
        if is_table(item):
            yield item, ("[[", "]]")


def _type(annotation: Any) -> str:
    annotation, _ = strip_none(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{_toml(choice)}`" for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        item = typing.get_args(annotation)[0]
        return "tables" if is_table(item) else f"list of {TYPES[item]}s"
    return "table" if is_table(annotation) or is_open_table(annotation) else TYPES[annotation]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    if field.default is dataclasses.MISSING:
        return "must be written"
    return "" if field.default is None else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:g}".replace("e+0", "e") if value >= 1e9 else str(value)


def _text(docstring: str) -> str:
    text = docstring.replace("``", "`").replace(".  ", ". ").replace("|", "\\|")
    text = re.sub(r"\bNone:", "not written:", text)
    return re.sub(r"docs/([a-z-]+)\.md(#[a-z-]+)?", r"[\1](\1.md\2)", text)


def _wrapped(text: str) -> str:
    """Each paragraph in lines of the page's width."""
    paragraphs = [textwrap.fill(part, WIDTH, break_on_hyphens=False) for part in text.strip().split("\n\n")]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
