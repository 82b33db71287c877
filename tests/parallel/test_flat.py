"""FlatUnit under zero 0 to 3, dp_replicate and independent factors: sums, what is kept, what is sent.

The unit holds a weight, a frozen tensor, a parameter that is never used and a bias: 5x3 + 2x2 + 3 + 4 = 26
elements, which neither 4 nor 3 ranks divide, so the last rank holds padding.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equivalence.plan_run import plain, together
from parallel.test_master import mesh_at
from ranks import Ranks
from stretto.parallel import flat
from stretto.parallel.collectives import Pending
from stretto.parallel.flat import MAX_REDUCING, FlatUnit, ReduceQueue
from stretto.parallel.mesh import GROUPED, build_mesh
from stretto.parallel.pipeline.segment import Segment
from stretto.parallel.unit import settle_all
from stretto.spec.plan import PlanSpec
from stretto.spec.sharding import Sharding, cut
from stretto.spec.states import of_plan

SHAPES = {"weight": (5, 3), "frozen": (2, 2), "unused": (3,), "bias": (4,)}
PLANS = [
    PlanSpec(dp_replicate=4),
    *[PlanSpec(dp_shard=4, zero=zero) for zero in (1, 2, 3)],  # type: ignore[arg-type]
    *[PlanSpec(dp_replicate=2, dp_shard=2, zero=zero) for zero in (1, 2, 3)],  # type: ignore[arg-type]
    *[PlanSpec(dp_replicate=2, dp_shard=2, zero=zero, shard_optimizer=4) for zero in (2, 3)],  # type: ignore[arg-type]
    PlanSpec(dp_shard=4, shard_parameters=2, shard_gradients=4),
    PlanSpec(dp_shard=4, shard_gradients=2),
]


def value_of(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def gradient_of(name: str, rank: int, number: int) -> Tensor | None:
    """Whole numbers, so that every order of summation gives the same bits."""
    if name == "unused" or (name == "bias" and number == 1):
        return None
    return torch.arange(value_of(name).numel(), dtype=torch.float64).view(SHAPES[name]) * (rank + 1) + number


def make(
    plan: PlanSpec, rank: int, compute: torch.dtype, main: torch.dtype
) -> tuple[FlatUnit, dict[str, nn.Parameter]]:
    parameters = {n: nn.Parameter(value_of(n).to(main), requires_grad=n != "frozen") for n in SHAPES}
    held = [(p, Sharding.whole(n, SHAPES[n])) for n, p in parameters.items()]
    mesh = build_mesh(plan, rank)
    return FlatUnit("u", held, mesh=mesh, compute=compute, queue=ReduceQueue()), parameters


def held_bytes(parameters: dict[str, nn.Parameter]) -> int:
    return parameters["weight"].untyped_storage().nbytes()


def counted(call: Any, sent: list[float]) -> Any:
    """A collective that notes the bytes a rank sends in it; an all-reduce is a reduce-scatter and an all-gather."""

    def wrapped(tensor: Tensor, *rest: Any) -> Pending:
        group = rest[-1]
        if group is not None:
            ranks, bytes_of_one = dist.get_world_size(group), tensor.numel() * tensor.element_size()
            shares = {"reduce_scatter": (ranks - 1) / ranks, "all_gather": ranks - 1, "all_reduce": 2 - 2 / ranks}
            sent[0] += bytes_of_one * shares[call.__name__]
        return call(tensor, *rest)  # type: ignore[no-any-return]

    return wrapped


def on_rank(rank: int, world: int, plan: PlanSpec) -> dict[str, Any]:
    sent = [0.0]
    with ExitStack() as stack:
        for call in (flat.reduce_scatter, flat.all_gather, flat.all_reduce):
            stack.enter_context(patch.object(flat, call.__name__, counted(call, sent)))
        return {**steps_on_rank(rank, plan), "sent": sent[0]}


def steps_on_rank(rank: int, plan: PlanSpec) -> dict[str, Any]:
    unit, parameters = make(plan, rank, torch.float64, torch.float64)
    resharded = [held_bytes(parameters)]
    unit.unshard()
    unit.ready()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.detach(), value_of(name))
    unit.reshard()
    resharded.append(held_bytes(parameters))
    names = [next(n for n in SHAPES if parameters[n] is p) for p in unit.parameters]
    for _ in range(2):  # the second step must not see the first one's gradients
        unit.begin_step(3)
        for number in range(3):
            unit.add_gradients([gradient_of(n, rank, number) for n in names])
        settle_all([unit])
    gradients = plain([p for m in unit.masters if m.tensor.grad is not None for p in m.pieces("g", m.tensor.grad)])
    with torch.no_grad():
        for master in unit.masters:
            master.tensor.add_(1.0)
    unit.publish()
    unit.unshard()
    unit.ready()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.detach(), value_of(name) + 1), name
    unit.reshard()
    masters = plain([p for m in unit.masters for p in m.pieces("m", m.tensor)])
    kept = [bytes_of(unit)]
    unit.begin_step(3)
    kept.append(bytes_of(unit))
    return {
        "resharded": resharded,
        "gradients": gradients,
        "masters": masters,
        "kept": kept,
        "passing": unit.passing_bytes(),
    }


def bytes_of(unit: FlatUnit) -> int:
    """Each storage once."""
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in unit.buffers()}
    return sum(kept.values())


def name_of(plan: PlanSpec) -> str:
    states = of_plan(plan)
    return f"{plan.num_ranks}-ranks-{states.parameters}-{states.gradients}-{states.optimizer}"


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_sums_and_what_is_kept(ranks: Ranks, plan: PlanSpec) -> None:
    found = ranks.run(on_rank, 4, plan)
    gradients = together([f["gradients"] for f in found])
    assert gradients.keys() == {"weight", "unused", "bias"}
    for name, gradient in gradients.items():
        parts = [gradient_of(name, rank, number) for rank in range(4) for number in range(3)]
        expected = sum((p for p in parts if p is not None), torch.zeros(SHAPES[name], dtype=torch.float64))
        assert torch.equal(gradient, expected), name
    masters = together([f["masters"] for f in found])
    assert masters.keys() == SHAPES.keys()
    assert all(torch.equal(masters[n], value_of(n) + 1) for n in SHAPES)
    states = of_plan(plan)
    width = 8 * -(-26 // states.optimizer)
    parts = [width * states.optimizer // factor for factor in (states.parameters, states.gradients)]
    # Masters are a view of the parameters; gradients are gone when the next step begins.
    for mine in found:
        assert mine["kept"] == [parts[0] + width, parts[0]]
        assert mine["passing"] == (parts[1] if states.optimizer > states.gradients else 0)
        assert mine["resharded"] == ([0, 0] if states.parameters > 1 else [width * states.optimizer] * 2)
        assert mine["sent"] == sent_bytes(plan, width * states.optimizer)


def sent_bytes(plan: PlanSpec, whole: int) -> float:
    """Of two steps of three backwards each, one update and two gatherings, in closed form."""
    states, ranks = of_plan(plan), plan.num_ranks
    p, g, o = states.parameters, states.gradients, states.optimizer
    each = whole * (1 - 1 / g) if g > 1 else 0.0
    once = whole / g * (1 - g / o) + 2 * whole / o * (1 - o / ranks)
    return 2 * (3 * each + once) + 2 * whole * (1 - 1 / p) + whole / p * (1 - p / o)


def narrow_on_rank(rank: int, world: int, plan: PlanSpec) -> Any:
    unit, parameters = make(plan, rank, torch.bfloat16, torch.float32)
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert all(m.tensor.dtype == torch.float32 for m in unit.masters)
    names = [next(n for n in SHAPES if parameters[n] is p) for p in unit.parameters]
    unit.begin_step(257)
    for number in range(257):
        value = (1.0 if number == 0 else 2.0**-9) if rank == 0 else 2.0**-20
        unit.add_gradients([torch.full(SHAPES[n], value, dtype=torch.bfloat16) for n in names])
    settle_all([unit])
    gradients = plain([p for m in unit.masters if m.tensor.grad is not None for p in m.pieces("g", m.tensor.grad)])
    unit.publish()
    unit.unshard()
    unit.ready()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.detach(), value_of(name).float().bfloat16())
    masters = plain([p for m in unit.masters for p in m.pieces("m", m.tensor)])
    return gradients, masters


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bfloat16_sums_and_reduces_in_float32(ranks: Ranks, zero: int) -> None:
    plan = PlanSpec(dp_shard=2, zero=zero) if zero else PlanSpec(dp_replicate=2)  # type: ignore[arg-type]
    found = ranks.run(narrow_on_rank, 2, plan)
    expected = 1.5 + 257 * 2.0**-20  # exact in float32, 1.0 where anything is summed in bfloat16
    for gradient in together([f[0] for f in found]).values():
        assert gradient.dtype == torch.float32 and bool((gradient == expected).all())
    for name, master in together([f[1] for f in found]).items():
        assert torch.equal(master, value_of(name).float())


def differentiate_on_rank(rank: int, world: int, zero: int, recompute: bool) -> tuple[Tensor, Tensor]:
    """Forward, reshard, backward of a chain in which the saved weight is given up in between."""
    unit, parameters = make(PlanSpec(dp_shard=2, zero=zero), rank, torch.float64, torch.float64)  # type: ignore[arg-type]
    w, b = parameters["weight"], parameters["bias"]

    def run(x: Tensor, context: Any, batch: Any) -> Tensor:
        return torch.tanh(x @ w.t()) @ w * b[:3].exp() + parameters["frozen"].sum()

    segment = Segment(name="s", run=run, units=[unit], recompute=recompute)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    unit.begin_step(2)
    in_flight = []
    for _ in range(2):  # two in flight: the storage is emptied and filled again under both graphs
        in_flight.append(segment.forward(x, None, None)[0])
        segment.reshard()
    for kept in in_flight:
        dx = segment.backward(kept, torch.ones_like(x), None, None)
        segment.reshard()
    settle_all([unit])
    assert isinstance(dx, Tensor)
    return dx, plain([p for m in unit.masters if m.tensor.grad is not None for p in m.pieces("g", m.tensor.grad)])  # type: ignore[return-value]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_autograd_does_not_notice_resharding(ranks: Ranks, zero: int, recompute: bool) -> None:
    found = ranks.run(differentiate_on_rank, 2, zero, recompute)
    w, b = value_of("weight").requires_grad_(), value_of("bias").requires_grad_()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    y = torch.tanh(x @ w.t()) @ w * b[:3].exp() + value_of("frozen").sum()
    dx, dw, db = torch.autograd.grad(y.sum(), [x, w, b])
    gradients = together([f[1] for f in found])  # type: ignore[misc]
    for mine, expected in ((found[0][0], dx), (gradients["weight"] / 4, dw), (gradients["bias"] / 4, db)):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)


class Slow:
    """A reduction that counts how many like it are under way."""

    def __init__(self, alive: list[int]) -> None:
        self._alive = alive
        alive.append(id(self))

    def wait(self) -> None:
        self._alive.remove(id(self))


def test_the_queue_bounds_what_is_under_way_and_loses_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    queue = ReduceQueue()
    # Two shards that were never reduced with anybody: the queue alone is under test.
    mesh = mesh_at(gradients=(0, 2))
    mesh.groups.update(dict.fromkeys(GROUPED))
    unit = FlatUnit("u", [(parameter, Sharding.whole("p", (4,)))], mesh=mesh, compute=torch.float32, queue=queue)
    unit.begin_step(5)
    alive: list[int] = []
    pendings = []
    for number in range(5):
        pendings.append(Slow(alive))
        queue.push(unit, Pending(pendings[-1]), torch.full((2,), 10.0**number))  # type: ignore[arg-type]
        assert len(alive) == min(number + 1, MAX_REDUCING)
        assert alive == [id(p) for p in pendings[-len(alive) :]]
    queue.drain()
    (master,) = unit.masters
    assert not alive and master.tensor.grad is not None and master.tensor.grad.tolist() == [11111.0] * 2


def partial_on_rank(rank: int, world: int, zero: int) -> Any:
    """tp 2 x dp_shard 2: a split weight and a norm held whole, whose gradients are partial over tp."""
    plan = PlanSpec(tp=2, dp_shard=2, zero=zero)  # type: ignore[arg-type]
    mesh = build_mesh(plan, rank)
    split = cut("w", (4, 3), dim=0, parts=2, index=mesh.index("tp"))
    held = [(nn.Parameter(torch.zeros(2, 3)), split), (nn.Parameter(torch.zeros(5)), Sharding.whole("norm", (5,)))]
    unit = FlatUnit("u", held, mesh=mesh, compute=torch.float32, queue=ReduceQueue())
    unit.begin_step(1)
    by_shape = {(2, 3): torch.full((2, 3), 10.0 ** mesh.index("dp_shard")), (5,): torch.full((5,), 10.0**rank)}
    unit.add_gradients([by_shape[tuple(p.shape)] for p in unit.parameters])
    settle_all([unit])
    return plain([p for m in unit.masters if m.tensor.grad is not None for p in m.pieces("g", m.tensor.grad)])


@pytest.mark.parametrize("zero", [1, 3])
def test_what_tp_ranks_hold_whole_is_summed_over_them_and_the_rest_is_not(ranks: Ranks, zero: int) -> None:
    gradients = together(ranks.run(partial_on_rank, 4, zero))
    assert bool((gradients["norm"] == 1111.0).all()) and bool((gradients["w"] == 11.0).all())
