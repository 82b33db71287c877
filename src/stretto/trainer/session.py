"""All that one rank needs to train, wired together: mesh, model, schedules, runtimes, step.

This is the only place where rooms that don't know each other meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stretto.assemble.documents import DocumentCut
from stretto.assemble.rank_model import Assembler, Precision, RankModel, Reader
from stretto.parallel.mesh import Mesh, build_mesh
from stretto.parallel.offload.offloader import Offloader
from stretto.parallel.pipeline.channel import Channel, PeerChannel
from stretto.parallel.pipeline.device import device_for
from stretto.parallel.pipeline.relay import Relay
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.selective import SelectiveStage
from stretto.parallel.pipeline.vocabulary.passes import Vocabulary
from stretto.resilience.recorder import Recorder
from stretto.schedule.op import Kind
from stretto.schedule.passes.asynchronous import delays
from stretto.schedule.schedule import Schedule
from stretto.spec.check import stages_of
from stretto.spec.contract import Batch, Observer, Silent, Stack
from stretto.spec.front import front_layers
from stretto.spec.run import RunSpec
from stretto.trainer.ahead import front_of
from stretto.trainer.asynchronous import AsynchronousStep, DelayedWeights
from stretto.trainer.elastic import Elastic
from stretto.trainer.filling import Filling, land, last_and_first
from stretto.trainer.freezing import spare, trained_parts
from stretto.trainer.host_memory import limit_host_memory
from stretto.trainer.optimizer import build_optimizer
from stretto.trainer.post_validation import PostValidation
from stretto.trainer.recording import Metered, waited_in
from stretto.trainer.schedules import schedules_of
from stretto.trainer.step import StepResult, TrainStep
from stretto.trainer.structure import make_stack
from stretto.trainer.world import collective_limit


def _assembled(
    run: RunSpec,
    stack: Stack,
    mesh: Mesh,
    schedule: Schedule,
    *,
    device: torch.device,
    reader: Callable[[Stack], Reader] | None,
) -> RankModel:
    """What this rank holds of the model."""
    precision = Precision.of(run.training.dtype)
    front = front_of(run)
    ahead = front_layers(run) if front else None
    model = Assembler(stack, run.plan, mesh, precision=precision, seed=run.run.seed, front=ahead).build(
        stages_of(run),
        schedule.placement,
        num_heads=run.model.num_heads,
        device=device,
        reader=reader(stack) if reader else None,
        vocabulary=bool((schedule.kind == Kind.S).any()),
    )
    if front is not None:
        land(model, schedule, front)
    if run.plan.context_groups == "dynamic":
        model.documents = DocumentCut.of(run, mesh)
        if run.plan.offload:
            offloader = Offloader(())
            model.stages = {
                number: SelectiveStage(number, stage.segments, offloader) for number, stage in model.stages.items()
            }
    return model


def _channel(mesh: Mesh, device: torch.device, schedules: Sequence[Schedule], observer: Observer) -> Channel | None:
    """What carries messages between pipeline ranks, weighed where somebody records; None where there are none."""
    if mesh.size("pp") == 1:
        return None
    channel = PeerChannel(mesh, device, schedules)
    return Metered(channel, observer) if isinstance(observer, Recorder) else channel


def _delayed(
    run: RunSpec, model: RankModel, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> DelayedWeights | None:
    """The weights of every age, where every micro-batch updates."""
    if run.plan.asynchronous == "none":
        return None
    delay = max(delays(schedule, model.mesh.index("pp")))
    return DelayedWeights(model, optimizer, method=run.plan.asynchronous, delay=delay)


def _filling(
    model: RankModel, filled: Runtime, ends: Sequence[Runtime], *, run: RunSpec, observer: Observer
) -> Filling | None:
    """What plays steps whose frozen front is computed ahead, where there are such; ``ends``: last and first."""
    if not ends:
        return None
    last, first = ends
    return Filling(model, filled=filled, last=last, first=first, seed=run.run.seed, observer=observer)


@dataclass(slots=True, kw_only=True)
class Session:
    """One rank, ready to train."""

    run: RunSpec
    device: torch.device
    mesh: Mesh
    model: RankModel
    schedule: Schedule
    """What a training step plays."""
    runtime: Runtime
    evaluation: Runtime
    """Plays the forward-only schedule."""
    optimizer: torch.optim.Optimizer
    step: TrainStep
    unbarred: PostValidation | None = None
    """Runs the steps where the plan has no barrier at the update."""
    asynchronous: AsynchronousStep | None = None
    """Runs the steps where every micro-batch updates."""
    filling: Filling | None = None
    """Plays the steps where a frozen front is computed a step ahead."""

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
        mesh = build_mesh(run.plan, rank, limit=collective_limit(run))
        training, evaluation = schedules_of(run)
        stack = stack or make_stack(run)
        trained = trained_parts(stack)
        model = _assembled(run, stack, mesh, training, device=device, reader=reader)
        if isinstance(observer, Recorder) and run.plan.context_groups == "dynamic":
            observer.waited = waited_in(stack)
        vocabulary = Vocabulary.join(model.shard, mesh, device) if model.shard is not None else None
        pp = mesh.index("pp")
        ends = last_and_first(run, training)
        channel = _channel(mesh, device, [training, evaluation, *ends], observer)
        optimizer = build_optimizer(model.masters, run.training)
        delayed = _delayed(run, model, optimizer, training)
        make = partial(Elastic, run=run) if run.plan.context_groups == "dynamic" else Runtime
        seat = Seat(rank=pp, channel=channel, observer=observer, device=device_for(device), vocabulary=vocabulary)
        play = partial(make, model.stages, seat=seat)
        runtime = play(training)
        limit_host_memory(runtime, run)
        rows = model.shard is not None and model.shard.table.trains
        spare(model.stages, ends[0] if ends else training, trained, rows=rows)
        filling = _filling(model, runtime, [play(end) for end in ends], run=run, observer=observer)
        plays = filling or runtime
        step = TrainStep(model, plays, optimizer, training=run.training, seed=run.run.seed, observer=observer)
        unbarred = mesh.size("pp") > 1 and not run.plan.optimizer_barrier
        return cls(
            run=run,
            device=device,
            mesh=mesh,
            model=model,
            schedule=training,
            runtime=runtime,
            evaluation=play(evaluation),
            optimizer=optimizer,
            step=step,
            unbarred=PostValidation(step, Relay(mesh)) if unbarred else None,
            asynchronous=AsynchronousStep(step, delayed) if delayed else None,
            filling=filling,
        )

    def train_step(
        self, step: int, batches: Sequence[Batch], *, stop: bool = False, ahead: Sequence[Batch] = ()
    ) -> StepResult:
        """Run optimizer step ``step``, from 1, to its very end; ``stop`` asks all ranks to stop after it.

        ``ahead``: see ``advance``.
        """
        return [*self.advance(step, batches, stop=stop, ahead=ahead), *self.settle()][-1]

    def advance(
        self, step: int, batches: Sequence[Batch], *, stop: bool = False, ahead: Sequence[Batch] = ()
    ) -> list[StepResult]:
        """Run step ``step``; returns the steps that this finished, in order.

        Without a barrier at the update a step is finished by the next one, or by ``settle``; until then neither its
        figures nor the weights are certain.  ``ahead``: micro-batches of the next step, none behind the last one; asked
        for only where ``filling`` computes part of them now.
        """
        if self.filling is not None:
            self.filling.expect(step, ahead)
        if self.unbarred is not None:
            return self.unbarred.advance(step, batches, stop=stop)
        if self.asynchronous is not None:
            return [self.asynchronous.run(step, batches, stop=stop)]
        return [self.step.run(step, batches, stop=stop)]

    @property
    def played_as_scheduled(self) -> bool:
        """Whether the last step played ``schedule``, as all but the ends of a run do."""
        return self.filling is None or self.filling.as_scheduled

    def settle(self) -> list[StepResult]:
        """Finish the step that isn't, if there is one: before weights are saved, evaluated or read."""
        return [] if self.unbarred is None else self.unbarred.settle()

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Summed loss and valid tokens of one global batch, nothing updated."""
        return self.step.evaluate(self.evaluation, batches)
