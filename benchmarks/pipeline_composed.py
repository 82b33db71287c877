"""Pipelines composed with data parallelism, tried on both sides: does it run, and are the gradients right?

    pipeline x replicate       torch: a stage in DistributedDataParallel     ours: plan.dp_replicate = 2
    split backward x shards    torch: fully_shard on every block, as it      ours: plan.dp_shard = 2, plan.zero = 3
                               comes (resharded after forward)

2 pipeline ranks x 2 data-parallel ranks, a Llama of 4 layers, float32.  Every gradient of one step is held to the
same modules in one process; one is wrong from a relative error of 1e-3 on.  A side that doesn't answer is ended.
"""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn.parallel import DistributedDataParallel

from benchmarks.model import MODEL, MeanLoss, batches_of, plain_stack, run_of
from benchmarks.pipeline import Part
from stretto.models.loss import cross_entropy_sum
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.stages import stages_of
from stretto.trainer.session import Session

WRONG = 1e-3
LIMIT_SECONDS = 90.0
SILENT = timedelta(seconds=30)
REPLICATE, SHARDED = "pipeline x replicate", "split backward x shards"
CHECKS = (REPLICATE, SHARDED)
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    REPLICATE: (("1f1b", "1F1B"), ("interleaved", "Interleaved1F1B"), ("zb-v", "ZBVZeroBubble")),
    SHARDED: (("interleaved", "InterleavedZeroBubble"), ("zb-v", "ZBVZeroBubble"), ("dualpipe-v", "DualPipeV")),
}
"""Our family and torch's schedule, by check; interleaved beside InterleavedZeroBubble has its backward split."""


def run_for(check: str, family: str) -> RunSpec:
    """Our run of a row."""
    axes: dict[str, Any] = {"dp_replicate": 2} if check == REPLICATE else {"dp_shard": 2, "zero": 3}
    if check == SHARDED and family == "interleaved":
        axes["passes"] = ("split-backward",)
    chunks = 1 if family == "1f1b" else 2
    run = run_of(PlanSpec(pp=2, schedule=family, chunks=chunks, micro_batch_size=2, **axes))
    return replace(run, model=replace(MODEL, num_layers=4, hidden_size=64, intermediate_size=96))


def reference(run: RunSpec) -> dict[str, Tensor]:
    """Gradients of the mean loss over the batches of all data-parallel ranks, in one process."""
    stack = plain_stack(run)
    mean_loss = MeanLoss(stack)
    batches = [batch for dp in range(run.plan.dp) for batch in batches_of(run, 1, dp)]
    for batch in batches:
        (mean_loss(batch) / len(batches)).backward()
    return {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}


def ours(check: str, family: str, rank: int) -> dict[str, float]:
    """The error of each gradient of which this rank holds a part."""
    run = run_for(check, family)
    session = Session.start(run, rank)
    session.step.gradients(1, batches_of(run, 1, session.mesh.dp_index))
    truth, errors = reference(run), {}
    for master in session.model.masters:
        assert master.tensor.grad is not None
        for piece in master.pieces("gradient", master.tensor.grad):
            name = piece.name.removeprefix("gradient.")
            window = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))
            errors[name] = max(errors.get(name, 0.0), _error(piece.tensor, truth[name][window], truth[name]))
    return errors


def torch_side(check: str, schedule: str, rank: int) -> dict[str, float]:
    """The same of torch; a gradient that is missing has an infinite error."""
    run = run_for(check, next(family for family, theirs in PAIRS[check] if theirs == schedule))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pp, dp, count = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank(), run.plan.num_stages
    folded = schedule in ("ZBVZeroBubble", "DualPipeV")
    mine = [pp] if count == 2 else [pp, count - 1 - pp if folded else pp + 2]
    parts = {index: Part(run, index) for index in mine}
    wrapped = {index: _wrapped(check, part, mesh) for index, part in parts.items()}
    stages: list[Any] = [
        PipelineStage(module, index, count, torch.device("cpu"), group=mesh["pp"].get_group())
        for index, module in wrapped.items()
    ]
    batches = batches_of(run, 1, dp)
    tokens = sum(batch.labels.numel() for batch in batches)
    kind: Any = get_schedule_class(schedule)
    plays = kind(
        stages if count > 2 else stages[0],
        n_microbatches=len(batches),
        loss_fn=lambda logits, labels: cross_entropy_sum(logits, labels) / tokens,
        scale_grads=False,
    )
    inputs = (torch.cat([b.tokens for b in batches]),) if 0 in mine else ()
    target = {"target": torch.cat([b.labels for b in batches]), "losses": []} if count - 1 in mine else {}
    plays.step(*inputs, **target, return_outputs=False)
    truth = reference(run)
    return {name: error for index in mine for name, error in _errors(run, index, wrapped[index], truth).items()}


