"""The training loop of one rank: data in, steps, metrics, evaluation, checkpoints out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from stretto.data import ClipLoader, Loader, Share
from stretto.parallel.collectives import all_reduce
from stretto.planner.flops import mfu
from stretto.resilience.phase import during
from stretto.schedule.document import to_json
from stretto.spec.contract import Observer, Stack
from stretto.spec.run import RunSpec
from stretto.trainer.compiling import rehearse
from stretto.trainer.corpus import make_loader, prepare_corpus
from stretto.trainer.document_steps import foresee
from stretto.trainer.fitting import find_checkpoint
from stretto.trainer.hooks import QUIET, Hooks
from stretto.trainer.host_memory import host_bytes
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.metrics import Board, MetricsFile, step_line
from stretto.trainer.placement import device_of
from stretto.trainer.prediction import FirstSteps
from stretto.trainer.rate import learning_rate
from stretto.trainer.recording import recorder_of
from stretto.trainer.resume import resume_session, save_session
from stretto.trainer.session import Session
from stretto.trainer.step import StepResult

if TYPE_CHECKING:
    from stretto.assemble.rank_model import Reader
    from stretto.trainer.world import World


def weights_reader(run: RunSpec) -> Callable[[Stack], Reader] | None:
    """What reads initial weights, if the run starts from a Hugging Face directory."""
    if run.model.weights == "random" or run.model.family == "foreign":
        return None
    from stretto.checkpoint.safetensors import HuggingFaceReader

    reader = HuggingFaceReader(run.model.weights, run.model)
    return lambda stack: reader.read


def train_rank(run: RunSpec, world: World, hooks: Hooks = QUIET) -> dict[str, Any]:
    """Train ``run`` as one of the ranks of ``world``; torch.distributed is up if there are several.

    Returns the last step's record, with ``stopped`` True where the run was asked to stop before its end.
    """
    loop = Loop(run, world, hooks)
    try:
        return loop.run()
    finally:
        loop.close()


class Loop:
    """State of the loop of one rank."""

    def __init__(self, run: RunSpec, world: World, hooks: Hooks) -> None:
        self._run, self._world, self._hooks = run, world, hooks
        with during(hooks.observer, "DATA"):
            self._corpus = prepare_corpus(run)
        device = device_of(run, world.local_rank)
        self._recorder = recorder_of(run, world, hooks.observer, device=device.type)
        self._observer: Observer = self._recorder or hooks.observer
        with during(hooks.observer, "BUILD"):
            self._session = Session.start(
                run,
                world.rank,
                device=device,
                observer=self._observer,
                reader=weights_reader(run),
            )
        mesh = self._session.mesh
        hooks.pipeline([mesh.pipeline_rank(position) for position in range(mesh.size("pp"))])
        self._train = self._loader("train")
        self._held_out = self._loader("validation") if run.training.eval_every else None
        self._early: dict[int, list[Any]] = {}  # micro-batches that were read before their step
        self._tokens_seen = 0
        self._done = 0
        self._saved = 0
        self._memory: int | None = None
        self._host: int | None = None
        self._resume()
        if run.plan.compile != "none" and self._done < run.training.steps:
            with during(hooks.observer, "COMPILE"):
                rehearse(self._session, self._train.step(self._done + 1))
        self._last: dict[str, Any] = {"step": self._done}
        self._stopped = False
        self._seconds: dict[int, float] = {}  # of steps that have no record yet
        lead = world.rank == 0
        if self._recorder is not None and lead:
            self._recorder.schedule = to_json(self._session.schedule)
        folder = Path(run.run.dir)
        self._metrics = MetricsFile(folder / "metrics.jsonl", after=self._done) if lead else None
        self._evals = MetricsFile(folder / "eval.jsonl", after=self._done) if lead else None
        self._board = Board(folder / "tensorboard", after=self._done) if lead and run.run.tensorboard else None
        self._first: FirstSteps | None = None
        if lead:
            self._first, said = foresee(run, self._corpus, done=self._done, cuda=device.type == "cuda")
            if said is not None:
                self._say(said)

    def _loader(self, split: Any) -> Loader | ClipLoader:
        plan, training = self._run.plan, self._run.training
        placed = plan.context_groups == "dynamic"  # of all rows, by what the documents in them need
        share = Share(
            global_batch_size=training.global_batch_size,
            micro_batch_size=plan.micro_batch_size,
            dp_rank=0 if placed else self._session.mesh.dp_index,
            dp_size=1 if placed else plan.dp,
            seed=self._run.run.seed,
        )
        return make_loader(self._corpus, share, split)

    def _resume(self) -> None:
        path = find_checkpoint(self._run)
        if path is None:
            return
        with during(self._hooks.observer, "LOAD"):
            state = resume_session(self._session, path, tokenizer=self._corpus.encoding)
        self._done = self._saved = int(state["step"])
        self._tokens_seen = int(state["tokens_seen"])
        self._say(f"going on from {path} (step {self._done})")
        if state["corpus"] != self._corpus.fingerprint:
            self._say("the corpus differs from the checkpoint's: from here on its order of samples holds")

    def _say(self, line: str) -> None:
        if self._world.rank == 0:
            self._hooks.say(line)

    def run(self) -> dict[str, Any]:
        """Steps until the end or until asked to stop; a checkpoint is written either way."""
        training, every = self._run.training, self._run.checkpoint.every
        if (method := self._run.plan.asynchronous) != "none":
            self._say(
                f'plan.asynchronous = "{method}": this is not the training of one rank; each stage updates after every '
                "micro-batch, with gradients of older weights"
            )
        if self._done >= training.steps:
            self._say(f"nothing to do: the checkpoint is of step {self._done}, training.steps is {training.steps}")
        while self._done < training.steps and not self._stopped:
            self._step(self._done + 1)
            self._done += 1
            last = self._done == training.steps
            evaluates = self._held_out and (self._done % training.eval_every == 0 or last)
            saves = every and self._done % every == 0
            if evaluates or saves or last or self._stopped:
                self._settle()
            if evaluates:
                with during(self._observer, "EVAL"):
                    self._last = {**self._last, **self._evaluate()}
            if saves or self._stopped:
                self._save()
        if self._saved < self._done:
            self._save()
        if self._stopped:
            self._say(f"stopped after step {self._done} of {training.steps} as asked; the checkpoint is whole")
        return {**self._last, "stopped": self._stopped}

    def _step(self, step: int) -> None:
        start = time.perf_counter()
        self._observer.step = step
        with during(self._observer, "DATA"):
            batches, ahead = self._now_and_next(step)
        stop = self._hooks.should_stop()
        if self._memory is None:
            meter = ActivationMeter(self._session)
            with meter.watch():
                results = self._session.advance(step, batches, stop=stop, ahead=ahead)
            unbarred = self._session.unbarred
            passing = passing_bytes(self._session) + (0 if unbarred is None else unbarred.num_bytes)
            self._memory = self._largest(persistent_bytes(self._session) + passing + meter.peak_bytes)
            taken = host_bytes(self._session)
            self._host = None if taken is None else self._maximum(taken)
        else:
            results = self._session.advance(step, batches, stop=stop, ahead=ahead)
        if self._recorder is not None and self._session.played_as_scheduled:
            self._recorder.finish_step()
        self._seconds[step] = time.perf_counter() - start
        self._finish(results)

    def _settle(self) -> None:
        """Finish the step whose update isn't validated yet, where the plan has such."""
        start = time.perf_counter()
        results = self._session.settle()
        if results:
            self._seconds[self._done] += time.perf_counter() - start
        self._finish(results)

    def _finish(self, results: Sequence[StepResult]) -> None:
        """Write the records of steps that are finished, in order; note whether one asks to stop."""
        for result in results:
            self._tokens_seen += result.tokens
            record = self._last = self._record(result.step, result, self._seconds.pop(result.step))
            if self._metrics is not None:
                self._metrics.write(record)
            if self._board is not None:
                self._board.write(record, "train")
            self._say(step_line(record, self._run.training.steps))
            if self._first is not None and (line := self._first.note(record)) is not None:
                self._say(line)
            self._stopped = self._stopped or result.stop

    def _now_and_next(self, step: int) -> tuple[list[Any], list[Any]]:
        """The micro-batches of a step, and where part of the next one is computed in it, those of that one."""
        batches = self._early.pop(step, None) or self._train.step(step)
        if self._session.filling is None or step >= self._run.training.steps:
            return batches, []
        self._early = {step + 1: self._train.step(step + 1)}
        return batches, self._early[step + 1]

    def _record(self, step: int, result: StepResult, seconds: float) -> dict[str, Any]:
        run = self._run
        rate = result.tokens / seconds
        narrow = run.training.dtype == "bfloat16"
        return {
            "step": step,
            "loss": result.loss,
            "grad_norm": None if self._session.asynchronous is not None else result.grad_norm,
            "lr": learning_rate(run.training, step),
            "tokens": result.tokens,
            "tokens_per_s": rate,
            "step_s": seconds,
            "mfu": mfu(
                run.model,
                sequence_length=run.training.sequence_length,
                tokens_per_second=rate,
                num_devices=self._world.world_size,
                peak_flops=run.cluster.peak_flops_bfloat16 if narrow else run.cluster.peak_flops_float32,
            ),
            "memory_bytes": self._memory,
            "host_bytes": self._host,
            "skipped": None if result.updated else True,
        }

    def _largest(self, num_bytes: int) -> int:
        """Memory of the fullest rank, in bytes."""
        if torch.cuda.is_available() and self._run.run.device != "cpu":
            num_bytes = torch.cuda.max_memory_allocated()
        return self._maximum(num_bytes)

    def _maximum(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        value = torch.tensor(number, dtype=torch.int64)
        if self._world.world_size > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            value = value.to(device)
            all_reduce(value, dist.group.WORLD, maximum=True).wait()
        return int(value)

    def _evaluate(self) -> Mapping[str, Any]:
        assert self._held_out is not None
        total, tokens = 0.0, 0
        for step in range(1, self._run.training.eval_steps + 1):
            loss, count = self._session.evaluate(self._held_out.step(step))
            total, tokens = total + loss, tokens + count
        record = {"step": self._done, "loss": total / max(1, tokens), "tokens": tokens}
        if self._evals is not None:
            self._evals.write(record)
        if self._board is not None:
            self._board.write(record, "eval")
        self._say(f"eval  {self._done:>{len(str(self._run.training.steps))}}  loss {record['loss']:.4f}")
        return {"eval_loss": record["loss"]}

    def _save(self) -> None:
        with during(self._observer, "SAVE"):
            path = save_session(
                self._session,
                step=self._done,
                tokens_seen=self._tokens_seen,
                tokenizer=self._corpus.encoding,
                corpus=self._corpus.fingerprint,
            )
        self._saved = self._done
        self._say(f"saved {path}")

    def close(self) -> None:
        """Close what is open, and write what was recorded."""
        if self._recorder is not None:
            self._recorder.flush()
            if self._recorder.failure is not None:
                self._say(f"the trace could not be written: {self._recorder.failure}")
        for sink in (self._metrics, self._evals, self._board):
            if sink is not None:
                sink.close()
