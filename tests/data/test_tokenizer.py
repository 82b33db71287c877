"""Bytes and tokenizer.json."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from stretto.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from stretto.spec.errors import ConfigError, DataError


def make(folder: Path, *, end: str | None = "<|endoftext|>", size: int = 300) -> Path:
    """Train a small byte-level BPE and write it to ``folder``."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(["def hello(self):\n    return self.hello()\n"] * 20, trainer)
    if end is not None:
        engine.add_special_tokens([AddedToken(end, special=True)])
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.end_of_text for i in ids)
    assert tokenizer.decode([*ids, tokenizer.end_of_text, 300]) == text.encode(errors="replace").decode()
    assert np.array_equal(tokenizer.encode_many([text])[0], ids)


def test_a_file_round_trips_and_batches_alike(tmp_path: Path) -> None:
    file = make(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.fingerprint == load_tokenizer(str(file)).fingerprint
    text = "def grün(self):\n    return 1"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
    assert [a.tolist() for a in tokenizer.encode_many([text, ""])] == [ids, []]
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1 and max(ids) < tokenizer.vocab_size


def test_truncation_and_padding_in_the_file_are_off(tmp_path: Path) -> None:
    file = make(tmp_path)
    before = FileTokenizer(file)
    engine = Tokenizer.from_file(str(file))
    engine.enable_truncation(3)
    engine.enable_padding(length=50)
    engine.save(str(file))
    after = FileTokenizer(file)
    assert after.encode("def hello(self): return") == before.encode("def hello(self): return")
    assert after.fingerprint == before.fingerprint


def test_the_end_is_found_by_name_or_by_configuration(tmp_path: Path) -> None:
    file = make(tmp_path, end="</s>")
    plain = FileTokenizer(file)
    assert plain.end_of_text == Tokenizer.from_file(str(file)).token_to_id("</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    configured = FileTokenizer(file)
    assert configured.end_of_text == Tokenizer.from_file(str(file)).token_to_id("a") != plain.end_of_text
    assert configured.fingerprint != plain.fingerprint


def test_a_file_without_an_end_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token that ends a document: none of its added tokens \['<odd>'\]"):
        FileTokenizer(make(tmp_path, end="<odd>"))


def test_another_vocabulary_has_another_fingerprint(tmp_path: Path) -> None:
    prints = {ByteTokenizer().fingerprint}
    prints |= {FileTokenizer(make(tmp_path, size=size)).fingerprint for size in (270, 280)}
    assert len(prints) == 3


def test_tokenizers_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"There is no tokenizer at .*tokenizer\.json; .* may be 'bytes'"):
        load_tokenizer(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"isn't a Hugging Face tokenizer\.json"):
        load_tokenizer(str(file))
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "tokenizers":
            raise ImportError(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"install stretto\[tokenizers\]"):
        load_tokenizer(str(file))
