"""All that one rank needs to train, wired together: mesh, model, schedules, runtimes, step.

This is the only place where rooms that don't know each other meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stretto.assemble.rank_model import Assembler, Precision, RankModel, Reader
from stretto.models.build import build_model
from stretto.parallel.mesh import Mesh, build_mesh
from stretto.parallel.pipeline.channel import PeerChannel
from stretto.parallel.pipeline.runtime import Runtime
from stretto.schedule.families import build as build_schedule
from stretto.schedule.op import Kind
from stretto.schedule.passes.communication import lower
from stretto.schedule.schedule import Schedule
from stretto.schedule.validate import validate
from stretto.spec.check import stages_of
from stretto.spec.contract import Batch, Observer, Silent, Stack
from stretto.spec.model import ModelSpec
from stretto.spec.run import RunSpec
from stretto.trainer.optimizer import build_optimizer
from stretto.trainer.step import StepResult, TrainStep


def schedules_of(run: RunSpec) -> tuple[Schedule, Schedule]:
    """The training schedule of a run and the forward-only one of its evaluation, verified and lowered."""
    plan = run.plan
    training = build_schedule(plan.schedule, ranks=plan.pp, microbatches=run.num_microbatches, chunks=plan.chunks)
    return lowered_and_valid(training), lowered_and_valid(forward_of(training))


def lowered_and_valid(schedule: Schedule) -> Schedule:
    """With messages, and proved right."""
    lowered = lower(schedule)
    validate(lowered)
    return lowered


def forward_of(schedule: Schedule) -> Schedule:
    """The forwards of a schedule alone, in its order and on its ranks: what evaluates the model that it trains."""
    return Schedule.from_orders(
        [[op for op in schedule.ops(rank) if op.kind is Kind.F] for rank in range(schedule.num_ranks)],
        name=f"{schedule.name}, forward only",
        num_stages=schedule.num_stages,
        num_microbatches=schedule.num_microbatches,
        placement=schedule.placement,
        voice=schedule.voice,
        paths=schedule.paths,
        forward_only=True,
    )


def make_stack(model: ModelSpec, seed: int) -> Stack:
    """The structure of the model: without storage, unless it is a foreign one that brings its values."""
    if model.family != "foreign":
        with torch.device("meta"):
            return build_model(model)
    from stretto.models.foreign import load_foreign

    torch.manual_seed(seed)
    return load_foreign(model)


@dataclass(slots=True, kw_only=True)
class Session:
    """One rank, ready to train."""

    run: RunSpec
    device: torch.device
    mesh: Mesh
    model: RankModel
    runtime: Runtime
    evaluation: Runtime
    """Plays the forward-only schedule."""
    optimizer: torch.optim.AdamW
    step: TrainStep

    @classmethod
    def start(
        cls,
        run: RunSpec,
        rank: int,
        *,
        device: torch.device | None = None,
        observer: Observer | None = None,
        reader: Callable[[Stack], Reader] | None = None,
        stack: Stack | None = None,
    ) -> Session:
        """Build everything; collective over the world.

        Args:
            reader: given the model, what reads initial weights from a file; None: random.
            stack: the model, where it isn't the one that ``run.model`` names.
        """
        device = device or torch.device("cpu")
        observer = observer or Silent()
        mesh = build_mesh(run.plan, rank)
        training, evaluation = schedules_of(run)
        stack = stack or make_stack(run.model, run.run.seed)
        precision = Precision.of(run.training.dtype)
        assembler = Assembler(stack, run.plan, mesh, precision=precision, seed=run.run.seed)
        model = assembler.build(
            stages_of(run),
            training.placement,
            num_heads=run.model.num_heads,
            device=device,
            reader=reader(stack) if reader else None,
        )
        pp = mesh.index("pp")
        channel = PeerChannel(mesh, device, [training, evaluation]) if mesh.size("pp") > 1 else None
        runtime = Runtime(model.stages, training, rank=pp, channel=channel, observer=observer)
        optimizer = build_optimizer(model.masters, run.training)
        return cls(
            run=run,
            device=device,
            mesh=mesh,
            model=model,
            runtime=runtime,
            evaluation=Runtime(model.stages, evaluation, rank=pp, channel=channel, observer=observer),
            optimizer=optimizer,
            step=TrainStep(model, runtime, optimizer, training=run.training, seed=run.run.seed, observer=observer),
        )

    def train_step(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """Run optimizer step ``step``, from 1; ``stop`` asks all ranks to stop after it."""
        return self.step.run(step, batches, stop=stop)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Summed loss and valid tokens of one global batch, nothing updated."""
        return self.step.evaluate(self.evaluation, batches)
