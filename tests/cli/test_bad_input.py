"""Bad input, as a user meets it: one line on stderr, exit code 2, before any rank starts, nothing lost.

The command line is called for real, on a run that was really trained.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizers

from stretto.cli.main import main

RUN = """
[run]
dir = "{folder}/run"
[model]
name = "tiny"
[training]
steps = 2
global_batch_size = 4
sequence_length = 32
[data]
path = "{folder}/corpus"
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.toml, a corpus, and a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (folder / "run.toml").write_text(RUN.format(folder=folder))
    assert main(["train", str(folder / "run.toml")]) == 0
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may spoil."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))
    return tmp_path


def refused(place: Path, capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that ``stretto train`` ends with."""
    kept = sorted(p.name for p in (place / "run" / "checkpoints").iterdir())
    metrics = (place / "run" / "metrics.jsonl").read_bytes()
    arguments = ["--set", *overrides] if overrides else []
    assert main(["train", str(place / "run.toml"), *arguments]) == 2
    text = capfd.readouterr().err
    assert text.startswith("stretto: error: ") and text.count("\n") == 1 and "Traceback" not in text, text
    assert sorted(p.name for p in (place / "run" / "checkpoints").iterdir()) == kept
    assert (place / "run" / "metrics.jsonl").read_bytes() == metrics
    return text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["plan.tp=3"], ["tp=3", "tp may be"]),
        (["plan.stages=[1,2]", "plan.pp=2"], ["stages", "2"]),
        (["plan.microbatch=2"], ["microbatch", "micro_batch_size"]),
        (["data.path=nowhere"], ["nowhere", "doesn't exist"]),
        (["training.sequence_length=100000"], ["100000", "max_positions"]),
        (["training.global_batch_size=3", "plan.dp_replicate=2"], ["3", "2"]),
        (["plan.schedule=1f2b"], ["1f2b", "1f1b"]),
        (["plan.cp=64"], ["cp=64", "32"]),
        (["plan.ep=2"], ["ep"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_the_run_file_gets_wrong(
    place: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    text = refused(place, capfd, *overrides)
    assert all(word in text for word in words), text


def test_world_size_that_does_not_fit(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for key, value in joined.items():
        monkeypatch.setenv(key, value)
    text = refused(place, capfd, "plan.dp_replicate=2")
    assert "needs 2 ranks" in text and "processes is 3" in text and "start 2 processes" in text, text


def test_empty_corpus(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    assert "empty" in refused(place, capfd, f"data.path={place}/empty")
    (place / "blank.txt").write_text("")
    assert "blank.txt" in refused(place, capfd, f"data.path={place}/blank.txt")


def test_a_flipped_bit_in_the_checkpoint(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = next((place / "run" / "checkpoints").glob("step-*/*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    text = refused(place, capfd, "training.steps=3")
    assert file.name in text


def test_a_half_written_checkpoint_is_not_one(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((place / "run" / "checkpoints").glob("step-*"))
    (checkpoint / "manifest.json").unlink()
    assert str(checkpoint) in refused(place, capfd, f"checkpoint.resume={checkpoint}")


def test_another_tokenizer(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    made.train_from_iterator(
        ["the quick brown fox"] * 5, tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=["<|endoftext|>"])
    )
    made.save(str(place / "tokenizer.json"))
    text = refused(place, capfd, f"data.tokenizer={place}/tokenizer.json", "training.steps=3")
    assert "another tokenizer" in text and "checkpoint.resume = never" in text


def test_another_batch_would_repeat_samples(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "global_batch_size = 4" in refused(place, capfd, "training.global_batch_size=8", "training.steps=3")


def test_the_run_still_goes_on(place: Path) -> None:
    assert main(["train", str(place / "run.toml"), "--set", "training.steps=3"]) == 0
