"""Generation: the cache changes nothing, lengths and stops, and text from a directory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from stretto.checkpoint.safetensors import write_directory
from stretto.data import ByteTokenizer
from stretto.inference import Sampling, generate, generate_text, load_source
from stretto.inference.cache import Cache
from stretto.inference.generate import cached_logits, logits_of
from stretto.inference.text import pieces
from stretto.models import build_model
from stretto.models.attention import LocalAttend
from stretto.models.foreign import ForeignStack
from stretto.spec.errors import CheckpointError, ConfigError, DataError
from stretto.spec.model import ModelSpec, RopeScaling
from stretto.trainer.convert import convert

SPECS = {
    "llama": ModelSpec(num_kv_heads=2, vocab_size=61),
    "llama-3": ModelSpec(vocab_size=61, rope_scaling=RopeScaling(original_positions=16)),
    "windowed": ModelSpec(vocab_size=61, sliding_window=4, dropout=0.5),
    "qwen3": ModelSpec(vocab_size=61, qk_norm=True, tied_embeddings=True),
    "hybrid": ModelSpec(num_kv_heads=2, num_layers=3, vocab_size=61, attention=("linear", "delta", "softmax")),
    "gpt2": ModelSpec(family="gpt2", vocab_size=61, max_positions=40),
}


def build(spec: ModelSpec):
    torch.manual_seed(0)
    model = build_model(spec).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("name", SPECS)
def test_cached_logits_equal_those_of_the_whole_sequence(name):
    model, tokens = build(SPECS[name]), torch.randint(0, 61, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    spans = ((0, 7), (7, 8), (8, 9), (9, 13), (13, 20))
    expected = [logits_of(model, tokens[:stop]) for _, stop in spans]
    with Cache(model, 20) as cache:
        got = [cached_logits(model, cache, tokens[start:stop]) for start, stop in spans]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)])
def test_cache_gives_the_same_tokens(name, sampling):
    model = build(SPECS[name])
    results = [list(generate(model, [1, 2, 3], max_tokens=25, sampling=sampling, cache=c)) for c in (True, False)]
    assert results[0] == results[1] and len(results[0]) == 25


def test_attention_is_given_back_even_when_abandoned():
    model = build(SPECS["llama"])
    stream = generate(model, [1], max_tokens=5)
    next(stream)
    assert not isinstance(model.blocks[0].attention.attend, LocalAttend)
    stream.close()
    assert isinstance(model.blocks[0].attention.attend, LocalAttend)


def test_stop_ends_and_is_not_yielded():
    model = build(SPECS["llama"])
    whole = list(generate(model, [1, 2], max_tokens=12))
    stop = whole[5]
    assert list(generate(model, [1, 2], max_tokens=12, stop=stop)) == whole[: whole.index(stop)]


def test_lengths_are_checked_before_anything_runs():
    model = build(SPECS["gpt2"])
    with pytest.raises(ConfigError, match="max_tokens may be at most 37"):
        generate(model, [1, 2, 3], max_tokens=38)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate(model, [1] * 40, max_tokens=1)
    with pytest.raises(ConfigError, match="no token"):
        generate(model, [], max_tokens=1)
    assert len(list(generate(model, [1, 2, 3], max_tokens=37))) == 37


def test_foreign_models_generate_too():
    class Count(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot((x + 1) % 5, 5).float()

    class Keep(nn.Module):
        def forward(self, tokens):
            return tokens

    stack = ForeignStack(embed=Keep(), blocks=[nn.Identity()], head=Count())
    stack.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    assert list(generate(stack, [2], max_tokens=6)) == [3, 4, 0, 1, 2, 3]


BYTES = ModelSpec(vocab_size=260, tied_embeddings=True, max_positions=64)


def test_text_from_a_directory(tmp_path):
    torch.manual_seed(0)
    model = build_model(BYTES)
    write_directory(tmp_path / "m", BYTES, dict(model.named_parameters()))
    source = load_source(tmp_path / "m")
    assert source.model.outputs.head.weight is source.model.inputs.tokens.weight
    assert not any(p.is_meta for p in source.model.parameters())
    sampling = Sampling(temperature=1.5, seed=4)
    text = "".join(generate_text(source, "def f", max_tokens=40, sampling=sampling))
    tokens = list(generate(model, list(b"def f"), max_tokens=40, sampling=sampling, stop=256))
    assert len(tokens) > 5 and text == ByteTokenizer().decode(tokens)
    assert text == "".join(generate_text(str(tmp_path / "m"), "def f", max_tokens=40, sampling=sampling))


def test_text_from_a_checkpoint_is_that_of_the_directory(tmp_path):
    model = build_model(BYTES)
    write_directory(tmp_path / "m", BYTES, dict(model.named_parameters()))
    checkpoint = convert(str(tmp_path / "m"), str(tmp_path / "run" / "checkpoints"))
    expected = "".join(generate_text(tmp_path / "m", "def f", max_tokens=30))
    for source in (checkpoint, tmp_path / "run"):
        assert "".join(generate_text(source, "def f", max_tokens=30)) == expected
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError):
        load_source(checkpoint)


def test_an_empty_prompt_starts_a_document(tmp_path):
    write_directory(tmp_path / "m", BYTES, {n: p * 0.02 for n, p in build_model(BYTES).named_parameters()})
    assert "".join(generate_text(tmp_path / "m", "", max_tokens=5, sampling=Sampling(seed=1)))


def test_characters_of_several_tokens_come_whole():
    tokens = list("xé→🎵\N{REPLACEMENT CHARACTER}y".encode())
    found = list(pieces(iter(tokens), ByteTokenizer(), before=256))
    assert "".join(found) == "xé→🎵\N{REPLACEMENT CHARACTER}y"
    assert found[:4] == ["x", "é", "→", "🎵"]


def test_sources_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint; name a run's directory"):
        load_source(tmp_path)
    spec = dataclasses.replace(BYTES, vocab_size=5000)
    write_directory(tmp_path / "m", spec, dict(build_model(spec).named_parameters()))
    with pytest.raises(DataError, match="vocabulary of 5000 isn't one of bytes"):
        load_source(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load_source(tmp_path / "m")
