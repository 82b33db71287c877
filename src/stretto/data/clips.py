"""Clips of latents: from files, or drawn; and the micro-batches of a step, noise and diffusion times with them.

    .npy, .safetensors (memory-mapped) ──► clips [F, P, C] ──► split ──► order ──► (1 - t) clip + t noise ──► batch

Noise and time of a row are a function of (seed, step, row) alone, so they are the same under every plan and after a
resume; those of an evaluation are the same at each.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stretto.data.latents import Latents, open_latents
from stretto.data.loader import Share
from stretto.data.order import Order, keyed
from stretto.data.source import list_files
from stretto.spec import capabilities
from stretto.spec.contract import Batch, Clips
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.errors import ConfigError, DataError
from stretto.spec.model import VideoSpec

DRAWN = 4096
"""Clips that are drawn where there are no files."""
NOISE, WAVES = 0x6E6F697365, 0x7761766573
"""What numbers are drawn for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSource:
    """One source of a split."""

    clips: tuple[Latents, ...]
    """Its files' arrays, in order; none: clips are drawn."""
    numbers: np.ndarray
    """int64, which of its clips belong to the split."""
    weight: float
    """Share of samples drawn from it, relative to the other sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCorpus:
    """All that a ClipLoader needs; the same on every rank."""

    shape: VideoSpec
    train: tuple[ClipSource, ...]
    """What is trained on."""
    validation: tuple[ClipSource, ...] | None
    """What is held out; None where data.validation_fraction is 0."""
    fingerprint: str
    """Hash of the files and of how they are blended: equal means the same clips in the same order."""
    encoding: str = "latents"
    """What made the numbers; as files have them."""

    def describe(self) -> str:
        """One line for people."""
        shape, number = self.shape, sum(len(source.numbers) for source in self.train)
        held = sum(len(source.numbers) for source in self.validation or ())
        sizes = f"{shape.frames} frames x {shape.patches} patches x {shape.channels} channels"
        return f"{number:,} clips of {sizes}" + (f"; {held:,} held out" if held else "")

    def clip(self, source: ClipSource, number: int) -> np.ndarray:
        """float32 [F, P, C]."""
        if not source.clips:
            return wave(number, self.shape)
        for latents in source.clips:
            if number < len(latents):
                return latents[number]
            number -= len(latents)
        raise AssertionError("a clip that isn't there")


def prepare_clips(spec: DataSpec, shape: VideoSpec) -> ClipCorpus:
    """Open what ``spec`` names; nothing is read but the files' heads.  DataError for files that hold no such clips."""
    listed = spec.sources or ((SourceSpec(path=spec.path),) if spec.path else ())
    if not listed:
        raise ConfigError(f'There are no clips: set data.path to files, or "{capabilities.EMBEDDED_CLIPS}".')
    prints, splits = [], []
    for source in listed:
        clips: tuple[Latents, ...] = ()
        if source.path == capabilities.EMBEDDED_CLIPS:
            prints.append(source.path)
        else:
            listing = list_files(source.path, capabilities.CLIP_SUFFIXES)
            clips = tuple(latents for file in listing.files for latents in open_latents(file.path, shape))
            prints.append(listing.fingerprint)
        number = sum(map(len, clips)) if clips else DRAWN
        splits.append([(clips, part, source.weight) for part in _held_out(number, spec.validation_fraction, source)])
    train, held = (
        tuple(ClipSource(clips=clips, numbers=numbers, weight=weight) for clips, numbers, weight in parts)
        for parts in zip(*splits, strict=True)
    )
    choices = [prints, spec.validation_fraction, [source.weight for source in listed]]
    return ClipCorpus(
        shape=shape,
        train=train,
        validation=held if spec.validation_fraction else None,
        fingerprint=hashlib.sha256(json.dumps(choices).encode()).hexdigest(),
    )


