"""Foreign models: wrapped ones give their own logits, and what doesn't fit is said in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from stretto.models import build_model
from stretto.models.foreign import ForeignStack, derive_tensor_rules, from_hugging_face, load_foreign
from stretto.models.foreign.split_check import rules_hold
from stretto.spec.contract import IGNORE, Batch, Place, Stack
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.sharding import TensorRule

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
REGION, COLUMN, ROW = TensorRule.REGION, TensorRule.COLUMN, TensorRule.ROW


def stock(kind: str, **settings) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)


def batch_of(tokens: torch.Tensor) -> Batch:
    labels = tokens.roll(-1, 1).clone()
    labels[:, -1] = IGNORE
    positions = torch.arange(tokens.size(1)).expand(tokens.shape)
    return Batch(
        tokens=tokens, labels=labels, positions=positions, documents=None, samples=torch.arange(tokens.size(0))
    )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt_neox", {}), ("phi", {}), ("olmo", {}), ("gpt2", GPT2), ("llama", {"num_key_value_heads": 2})],
)
def test_wrapped_models_give_their_own_loss_and_gradients(kind, settings):
    model = stock(kind, **settings)
    stack = from_hugging_face(model)
    tokens = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = batch_of(tokens)
    expected = model(input_ids=tokens, labels=tokens).loss
    wanted = torch.autograd.grad(expected, list(stack.parameters()))
    loss = stack.loss(stack(batch, Place()), batch) / (batch.labels != IGNORE).sum()
    got = torch.autograd.grad(loss, list(stack.parameters()))
    assert isinstance(stack, Stack)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_ties_and_values_are_kept():
    stack = from_hugging_face(stock("gpt2", **GPT2))
    assert stack.tied == {"outputs.module.head.weight": "inputs.module.tokens.weight"}
    assert {stack.initial_value(name) for name, _ in stack.named_parameters()} == {None}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("gpt2", {**GPT2, "attn_pdrop": 0.1}, "has dropout 0.1"),
        ("falcon", {}, "missing 1 required positional argument: 'alibi'"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "two candidates for norm"),
        ("opt", {"ffn_dim": 64, "dropout": 0.0}, r"embed_positions \(OPTLearnedPositionalEmbedding\)"),
        ("cohere", {}, "other logits than the original"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(kind, settings, words):
    with pytest.raises(UnsupportedError, match=words) as raised:
        from_hugging_face(stock(kind, **settings))
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    ("kind", "attention", "feed_forward"),
    [
        ("phi", "self_attn", {"mlp.fc1": COLUMN, "mlp.fc2": ROW}),
        ("gpt_neox", "attention", {"mlp.dense_h_to_4h": COLUMN, "mlp.dense_4h_to_h": ROW}),
        ("llama", "self_attn", {"mlp.gate_proj": COLUMN, "mlp.up_proj": COLUMN, "mlp.down_proj": ROW}),
    ],
)
def test_tensor_rules_are_derived_and_hold(kind, attention, feed_forward):
    rules = from_hugging_face(stock(kind)).tensor_rules
    found = {name.removeprefix("blocks.*.module."): rule for name, rule in rules.items()}
    assert found[attention] == found["mlp"] == REGION
    assert feed_forward.items() <= found.items()
    inside = [rule for name, rule in found.items() if name.startswith(f"{attention}.")]
    assert inside.count(ROW) == 1 and inside.count(COLUMN) == len(inside) - 1


@pytest.mark.parametrize("kind", ["phi3", "olmo2"])
def test_rules_that_fail_the_trial_are_dropped(kind):
    assert from_hugging_face(stock(kind)).tensor_rules == {}


def test_a_wrong_split_is_noticed():
    block = nn.ModuleDict({"attn": nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 8))})
    rules = {"attn": REGION, "attn.0": COLUMN, "attn.2": ROW}
    x = torch.randn(2, 3, 8)
    assert not rules_hold(block, rules, lambda: block["attn"](x), parts=2)
    block["attn"][1] = nn.ReLU()
    assert rules_hold(block, rules, lambda: block["attn"](x), parts=2)


class Attention(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(16, 48 if name == "qkv" else 16))


class Layer(nn.Module):
    """Attention and a feed-forward that lies directly in the block."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = Attention(*names)
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)