def _wrapped(check: str, part: Part, mesh: Any) -> nn.Module:
    if check == REPLICATE:
        return DistributedDataParallel(part, process_group=mesh["dp"].get_group())
    for block in part.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(part, mesh=mesh["dp"])


def _errors(run: RunSpec, index: int, module: nn.Module, truth: Mapping[str, Tensor]) -> dict[str, float]:
    start, errors = sum(stages_of(run)[:index]), {}
    for local, parameter in module.named_parameters():
        words = local.removeprefix("module.").split(".")
        if words[0] == "blocks":
            words[1] = str(int(words[1]) + start)
        name = ".".join(words)
        gradient: Any = parameter.grad
        if gradient is not None and hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        errors[name] = float("inf") if gradient is None else _error(gradient, truth[name], truth[name])
    return errors


def _error(found: Tensor, wanted: Tensor, whole: Tensor) -> float:
    return float((found - wanted).abs().max() / whole.abs().max()) if found.numel() else 0.0


def _work(side: Callable[[int], dict[str, float]], rank: int, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4, timeout=SILENT)
    try:
        answers.put((rank, side(rank)))
    except BaseException as error:
        cause = error.__cause__ or error
        answers.put((rank, f"{type(cause).__name__}: {' '.join(str(cause).split())[:160]}"))
    time.sleep(LIMIT_SECONDS)  # who leaves early would end the others; all are killed together


def outcome(side: Callable[[int], dict[str, float]]) -> str:
    """What a side gives on four ranks, in words."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        workers = [context.Process(target=_work, args=(side, rank, store, answers)) for rank in range(4)]
        for worker in workers:
            worker.start()
        try:
            found = _collect(answers)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
    return _told(found)


def _collect(answers: Any) -> dict[int, dict[str, float] | str]:
    """The answers of all ranks, or those that came in time; a failure ends the waiting."""
    found: dict[int, dict[str, float] | str] = {}
    end = time.monotonic() + LIMIT_SECONDS
    while len(found) < 4:
        try:
            rank, answer = answers.get(timeout=max(0.1, end - time.monotonic()))
        except queue.Empty:
            return found
        found[rank] = answer
        if isinstance(answer, str):
            return found
    return found


def _told(found: Mapping[int, dict[str, float] | str]) -> str:
    for rank, answer in found.items():
        if isinstance(answer, str):
            return f"fails on rank {rank}: {answer}"
    if len(found) < 4:
        return f"ranks {sorted(set(range(4)) - set(found))} don't answer within {LIMIT_SECONDS:.0f} s"
    worst: dict[str, float] = {}
    for answer in found.values():
        assert isinstance(answer, dict)
        for name, error in answer.items():
            worst[name] = max(worst.get(name, 0.0), error)
    missing = sum(error == float("inf") for error in worst.values())
    wrong = sum(error > WRONG for error in worst.values()) - missing
    if not wrong and not missing:
        return f"all {len(worst)} gradients right, within {max(worst.values()):.0e}"
    return f"{wrong} of {len(worst)} gradients wrong, {missing} missing, without a word"


def check(name: str) -> dict[str, Any]:
    """A row: what each side gives, by schedule."""
    found: dict[str, Any] = {"name": name, "ours": {}, "torch": {}}
    for family, schedule in PAIRS[name]:
        found["ours"][family] = outcome(partial(ours, name, family))
        found["torch"][schedule] = outcome(partial(torch_side, name, schedule))
    return found
