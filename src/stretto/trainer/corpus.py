"""The corpus of a run: where its token shards are kept, and making them (without torch)."""

from __future__ import annotations

from pathlib import Path

from stretto.data import Corpus, prepare
from stretto.spec.contract import Progress
from stretto.spec.run import RunSpec


def token_cache(run: RunSpec) -> Path:
    """Where token shards of a run are kept."""
    return Path(run.data.cache) if run.data.cache else Path(run.run.dir) / "tokens"


def prepare_corpus(run: RunSpec, progress: Progress | None = None) -> Corpus:
    """The corpus of a run, tokenised if it isn't yet."""
    return prepare(
        run.data,
        cache=token_cache(run),
        sequence_length=run.training.sequence_length,
        vocab_size=run.model.vocab_size,
        progress=progress,
    )