def test_rules_by_name_and_shape():
    layer = Layer("q_proj", "k_proj", "v_proj", "out_proj")
    expected = {"attn": REGION, "attn.q_proj": COLUMN, "attn.k_proj": COLUMN, "attn.v_proj": COLUMN}
    assert derive_tensor_rules(layer) == {**expected, "attn.out_proj": ROW}


def test_no_rules_where_attention_cannot_be_split():
    assert derive_tensor_rules(Layer("qkv", "out_proj")) == {}
    assert derive_tensor_rules(Layer("qkv", "out_proj"), fused=True) != {}
    assert derive_tensor_rules(Layer("alpha", "beta")) == {}


class Mine(ForeignStack):
    """A stack wrapped by hand: the context is a number that the blocks add."""

    @staticmethod
    def call_block(block, x, context):
        return x + context * torch.tanh(block(x))

    def context(self, batch, place):
        return 0.5


def mine() -> ForeignStack:
    torch.manual_seed(0)
    return Mine(embed=nn.Embedding(11, 8), blocks=[nn.Linear(8, 8) for _ in range(3)], head=nn.Linear(8, 11))


def test_wrapping_by_hand_with_the_default_loss():
    stack, batch = mine(), batch_of(torch.arange(10).view(2, 5))
    logits = stack(batch, Place())
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert isinstance(stack, Stack) and stack.tensor_rules == {}
    assert [name for name, _ in stack.named_parameters()][1] == "blocks.0.module.weight"
    torch.testing.assert_close(stack.loss(logits, batch), expected)


def test_own_loss():
    stack = ForeignStack(
        embed=nn.Embedding(11, 8), blocks=[nn.Identity()], head=nn.Linear(8, 2), loss=lambda p, b: p.sum()
    )
    batch = batch_of(torch.arange(10).view(2, 5))
    predictions = stack(batch, Place())
    assert torch.equal(stack.loss(predictions, batch), predictions.sum())


def test_no_blocks():
    with pytest.raises(UnsupportedError, match="at least one block"):
        ForeignStack(embed=nn.Embedding(2, 2), blocks=[], head=nn.Linear(2, 2))


def foreign(module: str | None, layers: int = 3) -> ModelSpec:
    return ModelSpec(family="foreign", module=module, num_layers=layers)


def test_loading_from_a_file_even_under_the_meta_device(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n"
        "from stretto.models.foreign import ForeignStack\n"
        "def build(spec):\n"
        "    blocks = [nn.Linear(4, 4) for _ in range(spec.num_layers)]\n"
        "    return ForeignStack(embed=nn.Embedding(9, 4), blocks=blocks, head=nn.Linear(4, 9))\n"
        "def number():\n"
        "    return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        stack = build_model(foreign("my_model.py:build"))
    assert len(stack.blocks) == 3 and not any(p.is_meta for p in stack.parameters())
    with pytest.raises(UnsupportedError, match="returned a int, which is neither"):
        load_foreign(foreign("my_model.py:number"))
    with pytest.raises(ConfigError, match="no function 'built'; did you mean 'build'"):
        load_foreign(foreign("my_model.py:built"))


def test_loading_from_a_package(monkeypatch):
    module = type(sys)("stretto_test_models")
    module.mine, module.neox = mine, lambda: stock("gpt_neox")
    monkeypatch.setitem(sys.modules, "stretto_test_models", module)
    assert isinstance(load_foreign(foreign("stretto_test_models:mine")), Mine)
    assert len(load_foreign(foreign("stretto_test_models:neox", 2)).blocks) == 2
    with pytest.raises(ConfigError, match=r"built 3 layers, but model.num_layers is 5"):
        load_foreign(foreign("stretto_test_models:mine", 5))


@pytest.mark.parametrize(
    ("module", "words"),
    [(None, "names no function"), ("none.py:f", "isn't a file"), ("no_such_package:f", "can't be imported")],
)
def test_module_that_is_not_there(module, words):
    with pytest.raises(ConfigError, match=words):
        load_foreign(foreign(module))


def test_the_example_builds():
    path = Path(__file__).parents[2] / "examples" / "foreign_gpt_neox.py"
    stack = load_foreign(foreign(f"{path}:build", 4))
    batch = batch_of(torch.arange(10).view(1, 10))
    loss = stack.loss(stack(batch, Place()), batch)
    loss.backward()
    assert torch.isfinite(loss) and stack.tensor_rules
    assert len(path.read_text().splitlines()) < 60
