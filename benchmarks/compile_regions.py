"""What torch.compile brings: pieces between linear layers, or whole layers, over nothing compiled.

    OMP_NUM_THREADS=1 python -m benchmarks.compile_regions

One process, then four (pp 4) under a schedule that doesn't split backwards and one that does.  Kernels are inductor's,
so a C++ compiler is needed.  Memory is what the forwards keep at the peak of a step (activations and stashes) of the
fullest rank, as ``memory_bytes`` counts them; compiling isn't timed, but said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.model import batches_of, ours, run_of
from benchmarks.pairs import Case, Side
from benchmarks.processes import main
from stretto.spec.plan import Compile, PlanSpec
from stretto.spec.run import RunSpec
from stretto.trainer.compiling import rehearse
from stretto.trainer.memory import ActivationMeter
from stretto.trainer.session import Session

PLANS = {
    "one rank": PlanSpec(micro_batch_size=4),
    "one rank, split": PlanSpec(micro_batch_size=4, schedule="zb-h1"),
    "1f1b": PlanSpec(pp=4, micro_batch_size=2),
    "zb-h1": PlanSpec(pp=4, micro_batch_size=2, schedule="zb-h1"),
}


@dataclass(frozen=True, slots=True)
class Build:
    """Builds a side: what a plan trains, compiled before it is timed."""

    run: RunSpec
    rank: int

    def __call__(self) -> Side:
        """A side that is ready for its first step."""
        return ours(self.run, self.rank)


def kept(build: Callable[[], Side]) -> dict[str, float]:
    """Bytes that the forwards of a step keep for its backwards, at the peak, of the fullest rank."""
    assert isinstance(build, Build)
    session = Session.start(build.run, build.rank)
    batches = batches_of(build.run, 1, session.mesh.dp_index)
    start = time.perf_counter()
    rehearse(session, batches)
    if build.rank == 0 and build.run.plan.compile != "none":
        print(f"{build.run.plan.compile}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    meter = ActivationMeter(session)
    with meter.watch():
        session.train_step(1, batches)
    most = torch.tensor(float(meter.peak_bytes), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return {"peak": float(most)}


def sides(plan: PlanSpec, how: Compile, rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """Compiled, and not."""
    torch.compiler.reset()  # what another row compiled of the same lines would be found again
    run = run_of(plan)
    return Build(replace(run, plan=replace(plan, compile=how)), rank), Build(run, rank)


HOWS: tuple[Compile, ...] = ("regions", "blocks")
CASES = [
    Case(
        name=f"{name}: {how} : not compiled",
        num_ranks=plan.num_ranks,
        make=partial(sides, plan, how),
        count=kept,
    )
    for name, plan in PLANS.items()
    for how in HOWS
]

if __name__ == "__main__":
    main("compile_regions", __doc__, CASES)
