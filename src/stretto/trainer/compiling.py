"""Compiling before the first step: what it needs is looked for by the launcher, and all ranks do it at once.

Left to the first step, each rank would compile when its first forward comes, which the rank before it has to send: R
ranks one after the other, twice (forward and backward), and all the while nobody else moves, which looks like a hang.
So each rank runs its compiled parts once for nothing, when it is built and before it meets the others in a step; the
phase is called COMPILE, and may take ten times ``run.hang_seconds`` (resilience/judge.py).

Parts of a foreign model are not rehearsed, because what travels between them is theirs to say; they are compiled in
the first step.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind
from stretto.spec.errors import ConfigError
from stretto.spec.run import RunSpec

if TYPE_CHECKING:
    from stretto.spec.contract import Batch
    from stretto.trainer.session import Session

EAGER = 'set plan.compile_backend = "aot_eager" (the same graphs, no faster than uncompiled) or plan.compile = "none"'


def check_compiler(run: RunSpec, *, cuda: bool, environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError where the plan compiles to kernels, and what makes them isn't on this machine.

    ``cuda``: whether the ranks compute on CUDA devices, whose kernels Triton makes; else a C++ compiler makes them.
    """
    if run.plan.compile == "none" or run.plan.compile_backend != "inductor":
        return
    told = f'plan.compile = "{run.plan.compile}" makes kernels'
    if cuda:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(f"{told} by Triton, which isn't installed here; install it, or {EAGER}.")
        return
    compiler = environment.get("CXX", "g++")
    if shutil.which(compiler, path=environment.get("PATH")) is None:
        raise ConfigError(
            f"{told} by a C++ compiler, and there is no {compiler} on this machine (CXX names another one); "
            f"install it, or {EAGER}."
        )


def rehearse(session: Session, batches: Sequence[Batch]) -> None:
    """Run what is compiled on this rank as a step and an evaluation will; nothing is changed by it.

    Collective over the ranks that share this rank's layers, like a step.  ``batches``: those of any step.
    """
    import torch

    from stretto.assemble.rank_model import Precision

    run, model = session.run, session.model
    if run.plan.compile == "none" or run.model.family == "foreign":
        return
    batch = model.share(batches)[0]
    context = model.context(batch, seed=run.run.seed, step=0, training=True)
    without_graph = [context] if (session.schedule.kind == Kind.R).any() else []
    if run.training.eval_every:
        without_graph.append(model.context(batch, seed=run.run.seed, step=0, training=False))
    rows, length = batch.tokens.shape
    shape = (rows, length // run.plan.tp, run.model.hidden_size)
    x = torch.zeros(shape, dtype=Precision.of(run.training.dtype).compute, device=session.device)
    for segment in (segment for number in sorted(model.stages) for segment in model.stages[number].segments):
        if segment.compiled == "none":
            continue
        segment.rehearse(x, context, batch)
        for shared in without_graph:
            with torch.no_grad():
                segment.evaluate(x, shared, batch)
            segment.reshard()
