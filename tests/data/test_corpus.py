"""From a run file's [data] to a corpus, once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stretto.data import Corpus, corpus, prepare
from stretto.spec.contract import IGNORE
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.errors import ConfigError, DataError


def opened(spec: DataSpec, folder: Path, *, sequence_length: int = 16, vocab_size: int = 257) -> Corpus:
    """Prepare with a cache in ``folder``."""
    return prepare(spec, cache=folder / "cache", sequence_length=sequence_length, vocab_size=vocab_size)


@pytest.fixture
def texts(tmp_path: Path) -> DataSpec:
    """A folder of forty short documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i:02} " + "x" * i)
    return DataSpec(path=str(folder))


def test_the_second_time_nothing_is_tokenised(texts: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(texts, tmp_path)
    monkeypatch.setattr(corpus, "write_shard", None)
    assert opened(texts, tmp_path).fingerprint == first.fingerprint
    opened(replace(texts, packing="whole", validation_fraction=0.2), tmp_path)  # packed anew, not tokenised anew
    file = Path(str(texts.path)) / "07.txt"
    os.utime(file, ns=(1, 1))
    with pytest.raises(TypeError):
        opened(texts, tmp_path)


def test_a_changed_file_changes_the_corpus(texts: DataSpec, tmp_path: Path) -> None:
    first = opened(texts, tmp_path)
    (Path(str(texts.path)) / "07.txt").write_text("changed")
    second = opened(texts, tmp_path)
    assert second.fingerprint != first.fingerprint
    assert "changed" in second.tokenizer.decode(second.train.sources[0].shard.tokens.tolist())


def test_the_fingerprint_follows_content_and_packing_only(texts: DataSpec, tmp_path: Path) -> None:
    first = opened(texts, tmp_path)
    for file in Path(str(texts.path)).iterdir():
        os.utime(file, ns=(1, 1))
    assert opened(texts, tmp_path).fingerprint == first.fingerprint
    others = [replace(texts, packing="whole"), replace(texts, validation_fraction=0.1)]
    prints = {opened(other, tmp_path).fingerprint for other in others}
    prints |= {first.fingerprint, opened(texts, tmp_path, sequence_length=8).fingerprint}
    assert len(prints) == 4


def test_a_flipped_bit_in_the_cache_is_repaired(texts: DataSpec, tmp_path: Path) -> None:
    first = opened(texts, tmp_path)
    (file,) = (tmp_path / "cache").glob("*/tokens.bin")
    content = bytearray(file.read_bytes())
    good = bytes(content)
    content[100] ^= 1
    file.write_bytes(content)
    second = opened(texts, tmp_path)
    assert file.read_bytes() == good and second.fingerprint == first.fingerprint


def test_a_cache_inside_the_corpus(texts: DataSpec, tmp_path: Path) -> None:
    inside = Path(str(texts.path))
    assert opened(texts, inside).fingerprint == opened(texts, inside).fingerprint
    assert len(list((inside / "cache").glob("*/tokens.bin"))) == 1


def test_splits_share_no_document(texts: DataSpec, tmp_path: Path) -> None:
    made = opened(replace(texts, validation_fraction=0.25, packing="whole"), tmp_path, sequence_length=64)
    assert made.validation is not None
    found = []
    for split in (made.train, made.validation):
        rows = split.rows(0, np.arange(split.num_samples))
        text = made.tokenizer.decode(rows.tokens.reshape(-1).tolist())
        found.append({text[at + 9 : at + 11] for at in range(len(text)) if text.startswith("document ", at)})
    assert not found[0] & found[1] and len(found[0] | found[1]) == 40
    assert len(found[1]) == made.validation.num_documents > 0
    assert made.describe().startswith(f"{len(found[0])} documents, ")


def test_each_fraction_has_its_own_split(texts: DataSpec, tmp_path: Path) -> None:
    held = []
    for fraction in (0.1, 0.5, 0.1):
        made = opened(replace(texts, validation_fraction=fraction), tmp_path)
        assert made.validation is not None
        held.append(made.validation.num_documents)
    assert held[0] == held[2] < held[1]


def test_skipped_files_are_reported_even_from_the_cache(texts: DataSpec, tmp_path: Path) -> None:
    (Path(str(texts.path)) / "picture.png").write_bytes(b"\x89PNG\0")
    for _ in range(2):
        made = opened(texts, tmp_path)
        assert made.skipped == 1 and "1 files skipped" in made.describe()


def test_chats_count_answers_only(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(3)))
    spec = DataSpec(path=str(file), packing="whole")
    made = opened(spec, tmp_path, sequence_length=64)
    rows = made.train.rows(0, np.arange(made.train.num_samples))
    counted = rows.labels[rows.labels != IGNORE]
    assert counted.tolist() == [*b"Because.", 256] * 3
    both = opened(replace(spec, train_on=("assistant", "user")), tmp_path, sequence_length=64)
    rows = both.train.rows(0, np.arange(both.train.num_samples))
    assert rows.labels[rows.labels != IGNORE].tolist() == [*b"Why?", 256, *b"Because.", 256] * 3


def test_a_blend_keeps_each_source(texts: DataSpec, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other " * 100)
    sources = (SourceSpec(path=str(texts.path)), SourceSpec(path=str(tmp_path / "other.txt"), weight=3))
    made = opened(DataSpec(sources=sources, validation_fraction=0.1), tmp_path)
    assert [source.weight for source in made.train.sources] == [1, 3]
    assert "other" in made.tokenizer.decode(made.train.rows(1, np.array([5])).tokens[0].tolist())
    assert made.validation is not None and len(made.validation.sources) == 2


def test_what_cannot_be_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no corpus: set data\.path"):
        opened(DataSpec(), tmp_path)
    with pytest.raises(DataError, match="There is no corpus at "):
        opened(DataSpec(path=str(tmp_path / "nowhere")), tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="is empty: it holds no text"):
        opened(DataSpec(path=str(tmp_path / "empty.txt")), tmp_path)
    (tmp_path / "binary").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="is empty: 1 of its 1 files aren't UTF-8 text"):
        opened(DataSpec(path=str(tmp_path / "binary")), tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="too short to hold out anything"):
        opened(DataSpec(path=str(tmp_path / "a.txt"), validation_fraction=0.5), tmp_path)
    assert not list((tmp_path / "cache").glob("*.building-*"))


def test_a_vocabulary_too_large_for_the_model(texts: DataSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bytes has 257 ids but model\.vocab_size is 256"):
        opened(texts, tmp_path, vocab_size=256)


def test_the_standard_library_in_seconds(tmp_path: Path) -> None:
    seen: list[int] = []
    made = prepare(
        DataSpec(path="stdlib", validation_fraction=0.02),
        cache=tmp_path,
        sequence_length=128,
        vocab_size=320,
        progress=lambda done, total, what: seen.append(done),
    )
    assert made.train.num_tokens > 3_000_000 and len(seen) >= 2
    text = made.tokenizer.decode(made.train.rows(0, np.arange(500)).tokens.reshape(-1).tolist())
    assert "def " in text and "import " in text