def _held_out(number: int, fraction: float, source: SourceSpec) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the clips that are trained on, and of those that are held out: by a hash, at least one of each."""
    rank = keyed(np.arange(number)) / 2.0**64
    held = rank < fraction
    if fraction:
        if number < 2:
            raise DataError(f"{source.path} holds one clip, so none can be held out; set data.validation_fraction = 0.")
        held[np.argmin(rank)], held[np.argmax(rank)] = True, False
    return np.flatnonzero(~held), np.flatnonzero(held)


def wave(number: int, shape: VideoSpec) -> np.ndarray:
    """Clip ``number`` of those that are drawn, float32 [F, P, C]: in each channel a plane wave that travels.

    Patches lie row by row in the squarest grid that holds them.
    """
    generator = _generator(WAVES, number)
    rows = next(size for size in range(math.isqrt(shape.patches), 0, -1) if shape.patches % size == 0)
    y, x = np.divmod(np.arange(shape.patches), shape.patches // rows)
    kx, ky, speed, phase = generator.uniform(-1, 1, (4, shape.channels)) * np.array([[0.5], [0.5], [0.5], [math.pi]])
    place = x[:, None] * kx + y[:, None] * ky + phase
    return np.cos(place + np.arange(shape.frames)[:, None, None] * speed).astype(np.float32)


def _generator(*key: int) -> np.random.Generator:
    """Random numbers of a key."""
    return np.random.Generator(np.random.Philox(key=int(keyed(*key)[0])))


class ClipLoader:
    """Makes the Batches of a split for one data-parallel rank."""

    def __init__(self, corpus: ClipCorpus, share: Share, *, split: Literal["train", "validation"] = "train") -> None:
        chosen = corpus.train if split == "train" else corpus.validation
        if chosen is None:
            raise ConfigError("There is nothing held out to evaluate on; set data.validation_fraction above 0.")
        self.corpus, self.sources, self.share, self.split = corpus, chosen, share, split
        sizes = [len(source.numbers) for source in chosen]
        self.order = Order(sizes, [source.weight for source in chosen], seed=share.seed)

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of ``step`` (from 1), in order."""
        samples, size = self.share.samples(step), self.share.micro_batch_size
        source, number = self.order.samples_at(samples)
        rows = []
        for sample, at, index in zip(samples.tolist(), source.tolist(), number.tolist(), strict=True):
            one = self.sources[at]
            rows.append((sample, self.corpus.clip(one, int(one.numbers[index]))))
        return [self._batch(rows[at : at + size], step) for at in range(0, len(rows), size)]

    def _batch(self, rows: list[tuple[int, np.ndarray]], step: int) -> Batch:
        first = (step - 1) * self.share.global_batch_size
        drawn = [
            noise_and_time(self.share.seed, step, sample - first, self.corpus.shape, held_out=self.split != "train")
            for sample, _ in rows
        ]
        clips = np.stack([clip for _, clip in rows])
        noise, time = np.stack([noise for noise, _ in drawn]), np.array([t for _, t in drawn], dtype=np.float32)
        return batch_of(clips, noise, time, np.array([sample for sample, _ in rows], dtype=np.int64))


def noise_and_time(
    seed: int, step: int, row: int, shape: VideoSpec, *, held_out: bool = False
) -> tuple[np.ndarray, float]:
    """Noise, float32 [F, P, C], and diffusion time, between 0 and 1, of a row of a step's global batch."""
    generator = _generator(NOISE, seed, step, row, int(held_out))
    time = float(generator.random())
    return generator.standard_normal((shape.frames, shape.patches, shape.channels), dtype=np.float32), time


def batch_of(clips: np.ndarray, noise: np.ndarray, time: np.ndarray, samples: np.ndarray) -> Batch:
    """A micro-batch of whole clips; all arrays float32 but ``samples``, int64 [B]."""
    import torch

    number, frames, patches, _ = clips.shape
    part = time[:, None, None, None]
    every = torch.zeros((), dtype=torch.int64).expand(number, frames * patches)
    return Batch(
        tokens=every,
        labels=every,
        positions=every,
        documents=None,
        samples=torch.from_numpy(samples),
        clips=Clips(
            noisy=torch.from_numpy((1 - part) * clips + part * noise),
            velocity=torch.from_numpy(noise - clips),
            time=torch.from_numpy(time),
            frames=(0, frames),
            patches=(0, patches),
        ),
    )
