"""Compilation of the few loops that run over millions of operations: the one place that knows numba.

numba and not numpy, because these loops follow one operation's end to the next one's start: each turn
needs the result of the turn before, which array operations can't express.  The functions are plain
Python over arrays, and without numba (extra ``synthesize``) they run as they stand: slower, not otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

WORTH_IT = 20_000
"""Operations from which loading compiled code pays: below, Python is done before numba is imported."""


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a loop so that it is compiled at its first call, and kept on disk for later processes.

    Importing a module with such a function imports numba, which takes a third of a second: import it lazily.
    """
    try:
        from numba import njit
    except ImportError:
        return function
    return njit(cache=True, nogil=True)(function)  # type: ignore[no-any-return]


_compiled = cache(compiled)


def for_size(function: Callable[P, T], operations: int) -> Callable[P, T]:
    """The compiled form of ``function`` where it has many operations to go over, else ``function`` itself."""
    return _compiled(function) if operations >= WORTH_IT else function
