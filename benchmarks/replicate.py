"""dp_replicate over two processes, over torch's DistributedDataParallel on the same modules.

    OMP_NUM_THREADS=1 python -m benchmarks.replicate

DDP runs as it comes, and with gradients that are views of its buckets (its own way to save memory).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.nn.parallel import DistributedDataParallel

from benchmarks.model import MeanLoss, bare_loop, our_builder, plain_stack, run_of
from benchmarks.pairs import Case, Side
from benchmarks.processes import main
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec

RUN = run_of(PlanSpec(dp_replicate=2, micro_batch_size=4))


def ddp(run: RunSpec, rank: int, *, views: bool) -> Side:
    """A bare loop on DDP."""
    module = DistributedDataParallel(MeanLoss(plain_stack(run)), gradient_as_bucket_view=views)
    return bare_loop(run, rank, module, module, average=True)


def sides(views: bool, rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """What builds both sides."""
    return our_builder(RUN, rank), partial(ddp, RUN, rank, views=views)


CASES = [
    Case(name="dp_replicate 2 : DDP", num_ranks=2, make=partial(sides, False), wanted=1.03),
    Case(name="dp_replicate 2 : DDP, bucket views", num_ranks=2, make=partial(sides, True), wanted=1.03),
]

if __name__ == "__main__":
    main("replicate", __doc__, CASES)
