"""The loader is a pure function of the step, for any data-parallel degree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.data import Corpus, Loader, Share, prepare
from stretto.spec.contract import IGNORE, Batch
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.errors import ConfigError

FIELDS = ("tokens", "labels", "positions", "samples")


def make(folder: Path, **options: object) -> Corpus:
    """A blend of two corpora of short documents."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(30):
            (folder / name / f"{i:02}.txt").write_text(f"{name}{i:02} " * (i + 1))
    sources = (SourceSpec(path=str(folder / "a"), weight=2), SourceSpec(path=str(folder / "b")))
    spec = DataSpec(sources=sources, validation_fraction=0.2, **options)  # type: ignore[arg-type]
    return prepare(spec, cache=folder / "cache", sequence_length=24, vocab_size=257)


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make(tmp_path_factory.mktemp("blend"))


def joined(batches: list[Batch], field: str) -> torch.Tensor:
    """One field over all micro-batches."""
    return torch.cat([getattr(batch, field) for batch in batches])


@given(st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 1), (4, 3), (6, 2), (12, 1)]), st.integers(1, 10_000))
@settings(max_examples=40, deadline=None)
def test_any_degree_sees_the_same_global_batch(blend: Corpus, degrees: tuple[int, int], step: int) -> None:
    dp, micro = degrees
    whole = Loader(blend, Share(global_batch_size=12, micro_batch_size=12, seed=3)).step(step)
    shares = [Share(global_batch_size=12, micro_batch_size=micro, dp_rank=r, dp_size=dp, seed=3) for r in range(dp)]
    parts = [batch for share in shares for batch in Loader(blend, share).step(step)]
    assert len(parts) == 12 // micro and all(batch.tokens.shape == (micro, 24) for batch in parts)
    for field in FIELDS:
        assert torch.equal(joined(parts, field), joined(whole, field))
        assert joined(parts, field).dtype == torch.int64 and joined(parts, field).is_contiguous()
    assert joined(whole, "samples").tolist() == list(range((step - 1) * 12, step * 12))


def test_an_epoch_reads_every_sample_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(32 + i * i % 800) for i in range(997)))
    spec = DataSpec(path=str(tmp_path / "a.txt"))
    corpus = prepare(spec, cache=tmp_path / "cache", sequence_length=8, vocab_size=257)
    size = corpus.train.num_samples
    loader = Loader(corpus, Share(global_batch_size=1, micro_batch_size=1))
    assert loader.steps_per_epoch == size > 100
    stored = corpus.train.sources[0].shard.tokens.tolist()
    expected = Counter(tuple(stored[k * 8 : k * 8 + 8]) for k in range(size))
    for epoch in range(2):
        steps = range(epoch * size + 1, (epoch + 1) * size + 1)
        assert Counter(tuple(loader.step(step)[0].tokens[0].tolist()) for step in steps) == expected


def test_a_blend_mixes_as_weighted(blend: Corpus) -> None:
    loader = Loader(blend, Share(global_batch_size=12, micro_batch_size=12))
    names = Counter()
    for step in range(1, 11):
        for row in joined(loader.step(step), "tokens").tolist():
            text = blend.tokenizer.decode(row)
            names["a" if "a" in text else "b"] += 1
    assert names == {"a": 80, "b": 40}


def test_steps_need_no_history(blend: Corpus) -> None:
    share = Share(global_batch_size=4, micro_batch_size=2, seed=1)
    walked = Loader(blend, share)
    for step in range(1, 8):
        last = walked.step(step)
    jumped = Loader(blend, share).step(7)
    for field in FIELDS:
        assert torch.equal(joined(last, field), joined(jumped, field))
    other = Loader(blend, Share(global_batch_size=4, micro_batch_size=2, seed=2)).step(7)
    assert not torch.equal(joined(other, "tokens"), joined(jumped, "tokens"))


def test_documents_are_given_only_where_a_row_has_several(tmp_path: Path) -> None:
    corpus = make(tmp_path, packing="whole")
    loader = Loader(corpus, Share(global_batch_size=30, micro_batch_size=1))
    kinds = Counter()
    for step in range(1, 9):
        for batch in loader.step(step):
            starts = (batch.positions[0] == 0).nonzero()[:, 0].tolist()
            real = [at for at in starts if (batch.labels[0, at:] != IGNORE).any()]
            kinds[batch.documents is None] += 1
            assert (batch.documents is None) == (len(real) == 1)
            if batch.documents is not None:
                assert len(batch.documents.unique()) >= 2
    assert kinds[True] > 10 and kinds[False] > 10


def test_without_isolation_rows_are_one_text(tmp_path: Path) -> None:
    corpus = make(tmp_path, isolate_documents=False)
    (batch,) = Loader(corpus, Share(global_batch_size=16, micro_batch_size=16)).step(1)
    assert batch.documents is None
    assert torch.equal(batch.positions, torch.arange(24).expand(16, 24))
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])


def test_validation_is_read_apart(blend: Corpus) -> None:
    share = Share(global_batch_size=6, micro_batch_size=3)
    assert blend.validation is not None
    held = Loader(blend, share, split="validation")
    assert held.split is blend.validation and len(held.step(1)) == 2
    assert not torch.equal(joined(held.step(1), "tokens"), joined(Loader(blend, share).step(1), "tokens"))


def test_shares_that_cannot_be(tmp_path: Path, blend: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"global batch of 8 can't be divided among 3 .* micro-batches of 1"):
        Share(global_batch_size=8, micro_batch_size=1, dp_size=3)
    with pytest.raises(ConfigError, match=r"dp_rank 2 must lie in 0\.\.1"):
        Share(global_batch_size=8, micro_batch_size=1, dp_rank=2, dp_size=2)
    (tmp_path / "a.txt").write_text("some text")
    spec = DataSpec(path=str(tmp_path / "a.txt"))
    corpus = prepare(spec, cache=tmp_path / "cache", sequence_length=8, vocab_size=257)
    with pytest.raises(ConfigError, match=r"nothing held out .* data\.validation_fraction"):
        Loader(corpus, Share(global_batch_size=1, micro_batch_size=1), split="validation")
