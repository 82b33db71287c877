"""What both sides of a verification start from: the model with its initial values, and the batches.

Initial values are livelier than those of training: norms don't start at 1 and biases not at 0, because a
bias that is added twice can't be seen while it is zero.

Batches are made to betray: the number of valid tokens differs widely from row to row (one row counts
everywhere, one in a single token), so that means of means are wrong; rows hold one, two or three documents.
Clips are noise, with times and targets that are noise, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from stretto.spec.contract import IGNORE, Batch, Clips, Stack
from stretto.spec.model import VideoSpec
from stretto.spec.run import RunSpec


def lively(stack: Stack, run: RunSpec) -> Stack:
    """Tell a model to start lively; a foreign one keeps the values that it brings."""
    if run.model.family != "foreign":
        cast(Any, stack).initial_value = lambda name: lively_value(name, run.model.initial_std)
    return stack


def lively_value(name: str, std: float) -> tuple[str, float]:
    """How parameter ``name`` starts: norms spread around 0 like biases, only wider."""
    return "normal", 1.0 if name.endswith("norm.weight") else std


def global_batch(run: RunSpec, step: int) -> Batch:
    """All rows of a step, a pure function of (seed, step)."""
    rows, length = run.training.global_batch_size, run.training.sequence_length
    generator = torch.Generator().manual_seed(1009 * run.run.seed + step)
    tokens = torch.randint(0, run.model.vocab_size, (rows, length), generator=generator)
    labels = torch.randint(0, run.model.vocab_size, (rows, length), generator=generator)
    chances = torch.rand(rows, length, generator=generator)
    positions = torch.empty(rows, length, dtype=torch.int64)
    documents = torch.zeros(rows, length, dtype=torch.int64)
    for row in range(rows):
        counted = float(torch.rand((), generator=generator)) ** 2
        if row % 4 == 0:
            counted = 1.0
        labels[row, chances[row] > counted] = IGNORE
        if row % 4 == 1:
            labels[row] = IGNORE
            labels[row, length // 2] = tokens[row, 0]
        for _ in range(row % 3 if run.data.isolate_documents else 0):
            cut = int(torch.randint(1, length, (), generator=generator))
            documents[row, cut:] += 1
        positions[row] = restarted(documents[row])
        if run.plan.context_groups == "dynamic":  # what no label follows would be left out, and couldn't be compared
            last = torch.cat([documents[row][1:] != documents[row][:-1], torch.ones(1, dtype=torch.bool)])
            labels[row, last] = tokens[row, last]
    first, clip = (step - 1) * rows, run.model.video
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        documents=documents if run.data.isolate_documents and clip is None else None,
        samples=torch.arange(first, first + rows),
        clips=None if clip is None else random_clips(rows, clip, generator),
    )


def random_clips(rows: int, clip: VideoSpec, generator: torch.Generator) -> Clips:
    """Whole clips of ``rows`` rows."""
    shape = (rows, clip.frames, clip.patches, clip.channels)
    return Clips(
        noisy=torch.randn(shape, generator=generator),
        velocity=torch.randn(shape, generator=generator),
        time=torch.rand(rows, generator=generator),
        frames=(0, clip.frames),
        patches=(0, clip.patches),
    )


def rows_of_clips(clips: Clips | None, start: int, stop: int) -> Clips | None:
    """Rows ``start`` to ``stop``, where there are clips."""
    if clips is None:
        return None
    return replace(
        clips, noisy=clips.noisy[start:stop], velocity=clips.velocity[start:stop], time=clips.time[start:stop]
    )


def restarted(documents: torch.Tensor) -> torch.Tensor:
    """Positions [T] that restart with every document of a row [T]."""
    index = torch.arange(len(documents))
    starts = torch.cat([torch.ones(1, dtype=torch.bool), documents[1:] != documents[:-1]])
    return index - torch.where(starts, index, 0).cummax(0).values


def micro_batches(run: RunSpec, step: int, dp_index: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank; like the loader's, without documents where no row holds several.

    With dynamic groups all rows, one by one.
    """
    whole = global_batch(run, step)
    if run.plan.context_groups == "dynamic":
        return [part_of(whole, at, at + 1) for at in range(run.training.global_batch_size)]
    rows = run.training.global_batch_size // run.plan.dp
    size = run.plan.micro_batch_size
    return [part_of(whole, at, at + size) for at in range(dp_index * rows, (dp_index + 1) * rows, size)]


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop`` of a batch."""
    documents = None if batch.documents is None else batch.documents[start:stop]
    if documents is not None and not documents.any():
        documents = None
    return Batch(
        tokens=batch.tokens[start:stop],
        labels=batch.labels[start:stop],
        positions=batch.positions[start:stop],
        documents=documents,
        samples=batch.samples[start:stop],
        clips=rows_of_clips(batch.clips, start, stop),
    )
