"""The micro-batches of a step, as a pure function of the step.

    global batch of step s      samples (s-1)·G ................................. s·G - 1
    data-parallel rank          └── rank 0 ──┘└── rank 1 ──┘└── rank 2 ──┘└── rank 3 ──┘
    its micro-batches           └ 0 ┘└ 1 ┘ ...

Nothing is carried from step to step, so a run goes on from any step at once, and with any
data-parallel degree each sample is seen exactly once, in the same global batch as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from stretto.data.corpus import Corpus
from stretto.data.order import Order
from stretto.data.packing import Rows
from stretto.spec.contract import Batch
from stretto.spec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of every global batch a rank reads, and in what portions."""

    global_batch_size: int
    """Sequences per step over the whole mesh."""
    micro_batch_size: int
    """Sequences per micro-batch."""
    dp_rank: int = 0
    """This rank's place among the data-parallel ones."""
    dp_size: int = 1
    """How many there are."""
    seed: int = 0
    """run.seed; decides the order."""

    def __post_init__(self) -> None:
        if not 0 <= self.dp_rank < self.dp_size:
            raise ConfigError(f"dp_rank {self.dp_rank} must lie in 0..{self.dp_size - 1}.")
        if self.micro_batch_size < 1 or self.global_batch_size % (self.dp_size * self.micro_batch_size):
            raise ConfigError(
                f"A global batch of {self.global_batch_size} can't be divided among {self.dp_size} data-parallel ranks "
                f"in micro-batches of {self.micro_batch_size}; it must be a multiple of their product."
            )

    @property
    def sequences(self) -> int:
        """Sequences that this rank reads per step."""
        return self.global_batch_size // self.dp_size

    def samples(self, step: int) -> np.ndarray:
        """Global sample indices, int64 [sequences], that this rank reads in ``step`` (from 1)."""
        assert step >= 1
        first = (step - 1) * self.global_batch_size + self.dp_rank * self.sequences
        return np.arange(first, first + self.sequences, dtype=np.int64)


class Loader:
    """Makes the Batches of a split for one data-parallel rank."""

    def __init__(self, corpus: Corpus, share: Share, *, split: Literal["train", "validation"] = "train") -> None:
        chosen = corpus.train if split == "train" else corpus.validation
        if chosen is None:
            raise ConfigError("There is nothing held out to evaluate on; set data.validation_fraction above 0.")
        self.split = chosen
        self.share = share
        self.sequence_length = corpus.sequence_length
        sizes = [source.packing.num_samples for source in chosen.sources]
        self.order = Order(sizes, [source.weight for source in chosen.sources], seed=share.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which as many samples were drawn as there are, rounded up."""
        return -(-self.split.num_samples // self.share.global_batch_size)

    def samples(self, step: int) -> np.ndarray:
        """Global sample indices, int64 [sequences], that this rank reads in ``step`` (from 1)."""
        return self.share.samples(step)

    def rows(self, step: int) -> Rows:
        """What this rank reads in ``step`` (from 1), row after row."""
        return self._rows(*self.order.samples_at(self.samples(step)))

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of ``step`` (from 1), in order."""
        import torch

        samples, rows = self.samples(step), self.rows(step)
        size = self.share.micro_batch_size
        batches = []
        for at in range(0, len(samples), size):
            part = slice(at, at + size)
            apart = self.split.isolate and bool(rows.mixed[part].any())
            batches.append(
                Batch(
                    tokens=torch.from_numpy(rows.tokens[part]),
                    labels=torch.from_numpy(rows.labels[part]),
                    positions=torch.from_numpy(rows.positions[part]),
                    documents=torch.from_numpy(rows.documents[part]) if apart else None,
                    samples=torch.from_numpy(samples[part]),
                )
            )
        return batches

    def _rows(self, source: np.ndarray, sample: np.ndarray) -> Rows:
        """Rows of several sources in the order asked for."""
        used = np.unique(source)
        if len(used) == 1:
            return self.split.rows(int(used[0]), sample)
        parts = [self.split.rows(int(number), sample[source == number]) for number in used]
        back = np.argsort(np.concatenate([np.flatnonzero(source == number) for number in used]))
        names = ("tokens", "labels", "positions", "documents", "mixed")
        return Rows(**{name: np.concatenate([getattr(part, name) for part in parts])[back] for name in names})
