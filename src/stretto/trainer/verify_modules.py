"""Looks inside the part of a model whose output differs: what goes into and comes out of each of its modules.

    input ─► [attention_norm] ─► [q] [k] [v] ─ rotary, attend ─► [o] ─► ...
                                                                ▲
              the first value that differs: a module's output -> the fault is in that module;
                                            a module's input  -> it is between the modules, here in attention

Only done when a first comparison has found the part, because it is a lot of data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor, nn

from stretto.parallel.pipeline.segment import tensors_of
from stretto.spec.contract import Stack
from stretto.spec.sharding import split_evenly

Side = Literal["input", "output"]
Key = tuple[str, Side]


@dataclass(frozen=True, slots=True)
class Heard:
    """One value that a module was given or gave."""

    key: Key
    """Module and side."""
    row: int
    """First row of the global batch that it belongs to."""
    start: int
    """First token; on a rank, whatever slice it holds, 0."""
    values: np.ndarray
    """[rows, tokens, ...]."""


class ModuleWatch:
    """Hears the modules with parameters of their own inside ``part``, in the order in which they run."""

    def __init__(self, stack: Stack, part: str) -> None:
        self.row = 0
        self.start = 0
        self._heard: dict[tuple[Key, int, int], Heard] = {}
        for name, module in cast(nn.Module, stack).get_submodule(part).named_modules(prefix=part):
            if name != part and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(partial(self._hear, name), with_kwargs=True)

    def _hear(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._keep((name, "input"), given[0] if given else None)
        found = tensors_of(output) if isinstance(output, Tensor | tuple) else ()
        self._keep((name, "output"), found[0] if found else None)

    def _keep(self, key: Key, value: Any) -> None:
        """Keep the first value; what is recomputed in the backward pass comes again."""
        if isinstance(value, Tensor) and value.ndim >= 2:
            heard = Heard(key, self.row, self.start, value.detach().numpy().copy())
            self._heard.setdefault((key, self.row, self.start), heard)

    def take(self) -> list[Heard]:
        """What was heard since the last time."""
        found, self._heard = list(self._heard.values()), {}
        return found


def whole_values(heard: Sequence[Heard], rows: int, length: int) -> dict[Key, np.ndarray]:
    """The one-rank reference's values as [rows, length, ...]; those of another layout are left out."""
    values: dict[Key, np.ndarray] = {}
    odd = set()
    for part in heard:
        stop = part.start + part.values.shape[1]
        if part.values.shape[0] != 1 or stop > length:
            odd.add(part.key)
            continue
        where = values.setdefault(part.key, np.zeros((rows, length, *part.values.shape[2:])))
        if where.shape[2:] == part.values.shape[2:]:
            where[part.row, part.start : stop] = part.values[0]
    return {key: array for key, array in values.items() if key not in odd}


def first_difference(
    expected: Mapping[Key, np.ndarray],
    ranks: Sequence[Sequence[Heard]],
    *,
    tp: int,
    tolerance: float,
    tokens: Sequence[np.ndarray] | None = None,
) -> Key | None:
    """The first value, in the order of the reference's forward pass, in which a rank differs from it.

    ``ranks`` holds what each rank heard, in rank order (tp fastest); ``tp`` slices are told by their size.
    ``tokens``: which tokens of a row each rank's share holds, where rows are cut over cp.
    """
    wrong, seen = set(), set()
    for rank, heard in enumerate(ranks):
        for part in heard:
            if part.key not in expected:
                continue
            whole = expected[part.key] if tokens is None else expected[part.key][:, tokens[rank]]
            window = tp_window(whole.shape, part, tp, rank % tp)
            seen.add(part.key)
            if whole[window].shape == part.values.shape:
                error = np.abs(whole[window] - part.values).max(initial=0.0)
                if not error <= tolerance * np.abs(whole).max(initial=0.0):
                    wrong.add(part.key)
    return next((key for key in expected if key in wrong or key not in seen), None)


def tp_window(shape: tuple[int, ...], part: Heard, tp: int, index: int) -> tuple[slice, ...]:
    """Where a rank's value lies in the whole one of ``shape``: dims that are smaller are cut over tp."""
    window = [slice(part.row, part.row + part.values.shape[0])]
    for total, size in zip(shape[1:], part.values.shape[1:], strict=False):
        start = 0 if size == total else split_evenly(total, tp, index)[0]
        window.append(slice(start, start + size))
    return tuple(window)
