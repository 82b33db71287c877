"""Segments and stages: the chain rule over cuts, whatever travels over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.test_master import mesh_at
from stretto.parallel.pipeline.segment import Segment, detached, tensors_of
from stretto.parallel.pipeline.stage import Stage, scalar
from stretto.parallel.unit import LocalUnit
from stretto.spec.sharding import Sharding


def weights(number: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64)) for _ in range(number)]


def segment_of(
    name: str, run: Callable[..., Any], *parameters: nn.Parameter, recompute: bool = False
) -> tuple[Segment, LocalUnit]:
    held = [(p, Sharding.whole(f"{name}.{i}", tuple(p.shape))) for i, p in enumerate(parameters)]
    unit = LocalUnit(name, held, mesh=mesh_at(), compute=torch.float64)
    unit.begin_step(1)
    return Segment(name=name, run=run, units=[unit], recompute=recompute), unit


def chain(ws: list[nn.Parameter], calls: list[str]) -> list[Callable[..., Any]]:
    """inputs, two blocks and outputs over (stream, untouched counter, side stream that only the end reads)."""

    def inputs(x: None, context: Any, batch: Tensor) -> Any:
        calls.append("inputs")
        return batch @ ws[0], torch.arange(2), batch.exp()

    def block(index: int) -> Callable[..., Any]:
        def run(x: tuple[Tensor, ...], context: Any, batch: Tensor) -> Any:
            calls.append(f"block{index}")
            stream, counter, side = x
            return torch.tanh(stream @ ws[index]) * context, counter + 1, side

        return run

    def outputs(x: tuple[Tensor, ...], context: Any, batch: Tensor) -> Tensor:
        calls.append("outputs")
        assert not x[1].is_floating_point() and x[1].tolist() == [2, 3]
        return ((x[0] @ ws[3]) * x[2].square()).sum()

    return [inputs, block(1), block(2), outputs]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_differentiates_like_one_graph(recompute: bool) -> None:
    ws, batch = weights(4), torch.linspace(0, 1, 6, dtype=torch.float64).view(2, 3)
    value: Any = None
    for run in chain(ws, []):
        value = run(value, 2.0, batch)
    expected = torch.autograd.grad(value, ws)

    calls: list[str] = []
    made = [
        segment_of(name, run, w, recompute=recompute and name.startswith("block"))
        for name, run, w in zip(["inputs", "block1", "block2", "outputs"], chain(ws, calls), ws, strict=True)
    ]
    # Two stages, two micro-batches in flight, as under 1f1b.
    first, last = Stage(0, [s for s, _ in made[:2]]), Stage(1, [s for s, _ in made[2:]])
    middles = {m: first.forward(m, None, 2.0, batch) for m in (0, 1)}
    losses = {m: last.forward(m, middles[m], 2.0, batch) for m in (0, 1)}
    assert scalar(losses[0]).item() == value.item() and first.num_in_flight == 2
    forwards = len(calls)
    seed = torch.ones((), dtype=torch.float64)
    for m in (0, 1):
        dy = last.backward(m, seed, 2.0, batch)
        assert [t.dtype for t in tensors_of(dy)] == [torch.float64, torch.int64, torch.float64]
        assert first.backward(m, dy, 2.0, batch) is None
    assert (first.num_in_flight, last.num_in_flight) == (0, 0)
    assert len(calls) - forwards == (4 if recompute else 0)
    for (_, unit), gradient in zip(made, expected, strict=True):
        found = unit.masters[0].tensor.grad
        assert found is not None
        torch.testing.assert_close(found, 2 * gradient, rtol=1e-13, atol=1e-13)


def test_recompute_keeps_the_input_alone() -> None:
    (w,) = weights(1)
    segment, _ = segment_of("block", lambda x, context, batch: (x @ w).exp(), w, recompute=True)
    kept, y = segment.forward(torch.ones(2, 3, dtype=torch.float64), None, None)
    assert kept.y is None and isinstance(y, Tensor) and not y.requires_grad


def test_evaluation_keeps_nothing() -> None:
    (w,) = weights(1)
    segment, unit = segment_of("block", lambda x, context, batch: (x @ w).exp(), w)
    stage = Stage(0, [segment])
    with torch.no_grad():
        y = stage.evaluate(torch.ones(2, 3, dtype=torch.float64), None, None)
    assert isinstance(y, Tensor) and not y.requires_grad
    assert stage.num_in_flight == 0 and unit.masters[0].tensor.grad is None


def test_forget_lets_activations_go() -> None:
    (w,) = weights(1)
    stage = Stage(0, [segment_of("block", lambda x, context, batch: x @ w, w)[0]])
    stage.forward(0, torch.ones(2, 3, dtype=torch.float64), None, None)
    assert len(list(stage.kept_tensors())) == 1
    stage.forget()
    assert stage.num_in_flight == 0 and not list(stage.kept_tensors())


def test_unused_and_frozen_inputs_get_zeros() -> None:
    (w,) = weights(1)
    segment, unit = segment_of("block", lambda x, context, batch: (x[0] @ w, x[1]), w)
    unused = torch.ones(4, dtype=torch.float64)
    kept, _ = segment.forward((torch.ones(2, 3, dtype=torch.float64), unused), None, None)
    dx = segment.backward(kept, (torch.ones(2, 3, dtype=torch.float64), torch.zeros(4)), None, None)
    assert isinstance(dx, tuple) and bool((dx[1] == 0).all())
    assert unit.masters[0].tensor.grad is not None


def test_a_frozen_first_segment_has_nothing_to_differentiate() -> None:
    frozen = nn.Parameter(torch.ones(3, 3, dtype=torch.float64), requires_grad=False)
    segment, unit = segment_of("inputs", lambda x, context, batch: batch @ frozen, frozen)
    kept, _ = segment.forward(None, None, torch.ones(2, 3, dtype=torch.float64))
    assert segment.backward(kept, torch.ones(2, 3, dtype=torch.float64), None, None) is None
    assert unit.masters[0].tensor.grad is None


def test_detached_leaves_share_the_data() -> None:
    x, n = torch.ones(2), torch.arange(2)
    leaves = detached((x, n))
    assert isinstance(leaves, tuple)
    assert leaves[0].requires_grad and not leaves[1].requires_grad and leaves[0].data_ptr() == x.data_ptr()
    assert detached(None) is None and isinstance(detached(x), Tensor) and not x.requires_grad


def test_the_last_stage_returns_a_scalar() -> None:
    with pytest.raises(AssertionError, match="scalar"):
        scalar(torch.ones(2))


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_handed_through_outlives_the_input(recompute: bool) -> None:
    """Offload empties a segment's inputs, which a next stage on the same rank may still have to read."""
    (w,) = weights(1)
    segment, _ = segment_of("s", lambda x, context, batch: (x[0] @ w, x[1]), w, recompute=recompute)
    side = torch.ones(3, dtype=torch.float64)
    kept, (_, through) = segment.forward((torch.ones(3, 3, dtype=torch.float64), side), None, None)
    for leaf in kept.x:
        leaf.data = torch.zeros((), dtype=torch.float64).expand(leaf.shape)
    assert torch.equal(through, side)
