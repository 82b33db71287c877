"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import stretto

MODULES = sorted(m.name for m in pkgutil.walk_packages(stretto.__path__, "stretto.") if not m.ispkg)


def test_there_are_modules() -> None:
    assert len(MODULES) > 50


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
