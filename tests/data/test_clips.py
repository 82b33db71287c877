"""Clips from files or drawn; noise and times are a function of (seed, step, row)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stretto.data import ClipCorpus, ClipLoader, Share, prepare_clips
from stretto.data.clips import DRAWN, wave
from stretto.spec.contract import Batch
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.errors import DataError
from stretto.spec.model import VideoSpec

CLIP = VideoSpec(frames=3, patches=4, channels=2)


def share(**fields: int) -> Share:
    return Share(**{"global_batch_size": 8, "micro_batch_size": 2, "seed": 5, **fields})


def joined(batches: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch.clips, name) for batch in batches])


def drawn(**fields: float) -> ClipCorpus:
    return prepare_clips(DataSpec(path="waves", **fields), CLIP)  # type: ignore[arg-type]


def test_rows_are_the_same_however_they_are_shared() -> None:
    corpus = drawn()
    whole = ClipLoader(corpus, share()).step(3)
    parts = [b for rank in range(4) for b in ClipLoader(corpus, share(dp_rank=rank, dp_size=4)).step(3)]
    for name in ("noisy", "velocity", "time"):
        assert torch.equal(joined(whole, name), joined(parts, name))
    assert [int(s) for batch in whole for s in batch.samples] == list(range(16, 24))
    assert all(batch.labels.shape == (2, CLIP.tokens) for batch in whole)


def test_noise_is_of_its_step_row_and_seed_and_takes_the_clip_to_itself() -> None:
    corpus = drawn()
    batches = [*ClipLoader(corpus, share()).step(1), *ClipLoader(corpus, share()).step(2)]
    batches += ClipLoader(corpus, share(seed=6)).step(1)
    noisy, velocity, time = (joined(batches, name) for name in ("noisy", "velocity", "time"))
    time = time[:, None, None, None]
    noise, clips = noisy + (1 - time) * velocity, noisy - time * velocity
    assert len(np.unique(noise.numpy().round(3), axis=0)) == len(time.unique()) == 24
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    # What is left without the noise is a clip of the corpus.
    first = ClipLoader(corpus, share())
    numbers = first.order.samples_at(np.arange(8))[1]
    expected = np.stack([wave(int(number), CLIP) for number in numbers])
    np.testing.assert_allclose(clips[:8].numpy(), expected, atol=1e-5)


def test_evaluations_are_alike_and_of_other_clips() -> None:
    corpus = drawn(validation_fraction=0.25)
    assert corpus.validation is not None
    held, trained = corpus.validation[0].numbers, corpus.train[0].numbers
    assert len(held) + len(trained) == DRAWN and not set(held) & set(trained)
    one, again = (ClipLoader(corpus, share(), split="validation").step(1) for _ in range(2))
    assert torch.equal(joined(one, "noisy"), joined(again, "noisy"))
    assert not torch.equal(joined(one, "time"), joined(ClipLoader(corpus, share()).step(1), "time"))


def test_files_of_both_kinds_in_order(tmp_path: Path) -> None:
    clips = np.stack([wave(number, CLIP) for number in range(6)])
    np.save(tmp_path / "a.npy", clips[:2].astype(np.float64))
    halves = torch.from_numpy(clips[2:5]).to(torch.bfloat16)
    save_file({"x": halves[:1].contiguous(), "y": halves[1:].contiguous()}, tmp_path / "b.safetensors")
    save_file({"z": torch.from_numpy(clips[5:])}, tmp_path / "c.safetensors")
    spec = DataSpec(sources=(SourceSpec(path=str(tmp_path), weight=3), SourceSpec(path="waves")))
    corpus = prepare_clips(spec, CLIP)
    found = np.stack([corpus.clip(corpus.train[0], number) for number in range(6)])
    np.testing.assert_array_equal(found[[0, 1, 5]], clips[[0, 1, 5]])
    np.testing.assert_array_equal(found[2:5], halves.float().numpy())
    assert corpus.describe().startswith(f"{6 + DRAWN:,} clips of 3 frames x 4 patches x 2 channels")
    assert corpus.fingerprint != drawn().fingerprint


def header(folder: Path, shape: list[object], place: list[object]) -> None:
    """A safetensors file of a header alone."""
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": place}}).encode()
    (folder / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda p: np.save(p / "a.npy", np.zeros((5, 3, 4), np.float32)), r"has shape \[5, 3, 4\], but clips are"),
        (lambda p: np.save(p / "a.npy", np.zeros((5, 3, 4, 2), np.int64)), "holds int64"),
        (lambda p: (p / "a.npy").write_bytes(b"nothing"), "is no .npy file of numbers, or is cut off"),
        (lambda p: (p / "a.safetensors").write_bytes(b"\xff" * 40), "no safetensors file"),
        (lambda p: save_file({}, p / "a.safetensors"), "holds no arrays"),
        (lambda p: header(p, [1, 3, 4, 2], ["0", "96"]), "its header can't be read"),
        (lambda p: header(p, [-1, 3, 4, 2], [0, -96]), "its header can't be read"),
        (lambda p: header(p, [1.0, 3, 4, 2], [0, 96]), "its header can't be read"),
        (lambda p: header(p, [0, 3, 4, 2], [0, 0]), "holds no clips"),
        (lambda p: header(p, [1, 3, 4, 2], [0, 96]), "isn't where its header says"),
        (lambda p: (p / "a.txt").write_text("clips"), "none of its 1 files ends in .npy or .safetensors"),
    ],
)
def test_files_that_hold_no_such_clips(tmp_path: Path, write: object, told: str) -> None:
    write(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=told):
        prepare_clips(DataSpec(path=str(tmp_path)), CLIP)
