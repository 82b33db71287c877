"""Split backward: I and W together give what autograd gives, and between them lives the stash alone."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from parallel.test_master import mesh_at
from stretto.models.build import build_model
from stretto.parallel.gradient import Deferred, add_gradient
from stretto.parallel.pipeline.backward import Deferral
from stretto.parallel.pipeline.segment import Segment, tensors_of
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.unit import LocalUnit
from stretto.spec.contract import Batch, Place
from stretto.spec.model import ModelSpec
from stretto.spec.sharding import Sharding

FLOAT = torch.float64


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Everything(nn.Module):
    """Each way in which a parameter may be used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain, self.own = nn.LayerNorm(6), nn.Linear(6, 6), Doubled(6, 6)
        self.twice, self.frozen, self.inside = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6)
        self.both, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.zeros(2, 3, 6))
        self.frozen.requires_grad_(False)
        self.both.bias.requires_grad_(False)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        y = self.plain(self.norm(x)) + x
        y = self.twice(torch.tanh(self.twice(y)))
        y = self.frozen(self.own(y).sin()) + self.shift
        y = y + checkpoint(lambda t: self.inside(t).tanh(), y, use_reentrant=False)
        return self.both(y) + (y @ self.both.weight).cos() + functional.linear(y, self.both.weight.detach())


def stage_of(module: nn.Module, *, recompute: bool = False, calls: Any = None) -> tuple[Stage, LocalUnit]:
    held = [(p, Sharding.whole(n, tuple(p.shape))) for n, p in module.named_parameters()]
    unit = LocalUnit("unit", held, mesh=mesh_at(), compute=FLOAT)

    def run(x: Any, context: Any, batch: Any) -> Any:
        return module(x if x is not None else batch)

    return Stage(0, [Segment(name="b", run=run, units=[unit], recompute=recompute, deferral=Deferral(module))]), unit


@pytest.mark.parametrize("recompute", [False, True])
def test_every_use_of_a_parameter(recompute: bool) -> None:
    torch.manual_seed(3)
    module = Everything().to(FLOAT)
    xs = [torch.randn(2, 3, 6, dtype=FLOAT) for _ in range(3)]
    dys = [torch.randn(2, 3, 6, dtype=FLOAT) for _ in range(3)]
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    inputs = [x.clone().requires_grad_() for x in xs]
    whole = [
        torch.autograd.grad(module(x), [x, *trained.values()], dy, allow_unused=True)
        for x, dy in zip(inputs, dys, strict=True)
    ]

    stage, unit = stage_of(module, recompute=recompute)
    unit.begin_step(3)
    module.forwards = 0
    for m in range(3):
        stage.forward(m, xs[m], None, None, split=True)
    for m in range(3):  # all I before the first W
        dx = stage.backward_inputs(m, dys[m], None, None)
        torch.testing.assert_close(dx, whole[m][0], rtol=1e-13, atol=1e-13)
    assert all(master.tensor.grad is None for master in unit.masters)
    assert module.forwards == (6 if recompute else 3)
    for m in (1, 0, 2):
        stage.backward_weights(m)
    assert module.forwards == (6 if recompute else 3) and stage.num_in_flight == 0
    found = {m.sharding.name: m.tensor.grad for m in unit.masters}
    for i, name in enumerate(trained, start=1):
        parts = [g[i] for g in whole if g[i] is not None]
        expected = sum(parts) if parts else torch.zeros_like(trained[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13, msg=name)
    assert found["frozen.weight"] is None


def test_weights_of_linear_layers_wait_and_others_don_t() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4)).to(FLOAT)
    stage, unit = stage_of(module)
    unit.begin_step(1)
    x = torch.randn(7, 4, dtype=FLOAT)
    stage.forward(0, x, None, None, split=True)
    stage.backward_inputs(0, torch.randn(7, 4, dtype=FLOAT), None, None)
    # x and dy of both layers, weight and bias of the norm: not one tensor of a weight's size.
    shapes = sorted(tuple(t.shape) for t in stage.stashed_tensors())
    assert shapes == sorted([(7, 4), (7, 5), (7, 5), (7, 4), (5,), (5,)])


