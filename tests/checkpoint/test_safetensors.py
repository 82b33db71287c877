"""Hugging Face directories, in both directions, against transformers' own classes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from stretto.checkpoint.safetensors import HuggingFaceReader, write_directory
from stretto.models import build_model
from stretto.models.hugging_face import parameter_shapes
from stretto.spec.contract import Batch, Place
from stretto.spec.errors import CheckpointError
from stretto.spec.hugging_face import model_from_config
from stretto.spec.model import ModelSpec
from stretto.spec.sharding import Sharding, cut

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"bos_token_id": None, "eos_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 1000.0}

MODELS = {
    "llama": ("llama", SIZES),
    "llama-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama-3": ("llama", {**SIZES, "rope_parameters": LLAMA3}),
    "llama-wide-head": ("llama", {**SIZES, "head_dim": 24}),
    "mistral": ("mistral", {**SIZES, "sliding_window": 5}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": ("gpt2", {**GPT2, "tie_word_embeddings": False, "n_inner": 80}),
}
TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(3))


def stock(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A transformers model whose every parameter is random, biases and norms included."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def load(directory, spec: ModelSpec | None = None):
    """Our model with the weights of a directory."""
    spec = spec or model_from_config(json.loads((directory / "config.json").read_text()))
    model = build_model(spec)
    with HuggingFaceReader(directory, spec) as reader:
        state = {name: reader.read(Sharding.whole(name, shape)) for name, shape in parameter_shapes(spec).items()}
    model.load_state_dict(state, assign=True)
    return model


def our_logits(model) -> torch.Tensor:
    positions = torch.arange(TOKENS.size(1)).expand(TOKENS.shape)
    batch = Batch(tokens=TOKENS, labels=TOKENS, positions=positions, documents=None, samples=torch.arange(2))
    with torch.no_grad():
        return model(batch, Place(training=False))


def all_in_float64(model: transformers.PreTrainedModel) -> ExitStack:
    """Patch the float32 upcasts of transformers (norm, rotary, softmax) to float64."""
    stack = ExitStack()

    def norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * exact_frequencies(self.config)
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm"):
            stack.enter_context(mock.patch.object(kind, "forward", norm))
        if kind.__name__.endswith("RotaryEmbedding"):
            stack.enter_context(mock.patch.object(kind, "forward", rotary))
    softmax = torch.softmax
    stack.enter_context(mock.patch.object(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim)))
    return stack


def exact_frequencies(config: transformers.PretrainedConfig) -> torch.Tensor:
    """Inverse frequencies in float64, written out a second time after the Llama 3.1 reference."""
    settings = config.rope_parameters
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = []
    for i in range(0, size, 2):
        frequency = settings["rope_theta"] ** (-i / size)
        if settings["rope_type"] == "llama3":
            wavelength = 2 * torch.pi / frequency
            low = settings["original_max_position_embeddings"] / settings["low_freq_factor"]
            high = settings["original_max_position_embeddings"] / settings["high_freq_factor"]
            if wavelength > low:
                frequency /= settings["factor"]
            elif wavelength >= high:
                smooth = settings["original_max_position_embeddings"] / wavelength - settings["low_freq_factor"]
                smooth /= settings["high_freq_factor"] - settings["low_freq_factor"]
                frequency = (1 - smooth) * frequency / settings["factor"] + smooth * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_equal_stock_transformers(name, tmp_path):
    theirs = stock(name)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(our_logits(load(tmp_path)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_float64_logits_equal_transformers_without_its_upcasts(name, tmp_path):
    theirs = stock(name, torch.float64)
    theirs.save_pretrained(tmp_path)
    with all_in_float64(theirs), torch.no_grad():
        expected = theirs(TOKENS).logits
    ours = load(tmp_path)
    assert ours.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(our_logits(ours), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_transformers_loads(name, tmp_path):
    kind, settings = MODELS[name]
    spec = model_from_config(transformers.AutoConfig.for_model(kind, **settings).to_dict())
    torch.manual_seed(1)
    ours = build_model(spec)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.2)
    tensors = dict(ours.named_parameters())
    write_directory(tmp_path / "out", spec, tensors.__getitem__, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = theirs.eval()(TOKENS).logits
    torch.testing.assert_close(our_logits(ours), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_logits(load(tmp_path / "out")), our_logits(ours), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sharded_index_and_names_without_prefix(name, tmp_path):
    theirs = stock(name)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    theirs.save_pretrained(tmp_path / "bare")
    whole = load_file(tmp_path / "bare" / "model.safetensors")
    bare = {k.removeprefix("model.").removeprefix("transformer."): v for k, v in whole.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    expected = our_logits(load(tmp_path / "shards"))
    assert torch.equal(our_logits(load(tmp_path / "bare")), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", [2, 5])
def test_slices_are_slices_of_the_whole(name, parts, tmp_path):
    stock(name).save_pretrained(tmp_path)
    spec = model_from_config(json.loads((tmp_path / "config.json").read_text()))
    with HuggingFaceReader(tmp_path, spec) as reader:
        for parameter, shape in parameter_shapes(spec).items():
            whole = reader.read(Sharding.whole(parameter, shape))
            assert tuple(whole.shape) == shape
            for dim in range(len(shape)):
                pieces = [
                    reader.read(cut(parameter, shape, dim=dim, parts=parts, index=index)) for index in range(parts)
                ]
                assert torch.equal(torch.cat(pieces, dim), whole)


def test_write_converts_copies_the_tokenizer_and_overwrites_nothing(tmp_path):
    spec = ModelSpec()
    tensors = dict(build_model(spec).named_parameters())
    (tmp_path / "tok.json").write_text("{}")
    write_directory(tmp_path / "out", spec, tensors, dtype=torch.bfloat16, tokenizer=tmp_path / "tok.json")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(CheckpointError, match="exists already"):
        write_directory(tmp_path / "out", spec, tensors)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    spec = ModelSpec()
    tensors = dict(build_model(spec).named_parameters())
    del tensors["blocks.1.feed_forward.down.weight"]
    with pytest.raises(KeyError):
        write_directory(tmp_path / "out", spec, tensors)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_named(tmp_path):
    stock("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, spec = load_file(path), model_from_config(json.loads((tmp_path / "config.json").read_text()))

    def refused(tensors: dict[str, torch.Tensor], words: str) -> None:
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=words):
            HuggingFaceReader(tmp_path, spec)

    norm = "model.norm.weight"
    refused({k: v for k, v in whole.items() if k != norm}, "model.norm.weight is missing")
    refused({**whole, norm: torch.zeros(7)}, r"model.norm.weight is \[7\] where the model has \[32\]")
    refused({**whole, "model.layers.0.mlp.up_proj.bias": torch.zeros(48)}, "mlp.up_proj.bias has no place")
    save_file(whole, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        HuggingFaceReader(tmp_path, spec)


def test_directories_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        HuggingFaceReader(tmp_path / "none", ModelSpec())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, which is not read"):
        HuggingFaceReader(tmp_path, ModelSpec())
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors"):
        HuggingFaceReader(tmp_path, ModelSpec())
