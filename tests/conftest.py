"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Reusable worker processes; see ranks.py."""
    workers = Ranks()
    yield workers
    workers.stop()