def test_what_has_no_input_is_left_to_w() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)).to(FLOAT)
    ids, dy = torch.randint(0, 9, (2, 5)), torch.randn(2, 5, 4, dtype=FLOAT)
    expected = torch.autograd.grad(module(ids), list(module.parameters()), dy)
    stage, unit = stage_of(module)
    unit.begin_step(1)
    stage.forward(0, None, None, ids, split=True)
    assert stage.backward_inputs(0, dy, None, ids) is None
    stage.backward_weights(0)
    for master, gradient in zip(unit.masters, expected, strict=True):
        torch.testing.assert_close(master.tensor.grad, gradient, rtol=1e-13, atol=1e-13)


def llama_block() -> tuple[nn.Module, Any, Batch]:
    spec = ModelSpec(vocab_size=17, hidden_size=32, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2)
    model: Any = build_model(spec).to(FLOAT)
    tokens = torch.arange(10).view(1, 10)
    batch = Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])
    return model.blocks[0], model.context(batch, Place()), batch


def test_between_i_and_w_lives_the_stash_alone() -> None:
    module, context, batch = llama_block()
    held = [(p, Sharding.whole(n, tuple(p.shape))) for n, p in module.named_parameters()]
    unit = LocalUnit("block", held, mesh=mesh_at(), compute=FLOAT)
    unit.begin_step(1)
    segment = Segment(name="b", run=lambda x, c, _: module(x, c), units=[unit], deferral=Deferral(module))
    stage = Stage(0, [segment])
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        alias = tensor.detach()
        saved.append(weakref.ref(alias))
        return alias

    x = torch.randn(1, 10, 32, dtype=FLOAT)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        stage.forward(0, x, context, batch, split=True)
    assert any(ref() is not None for ref in saved)
    dy = torch.randn(1, 10, 32, dtype=FLOAT)
    stage.backward_inputs(0, dy, context, batch)
    assert all(ref() is None for ref in saved)
    # q, k, v read one tensor, gate and up another: widths 32 + 32 (o) + 32 + 96 (down) in,
    # 32 + 16 + 16 + 32 + 96 + 96 + 32 out; the gradients of the two norms.
    bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stage.stashed_tensors()}
    assert sum(bytes_of.values()) == 8 * (10 * (192 + 320) + 64)
    stage.backward_weights(0)
    assert not list(stage.stashed_tensors()) and all(m.tensor.grad is not None for m in unit.masters)


def test_a_block_without_deferral_runs_its_whole_backward_in_i() -> None:
    module = nn.Linear(4, 4).to(FLOAT)
    stage, unit = stage_of(module)
    stage.segments[0].deferral = Deferral()
    unit.begin_step(1)
    x = torch.randn(3, 4, dtype=FLOAT)
    stage.forward(0, x, None, None, split=True)
    stage.backward_inputs(0, torch.ones(3, 4, dtype=FLOAT), None, None)
    assert [tuple(t.shape) for t in stage.stashed_tensors()] == [(4, 4), (4,)]
    stage.backward_weights(0)
    torch.testing.assert_close(unit.masters[0].tensor.grad, x.sum(0).expand(4, 4))


def test_rerun_makes_the_graph_before_the_backward() -> None:
    module, calls = nn.Linear(4, 4).to(FLOAT), []
    stage, unit = stage_of(module)
    stage.segments[0].run = lambda x, *_: (calls.append(1), module(x))[1]
    unit.begin_step(1)
    x = torch.randn(3, 4, dtype=FLOAT)
    y = stage.forward_lightly(0, x, None, None)
    assert not tensors_of(y)[0].requires_grad and list(stage.kept_tensors()) == [x]
    stage.rerun(0, None, None)
    assert len(calls) == 2
    stage.backward(0, torch.ones(3, 4, dtype=FLOAT), None, None)
    assert len(calls) == 2
    torch.testing.assert_close(unit.masters[0].tensor.grad, x.sum(0).expand(4, 4))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_a_deferred_gradient_overwrites_or_adds(fresh: bool, wide: bool) -> None:
    x, dy = torch.randn(2, 3, 4, dtype=torch.float32), torch.randn(2, 3, 5, dtype=torch.float32)
    deferred = Deferred(torch.ones(5, 4))
    deferred.use(x, dy)
    deferred.use(x, 2 * dy)
    total = torch.full((5, 4), float("nan") if fresh else 10.0, dtype=FLOAT if wide else torch.float32)
    add_gradient(total, deferred, fresh=fresh)
    expected = 3 * torch.einsum("abo,abi->oi", dy, x) + (1.0 if fresh else 11.0)
    torch.testing.assert_close(total, expected.to(total.dtype), rtol=1e-5, atol=1e-5)
