"""What a rank holds of the model: its own parts, in its own cut, and no storage for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equivalence.plan_run import batches_of, plain, together
from equivalence.reference import build_reference, global_batch
from ranks import Ranks
from stretto.assemble.rank_model import Precision
from stretto.assemble.split import holders_of_tied, parts_of_stages, ranks_of_parts
from stretto.models.foreign import ForeignStack
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

MODEL = ModelSpec(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=4, num_kv_heads=2, qkv_bias=True
)
TRAINING = TrainingSpec(global_batch_size=4, sequence_length=8, dtype="float64", clip_norm=0.0)
RUN = RunSpec(model=MODEL, training=TRAINING)


def on_rank(rank: int, world: int, run: RunSpec) -> dict[str, Any]:
    session = Session.start(run, rank)
    stack: Any = session.model.stack
    masters = session.model.masters
    return {
        "pieces": plain([p for m in masters for p in m.pieces("model", m.tensor)]),
        "names": {m.sharding.name for m in masters},
        "local": sum(p.numel() for p in stack.parameters()),
        "meta": [n for n, p in stack.named_parameters() if p.is_meta],
        "segments": [s.name for stage in session.model.stages.values() for s in stage.segments],
        "units": [unit.name for unit in session.model.units],
    }


PLANS: list[dict[str, Any]] = [
    {"pp": 2},
    {"tp": 2},
    {"pp": 2, "stages": (1, 3)},
    {"pp": 2, "chunks": 2, "schedule": "interleaved"},
    {"dp_shard": 2, "zero": 3},
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_starts_from_the_same_model(ranks: Ranks, plan: dict[str, Any], tied: bool) -> None:
    run = replace(RUN, model=replace(MODEL, tied_embeddings=tied), plan=PlanSpec(**plan))
    found = ranks.run(on_rank, 2, run)
    reference = dict(build_reference(run, torch.float64).named_parameters())
    values = together([f["pieces"] for f in found])
    assert values.keys() == reference.keys()
    assert all(torch.equal(values[n], p.detach()) for n, p in reference.items())
    assert all(not f["meta"] for f in found)
    if run.plan.pp == 2:
        shared = {"inputs.tokens.weight", "outputs.head.weight"} if tied else set()
        assert not (found[0]["names"] & found[1]["names"]) - shared
        total = sum(p.numel() for p in reference.values()) + tied * MODEL.vocab_size * MODEL.hidden_size
        assert sum(f["local"] for f in found) == total


def test_parts_go_to_the_ranks_of_their_stages(ranks: Ranks) -> None:
    uneven, chunked = (ranks.run(on_rank, 2, replace(RUN, plan=PlanSpec(**plan))) for plan in (PLANS[2], PLANS[3]))
    assert [f["segments"] for f in uneven] == [
        ["inputs", "blocks.0"],
        ["blocks.1", "blocks.2", "blocks.3", "outputs"],
    ]
    assert [f["segments"] for f in chunked] == [["inputs", "blocks.0", "blocks.2"], ["blocks.1", "blocks.3", "outputs"]]


def test_types_of_a_run() -> None:
    found = {name: Precision.of(name) for name in ("float64", "float32", "bfloat16")}
    assert {n: (p.compute, p.main) for n, p in found.items()} == {
        "float64": (torch.float64, torch.float64),
        "float32": (torch.float32, torch.float32),
        "bfloat16": (torch.bfloat16, torch.float32),
    }


class Scaled(nn.Module):
    """A layer with a transposed weight, a frozen one and one that is never used."""

    def __init__(self, shared: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8).t())
        self.frozen = nn.Parameter(torch.randn(8, 16), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, 3))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(x @ self.frozen.t()) @ self.weight
        return x if self.shared is None else x @ self.shared


def odd_stack(*, frozen_embedding: bool = False, shared: bool = False, tied: bool = False) -> ForeignStack:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.eye(16)) if shared else None
    embed = nn.Embedding(61, 16)
    embed.weight.requires_grad_(not frozen_embedding)
    blocks = [Scaled(weight) for _ in range(3)]
    head = nn.Linear(16, 61)
    if tied:
        head.weight = embed.weight
    return ForeignStack(embed=embed, blocks=blocks, head=head, tensor_rules={})


def odd_on_rank(rank: int, world: int, run: RunSpec, steps: int, options: dict[str, bool]) -> dict[str, Any]:
    session = Session.start(run, rank, stack=odd_stack(**options).to(torch.float64))  # type: ignore[arg-type]
    results = [
        session.train_step(step, batches_of(run, step, session.mesh.dp_index, documents=False))
        for step in range(1, steps + 1)
    ]
    masters = session.model.masters
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "updates": session.step.updates,
        "pieces": plain([p for m in masters for p in m.pieces("model", m.tensor)]),
    }


FOREIGN = replace(RUN, model=replace(MODEL, family="foreign", module="nowhere:odd", num_layers=3))


OPTIONS: list[dict[str, bool]] = [
    {},
    {"frozen_embedding": True},
    {"frozen_embedding": True, "tied": True},
    {"shared": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "plan",
    [
        {"pp": 2},
        {"dp_replicate": 2},
        {"dp_shard": 2, "zero": 2},
        *({"dp_replicate": 2, "dp_shard": 2, "zero": zero} for zero in (1, 2, 3)),
        {"pp": 2, "dp_replicate": 2},
    ],
    ids=str,
)
def test_frozen_unused_transposed_and_shared_parameters(
    ranks: Ranks, plan: dict[str, Any], options: dict[str, bool]
) -> None:
    (expected,) = ranks.run(odd_on_rank, 1, FOREIGN, 3, options)
    run = replace(FOREIGN, plan=PlanSpec(**plan))
    found = ranks.run(odd_on_rank, run.plan.num_ranks, run, 3, options)
    for mine in found:
        assert mine["losses"] == pytest.approx(expected["losses"], rel=1e-10)
        assert mine["norms"] == pytest.approx(expected["norms"], rel=1e-10)
        assert mine["updates"] == 3
    values, reference = together([f["pieces"] for f in found]), together([expected["pieces"]])
    assert values.keys() == reference.keys()
    for name in values:
        torch.testing.assert_close(values[name], reference[name], rtol=1e-9, atol=1e-12, msg=name)
    start = dict(odd_stack(**options).named_parameters())
    moved = {n for n, p in start.items() if not torch.equal(p.detach().double(), values[n])}
    assert moved == {n for n, p in start.items() if p.requires_grad}


def test_one_rank_equals_plain_torch(ranks: Ranks) -> None:
    (found,) = ranks.run(odd_on_rank, 1, FOREIGN, 3, {})
    stack: Any = odd_stack().to(torch.float64)
    named = dict(stack.named_parameters())
    groups = [
        {"params": [p for p in named.values() if (p.ndim >= 2) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95))
    for step in (1, 2, 3):
        batch = global_batch(FOREIGN, step, documents=False)
        x = stack.inputs(batch, batch)
        for block in stack.blocks:
            x = block(x, batch)
        optimizer.zero_grad()
        (stack.loss(stack.outputs(x, batch), batch) / (batch.labels >= 0).sum()).backward()
        for block in stack.blocks:  # zeros, so that torch decays what nobody used, as we do under every plan
            block.module.unused.grad = torch.zeros(3, 3, dtype=torch.float64)
        optimizer.step()
    for name, value in together([found["pieces"]]).items():
        torch.testing.assert_close(value, named[name].detach(), rtol=1e-9, atol=1e-12, msg=name)


def test_a_tie_between_any_ranks_is_a_unit_of_its_own() -> None:
    run = replace(FOREIGN, plan=PlanSpec(pp=1))
    session = Session.start(run, 0, stack=odd_stack(shared=True).to(torch.float64))  # type: ignore[arg-type]
    assert len(session.model.units) == 5 + 1  # three blocks, both ends, and what the blocks share
    held = ranks_of_parts([(0, 1, 2)], parts_of_stages([1, 1, 1]))
    (original,) = set(session.model.stack.tied.values())
    assert holders_of_tied(session.model.stack.tied, held) == {original: (0, 1, 2)}
