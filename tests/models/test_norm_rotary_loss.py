"""The three operations with a gradient of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stretto.models.loss import cross_entropy_sum
from stretto.models.norm import RMSNorm, RootMeanSquare
from stretto.models.rotary import RotaryTables, apply_rotary
from stretto.spec.contract import IGNORE


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_norm_gradients():
    x, weight = draw(2, 3, 8), draw(8)
    torch.autograd.gradcheck(lambda x, w: RootMeanSquare.apply(x, w, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm_equals_torch(dtype):
    ours, theirs, x = RMSNorm(16, 1e-6).to(dtype), torch.nn.RMSNorm(16, 1e-6).to(dtype), draw(4, 5, 16, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x))


def test_norm_computes_bfloat16_in_float32():
    x = draw(64, 256, dtype=torch.float32)
    norm = RMSNorm(256, 1e-6)
    rounded = x.detach().bfloat16()
    assert torch.equal(norm.bfloat16()(rounded), norm.float()(rounded.float()).bfloat16())


def test_rotary_gradients():
    rotary = RotaryTables(8, 10000.0).at(torch.arange(5).expand(2, 5), dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: apply_rotary(x, rotary), (draw(2, 5, 3, 8),))


def test_rotary_scores_depend_on_distance_alone():
    tables, q, k = RotaryTables(16, 10000.0), draw(1, 1, 1, 16), draw(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        at = [tables.at(torch.tensor([[p]]), dtype=torch.float64, reach=200) for p in (i, j)]
        return (apply_rotary(q, at[0]) * apply_rotary(k, at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-12, atol=1e-12)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotary_refuses_tables_of_another_dtype():
    rotary = RotaryTables(8, 10000.0).at(torch.arange(5)[None], dtype=torch.float32)
    with pytest.raises(AssertionError, match="float32"):
        apply_rotary(draw(1, 5, 1, 8), rotary)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_torch(dtype):
    logits, labels = draw(2, 6, 11, dtype=dtype), torch.arange(12).view(2, 6) % 11
    labels[0, :4] = IGNORE
    ours = cross_entropy_sum(logits, labels)
    (grad,) = torch.autograd.grad(3 * ours, logits)
    exact = logits if dtype == torch.float64 else logits.float()
    theirs = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (expected,) = torch.autograd.grad(3 * theirs, logits)
    assert ours.dtype == exact.dtype and grad.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad, expected)


def test_loss_of_no_valid_token_is_zero():
    logits = draw(1, 3, 5)
    loss = cross_entropy_sum(logits, torch.full((1, 3), IGNORE))
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.abs().max().item() == 0.0
