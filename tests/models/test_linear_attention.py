"""Linear attention and the gated delta rule: chunks against the recurrence, token by token, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stretto.models.chunked import Summary, Tokens, passed, summarise

B, G, R, T, K = 2, 2, 2, 23, 4
STARTS = torch.zeros(B, T, dtype=torch.bool)
STARTS[0, 0] = STARTS[0, 9] = STARTS[0, 10] = STARTS[1, 16] = True


def tokens_of(*, delta: bool, starts: Tensor | None, hard: bool = False) -> Tokens:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(B, G * R, T, K), draw(B, G, T, K), draw(B, G, T, K)
    decay = -draw(B, G, T).abs() * (400.0 if hard else 0.3)
    write = draw(B, G, T).sigmoid() if delta else None
    if delta:
        k = torch.nn.functional.normalize(k, dim=-1)
    for leaf in (q, k, v, decay, write):
        if leaf is not None:
            leaf.requires_grad_()
    return Tokens(q=q, k=k, v=v, log_decay=decay, write=write, starts=starts)


def leaves(tokens: Tokens) -> list[Tensor]:
    return [x for x in (tokens.q, tokens.k, tokens.v, tokens.log_decay, tokens.write) if x is not None]


def step_by_step(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, K] and last state, by the definition alone."""
    found = []
    for t in range(tokens.k.size(2)):
        k, v = tokens.k[:, :, t], tokens.v[:, :, t]
        if tokens.starts is not None:
            state = state * (~tokens.starts[:, t]).double().view(-1, 1, 1, 1)
        state = state * tokens.log_decay[:, :, t].exp()[..., None, None]
        if tokens.write is not None:
            v = tokens.write[:, :, t].unsqueeze(-1) * (v - torch.einsum("bgkv,bgk->bgv", state, k))
        state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
        q = tokens.q[:, :, t].unflatten(1, (G, R))
        found.append(torch.einsum("bgrk,bgkv->bgrv", q, state).flatten(1, 2))
    return torch.stack(found, dim=2), state


def last_state(summary: Summary, state: Tensor) -> Tensor:
    through, gain = summary.total()
    return passed(through, state) + gain


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize("starts", [None, STARTS], ids=["row", "documents"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_are_the_recurrence(delta: bool, starts: Tensor | None, chunk: int) -> None:
    tokens = tokens_of(delta=delta, starts=starts)
    before = torch.linspace(-1, 1, B * G * K * K, dtype=torch.float64).view(B, G, K, K).requires_grad_()
    expected, last = step_by_step(tokens, before)
    summary = summarise(tokens, chunk)
    out = summary.output(before)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last_state(summary, before), last, rtol=0, atol=1e-12)
    weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    inputs = [*leaves(tokens), before]
    got = torch.autograd.grad((out * weight).sum() + last_state(summary, before).sin().sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum() + last.sin().sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_decays_of_any_size_stay_finite(delta: bool) -> None:
    tokens = tokens_of(delta=delta, starts=STARTS, hard=True)
    zero = torch.zeros(B, G, K, K, dtype=torch.float64)
    out = summarise(tokens, 8).output(zero)
    torch.testing.assert_close(out, step_by_step(tokens, zero)[0], rtol=0, atol=1e-12)
    for gradient in torch.autograd.grad(out.sum(), leaves(tokens)):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_narrow_types_are_summed_in_float32(delta: bool) -> None:
    exact = tokens_of(delta=delta, starts=None)
    zero = torch.zeros(B, G, K, K)
    expected = summarise(exact).output(zero.double()).detach()
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        narrow = {n: getattr(exact, n).to(dtype) for n in ("q", "k", "v")}
        write = None if exact.write is None else exact.write.float()
        tokens = Tokens(**narrow, log_decay=exact.log_decay.float(), write=write)
        out = summarise(tokens, 8).output(zero).detach()
        assert out.dtype == torch.float32
        assert float((out - expected).abs().max() / expected.abs().max()) <= bound
