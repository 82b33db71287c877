"""LocalUnit: what autograd gives becomes the masters' gradients, whatever its layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.test_master import mesh_at
from stretto.parallel.pipeline.segment import Segment
from stretto.parallel.unit import LocalUnit, settle_all
from stretto.spec.sharding import Sharding
from stretto.spec.training import TrainingSpec
from stretto.trainer.optimizer import build_optimizer


def unit_of(*parameters: nn.Parameter, compute: torch.dtype) -> LocalUnit:
    held = [(p, Sharding.whole(f"p{i}", tuple(p.shape))) for i, p in enumerate(parameters)]
    return LocalUnit("u", held, mesh=mesh_at(), compute=compute)


def grads(unit: LocalUnit) -> list[Tensor | None]:
    return [m.tensor.grad for m in unit.masters]


def test_contributions_add_up_and_a_step_forgets_the_last() -> None:
    unit = unit_of(nn.Parameter(torch.zeros(2, 3)), compute=torch.float32)
    for step in range(2):
        unit.begin_step(3)
        for number in range(3):
            unit.add_gradients([torch.full((2, 3), float(number + step))])
        settle_all([unit])
        (gradient,) = grads(unit)
        assert gradient is not None and bool((gradient == 3 + 3 * step).all())


def test_an_unused_parameter_has_zeros_and_a_late_one_its_gradient() -> None:
    # Zeros as in every other plan's buffer: AdamW decays the parameter under each of them, or under none.
    unused, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    unit = unit_of(unused, late, compute=torch.float32)
    unit.begin_step(2)
    unit.add_gradients([None, None])
    unit.add_gradients([None, torch.ones(2)])
    first, second = grads(unit)
    assert first is not None and first.tolist() == [0, 0]
    assert second is not None and second.tolist() == [1, 1]


def test_bfloat16_keeps_masters_gradients_and_sums_in_float32() -> None:
    parameter = nn.Parameter(torch.tensor([1 + 2.0**-12]))
    unit = unit_of(parameter, compute=torch.bfloat16)
    (master,) = unit.masters
    assert parameter.dtype == torch.bfloat16 and master.tensor.dtype == torch.float32
    assert master.tensor.item() == 1 + 2.0**-12 and parameter.item() == 1.0
    unit.begin_step(257)
    unit.add_gradients([torch.ones(1, dtype=torch.bfloat16)])
    for _ in range(256):  # each is lost if added to 1 in bfloat16
        unit.add_gradients([torch.full((1,), 2.0**-9, dtype=torch.bfloat16)])
    (gradient,) = grads(unit)
    assert gradient is not None and gradient.dtype == torch.float32 and gradient.item() == 1.5
    master.tensor.fill_(3.0)
    unit.publish()
    assert parameter.item() == 3.0


def test_frozen_parameters_have_no_gradient_and_are_published() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    unit = unit_of(frozen, nn.Parameter(torch.ones(3)), compute=torch.bfloat16)
    assert [p.shape[0] for p in unit.parameters] == [3]
    unit.begin_step(1)
    unit.add_gradients([torch.ones(3)])
    assert grads(unit)[0] is None
    unit.masters[0].tensor.fill_(2.0)
    unit.publish()
    assert frozen.tolist() == [2.0, 2.0]


def test_the_gradient_of_a_sum_is_not_shared_between_its_terms() -> None:
    # autograd returns one tensor for both; adding the second micro-batch to each would add it twice.
    a, b = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
    unit = unit_of(a, b, compute=torch.float32)
    segment = Segment(name="s", run=lambda x, context, batch: x @ (a + b).t(), units=[unit])
    unit.begin_step(2)
    expected = torch.zeros(3, 4)
    for _ in range(2):
        x, dy = torch.randn(2, 4), torch.randn(2, 3)
        kept, _ = segment.forward(x, None, None)
        segment.backward(kept, dy, None, None)
        expected += dy.t() @ x
    for gradient in grads(unit):
        assert gradient is not None
        torch.testing.assert_close(gradient, expected)


def test_the_gradient_that_travels_on_is_not_a_parameters() -> None:
    # y = x + p: both gradients are dy itself, and dx may still be on its way when p's next part is added.
    p = nn.Parameter(torch.zeros(1, 4))
    unit = unit_of(p, compute=torch.float32)
    segment = Segment(name="s", run=lambda x, context, batch: x + p, units=[unit])
    unit.begin_step(2)
    kept, _ = segment.forward(torch.zeros(1, 4), None, None)
    dx = segment.backward(kept, torch.ones(1, 4), None, None)
    unit.add_gradients([torch.ones(1, 4)])
    assert isinstance(dx, Tensor) and bool((dx == 1).all())


def test_layout_does_not_change_the_update() -> None:
    # Fused AdamW reads parameter and gradient side by side in memory: a transposed gradient must be laid out anew.
    def run(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return x @ w.T.contiguous() + scale.expand(2, 3)

    x = torch.randn(2, 4)
    w, scale = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(1, 3))
    plain = [nn.Parameter(p.detach().clone()) for p in (w, scale)]
    run(x, *plain).square().sum().backward()
    torch.optim.AdamW(plain, lr=0.1, eps=1.0, weight_decay=0.1, betas=(0.9, 0.95)).step()
    unit = unit_of(w, scale, compute=torch.float32)
    optimizer = build_optimizer(unit.masters, TrainingSpec(learning_rate=0.1, eps=1.0, weight_decay=0.1))
    unit.begin_step(1)
    unit.add_gradients(torch.autograd.grad(run(x, w, scale).square().sum(), [w, scale]))
    optimizer.step()
    torch.testing.assert_close(w.detach(), plain[0].detach())
    torch.testing.assert_close(scale.detach(), plain[1].detach())


def test_an_expanded_gradient_can_be_added_to() -> None:
    p = nn.Parameter(torch.zeros(4))
    unit = unit_of(p, compute=torch.float32)
    unit.begin_step(2)
    for _ in range(2):
        unit.add_gradients(torch.autograd.grad(p.sum(), [p]))
    (gradient,) = grads(unit)
    assert gradient is not None and gradient.tolist() == [2.0] * 4
