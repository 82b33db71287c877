"""Models against transformers' own classes, and what parallelism relies on."""

from __future__ import annotations

import pytest
import torch

from stretto.models import build_model
from stretto.models.attention import Attention
from stretto.spec.contract import IGNORE, Batch, Place, Stack
from stretto.spec.errors import ConfigError
from stretto.spec.model import ModelSpec
from stretto.spec.sharding import TensorRule

LLAMA = ModelSpec(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
GPT2 = ModelSpec(
    family="gpt2", vocab_size=61, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_positions=40
)


def build(spec: ModelSpec, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = build_model(spec).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def make_batch(spec: ModelSpec, *, rows: int = 2, length: int = 12, documents: list[int] | None = None) -> Batch:
    tokens = torch.randint(0, spec.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).expand(rows, -1)
    of_row = None
    if documents is not None:
        positions = torch.cat([torch.arange(n) for n in documents]).expand(rows, -1)
        of_row = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)]).expand(rows, -1)
    labels = tokens.roll(-1, 1).clone()
    labels[:, -1] = IGNORE
    return Batch(tokens=tokens, labels=labels, positions=positions, documents=of_row, samples=torch.arange(rows))


@pytest.mark.parametrize("spec", [LLAMA, GPT2])
def test_is_a_stack_with_the_agreed_names(spec):
    with torch.device("meta"):
        model = build_model(spec)
    assert isinstance(model, Stack)
    names = {name for name, _ in model.named_parameters()}
    assert all(p.is_meta for p in model.parameters())
    expected = {"inputs.tokens.weight", "outputs.norm.weight", "outputs.head.weight", "blocks.1.attention.q.weight"}
    expected |= {"blocks.0.feed_forward.down.weight", "blocks.0.attention_norm.weight"}
    expected |= {"inputs.positions.weight", "blocks.0.attention.o.bias"} if spec.family == "gpt2" else set()
    assert expected <= names
    modules = dict(model.named_modules())
    for name, rule in model.tensor_rules.items():
        assert name.replace("*", "1") in modules and isinstance(rule, TensorRule)


def test_tied_head_is_one_parameter():
    model = build_model(ModelSpec(tied_embeddings=True))
    assert model.outputs.head.weight is model.inputs.tokens.weight
    assert model.tied == {"outputs.head.weight": "inputs.tokens.weight"}


def test_initial_values():
    model = build_model(GPT2)
    assert model.initial_value("blocks.0.attention_norm.weight") == ("constant", 1.0)
    assert model.initial_value("outputs.norm.bias") == ("constant", 0.0)
    assert model.initial_value("blocks.1.attention.q.bias") == ("constant", 0.0)
    assert model.initial_value("inputs.positions.weight") == ("normal", 0.02)
    assert model.initial_value("blocks.1.attention.o.weight") == ("normal", 0.01)
    assert model.initial_value("blocks.1.feed_forward.down.weight") == ("normal", 0.01)
    assert build_model(ModelSpec(qk_norm=True)).initial_value("blocks.0.attention.q_norm.weight") == ("constant", 1.0)


@pytest.mark.parametrize("spec", [LLAMA, GPT2])
def test_packed_documents_equal_documents_alone(spec):
    model, whole = build(spec), make_batch(spec, documents=[5, 7])
    packed = model(whole, Place())
    for start, stop in ((0, 5), (5, 12)):
        part = Batch(
            tokens=whole.tokens[:, start:stop],
            labels=whole.labels[:, start:stop],
            positions=whole.positions[:, start:stop],
            documents=None,
            samples=whole.samples,
        )
        torch.testing.assert_close(packed[:, start:stop], model(part, Place()), rtol=1e-12, atol=1e-12)


def test_context_builds_no_mask_where_plain_causal_suffices():
    windowed = ModelSpec(sliding_window=12)
    batch = make_batch(windowed, length=12)
    assert build_model(LLAMA).context(batch, Place()).mask is None
    assert build_model(windowed).context(batch, Place()).mask is None
    mask = build_model(ModelSpec(sliding_window=3)).context(batch, Place()).mask
    assert mask.shape == (1, 1, 12, 12) and mask[0, 0].sum(1).tolist() == [1, 2] + [3] * 10


@pytest.mark.parametrize("spec", [LLAMA, GPT2])
@pytest.mark.parametrize("documents", [None, [5, 7]])
def test_recomputed_attention_gives_the_same_gradients(spec, documents):
    spec = ModelSpec(**{f: getattr(spec, f) for f in spec.__dataclass_fields__} | {"dropout": 0.2})
    batch, gradients = make_batch(spec, documents=documents), []
    for recompute in (False, True):
        model = build(spec)
        for module in model.modules():
            if isinstance(module, Attention):
                module.recompute = recompute
        model.loss(model(batch, Place(step=3)), batch).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_dropout_only_in_training_and_the_same_each_time():
    model = build(ModelSpec(dropout=0.3))
    batch = make_batch(ModelSpec())
    first, again = model(batch, Place(step=1)), model(batch, Place(step=1))
    other, none = model(batch, Place(step=2)), model(batch, Place(step=1, training=False))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, none)


def test_explicit_attention_with_little_dropout_equals_fused():
    spec = ModelSpec(num_kv_heads=2, dropout=1e-12)
    model, batch = build(spec), make_batch(spec, documents=[5, 7])
    torch.testing.assert_close(model(batch, Place()), model(batch, Place(training=False)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec(hidden_size=30, num_heads=4), "30 can't be split over 4 heads"),
        (ModelSpec(num_heads=4, num_kv_heads=3), "4 query heads can't share 3"),
        (ModelSpec(head_dim=7), "head size 7 is odd"),
    ],
)
def test_heads_that_do_not_fit(spec, words):
    with pytest.raises(ConfigError, match=words):
        build_model(spec)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_blocks_share_their_graphs(dropout):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, batch = build(ModelSpec(num_layers=5, qk_norm=True, dropout=dropout)), make_batch(ModelSpec())
    expected = model(batch, Place(step=1)), model(batch, Place(step=2))
    for block in model.blocks:
        block.compile(backend=count)
    first, compiled = model(batch, Place(step=1)), len(graphs)
    second = model(batch, Place(step=2))
    torch.testing.assert_close((first, second), expected, rtol=1e-12, atol=1e-12)
    assert 1 <= compiled <= (5 if dropout else 1) and len(graphs) == compiled
