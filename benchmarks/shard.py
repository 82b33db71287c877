"""dp_shard over two processes: ZeRO-3 over FSDP2's fully_shard per layer, on the same modules.

    OMP_NUM_THREADS=1 python -m benchmarks.shard

ZeRO-2 and ZeRO-1 are held to the peers that keep parameters whole, for information.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.model import MeanLoss, bare_loop, our_builder, plain_stack, run_of
from benchmarks.pairs import Case, Side
from benchmarks.processes import main
from benchmarks.replicate import ddp
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

PLANS = {zero: PlanSpec(dp_shard=2, zero=zero, micro_batch_size=4) for zero in (1, 2, 3)}


def fsdp2(run: RunSpec, rank: int, *, reshard: bool) -> Side:
    """A bare loop on FSDP2, each block and the rest in a group of its own."""
    module = MeanLoss(plain_stack(run))
    mesh = init_device_mesh("cpu", (run.plan.num_ranks,))
    for block in module.stack.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return bare_loop(run, rank, module, module, average=True)


def sides(zero: int, peer: Callable[[RunSpec, int], Side], rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """What builds both sides."""
    run = run_of(PLANS[zero])
    return our_builder(run, rank), partial(peer, run, rank)


RESHARDING, KEEPING = partial(fsdp2, reshard=True), partial(fsdp2, reshard=False)
DDP = partial(ddp, views=True)
CASES = [
    Case(name="zero 3 : FSDP2", num_ranks=2, make=partial(sides, 3, RESHARDING), wanted=1.0),
    Case(name="zero 2 : FSDP2, no resharding", num_ranks=2, make=partial(sides, 2, KEEPING)),
    Case(name="zero 1 : FSDP2, no resharding", num_ranks=2, make=partial(sides, 1, KEEPING)),
    Case(name="zero 1 : DDP, bucket views", num_ranks=2, make=partial(sides, 1, DDP)),
]

if __name__ == "__main__":
    main("shard", __doc__, CASES)
