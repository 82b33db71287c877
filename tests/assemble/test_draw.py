"""Initial values: a slice is the slice of the whole, and names, seeds and blocks don't repeat each other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stretto.assemble import draw as module
from stretto.assemble.draw import ROWS, draw
from stretto.spec.sharding import Sharding, Slice, cut

NORMAL = ("normal", 0.02)


def whole(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return draw(seed, name, shape, Sharding.whole(name, shape).slice, NORMAL)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rest=st.lists(st.integers(1, 4), max_size=2).map(tuple))
def test_a_slice_is_the_slice_of_the_whole(data: st.DataObject, rest: tuple[int, ...]) -> None:
    rows = data.draw(st.sampled_from([1, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5]))
    shape = (rows, *rest)
    window = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        window.append(slice(start, data.draw(st.integers(start, size))))
    part = Slice(offset=tuple(w.start for w in window), length=tuple(w.stop - w.start for w in window))
    expected = whole(3, "w", shape)[tuple(window)]
    found = draw(3, "w", shape, part, NORMAL)
    assert found.shape == expected.shape and torch.equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(0, 1), parts=st.integers(1, 6), shape=st.tuples(st.integers(1, 600), st.integers(1, 9)))
def test_the_parts_of_tp_make_the_whole(dim: int, parts: int, shape: tuple[int, int]) -> None:
    pieces = [draw(0, "w", shape, cut("w", shape, dim=dim, parts=parts, index=i).slice, NORMAL) for i in range(parts)]
    assert torch.equal(torch.cat(pieces, dim), whole(0, "w", shape))


def test_names_seeds_and_blocks_differ() -> None:
    first = whole(0, "a", (2 * ROWS, 4))
    assert not torch.equal(first, whole(0, "b", (2 * ROWS, 4)))
    assert not torch.equal(first, whole(1, "a", (2 * ROWS, 4)))
    assert not torch.equal(first[:ROWS], first[ROWS:])
    # "1/1x" with seed 1 must not be "11/x": the key's fields are kept apart.
    assert not torch.equal(whole(1, "1/a", (4, 4)), whole(11, "a", (4, 4)))
    assert torch.equal(first, whole(0, "a", (2 * ROWS, 4)))


def test_mean_and_deviation() -> None:
    values = whole(5, "w", (1000, 300))
    # 300,000 draws: the mean's own deviation is std / 548, the deviation's std / 775; five of them are allowed.
    assert abs(float(values.mean())) < 5 * 0.02 / 548
    assert abs(float(values.std()) / 0.02 - 1) < 5 / 775
    assert values.dtype == torch.float32


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    whole(0, "w", (ROWS, 2))
    assert torch.equal(torch.randn(3), expected)


def test_constants_and_scalars() -> None:
    part = Slice(offset=(1,), length=(2,))
    assert draw(0, "norm", (4,), part, ("constant", 1.0)).tolist() == [1.0, 1.0]
    empty = Slice(offset=(), length=())
    assert draw(0, "scale", (), empty, NORMAL).shape == ()
    assert draw(0, "scale", (), empty, ("constant", 2.0)).item() == 2.0


def test_a_rank_draws_only_the_blocks_that_it_touches(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    drawn: list[int] = []
    inner = module._block

    def counted(seed: int, name: str, index: int, shape: tuple[int, ...]) -> Tensor:
        drawn.append(index)
        return inner(seed, name, index, shape)

    monkeypatch.setattr(module, "_block", counted)
    draw(0, "w", (10 * ROWS, 2), Slice(offset=(3 * ROWS - 1, 0), length=(ROWS + 1, 2)), NORMAL)
    assert drawn == [2, 3]
