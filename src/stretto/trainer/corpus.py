"""The corpus of a run: token shards, where they are kept, and making them, or clips (without torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stretto.data import ClipCorpus, ClipLoader, Corpus, Loader, Share, prepare, prepare_clips
from stretto.spec.contract import Progress
from stretto.spec.run import RunSpec


def token_cache(run: RunSpec) -> Path:
    """Where token shards of a run are kept."""
    return Path(run.data.cache) if run.data.cache else Path(run.run.dir) / "tokens"


def prepare_corpus(run: RunSpec, progress: Progress | None = None) -> Corpus | ClipCorpus:
    """The corpus of a run, tokenised if it isn't yet; of family video its clips."""
    if run.model.video is not None:
        return prepare_clips(run.data, run.model.video)
    return prepare(
        run.data,
        cache=token_cache(run),
        sequence_length=run.training.sequence_length,
        vocab_size=run.model.vocab_size,
        progress=progress,
    )


def make_loader(
    corpus: Corpus | ClipCorpus, share: Share, split: Literal["train", "validation"]
) -> Loader | ClipLoader:
    """What makes the micro-batches of a rank."""
    if isinstance(corpus, ClipCorpus):
        return ClipLoader(corpus, share, split=split)
    return Loader(corpus, share, split=split)
