"""Keyed dropout: uniform, independent over every coordinate, and cut where a plan cuts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stretto.models.context import Context
from stretto.models.dropout import (
    AttentionDropout,
    Dropout,
    drop_attention,
    extend,
    mix,
    mix_integer,
    sample_keys,
    signed,
)
from stretto.spec.contract import Place, SequencePart


def context(*, samples=(0, 1, 2, 3), **place) -> Context:
    return Context(place=Place(**place), samples=torch.tensor(samples), mask=None, rotary=None)


def dropped(p=0.5, site=1, shape=(4, 64, 96), **place) -> torch.Tensor:
    return Dropout(p, site)(torch.ones(shape), context(samples=tuple(range(shape[0])), **place)) != 0


def test_tensor_and_integer_mixing_agree():
    words = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    mixed = mix(torch.tensor([signed(w) for w in words]))
    assert mixed.tolist() == [signed(mix_integer(w)) for w in words]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    x = Dropout(p, 1)(torch.ones(8, 128, 128), context(samples=range(8), step=5))
    count = x.numel()
    assert abs((x != 0).sum().item() / count - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(x[x != 0].unique(), torch.tensor([1 / (1 - p)]))


def test_nothing_happens_at_zero_or_outside_training():
    x = torch.ones(1, 2, 3)
    assert Dropout(0.0, 1)(x, context()) is x
    assert Dropout(0.5, 1)(x, context(training=False)) is x


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"step": 1},
        {"site": 2},
        {"token_start": 1},
    ],
)
def test_masks_of_other_keys_are_independent(other):
    a, b = dropped(), dropped(**other)
    agreement = (a == b).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_neighbours_along_every_dim_are_independent():
    keep = dropped(shape=(16, 64, 128))
    for dim in range(3):
        agreement = (keep.narrow(dim, 1, keep.size(dim) - 1) == keep.narrow(dim, 0, keep.size(dim) - 1)).double()
        assert abs(agreement.mean().item() - 0.5) < 5 * 0.5 / agreement.numel() ** 0.5


def test_every_bit_of_a_key_is_balanced():
    keys = extend(sample_keys(context(), 3), torch.arange(50_000)).flatten()
    for bit in range(64):
        ones = ((keys >> bit) & 1).double().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / keys.numel() ** 0.5


def test_a_slice_of_the_sequence_drops_what_the_whole_drops():
    x = torch.randn(4, 12, 8)
    whole = Dropout(0.4, 2)(x, context(step=1))
    parts = [Dropout(0.4, 2)(x[:, s : s + 4], context(step=1, token_start=s)) for s in (0, 4, 8)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_some_samples_and_heads_drop_what_all_drop():
    weights, full = torch.rand(4, 6, 5, 5), context(step=1)
    whole = drop_attention(weights, 0.4, 2, full)
    half = dataclasses.replace(full, samples=full.samples[2:], place=Place(step=1, head_start=3))
    assert torch.equal(whole[2:, 3:], drop_attention(weights[2:, 3:], 0.4, 2, half))


def test_documents_elsewhere_drop_what_their_rows_drop():
    """Tokens 5 to 8 of sample 2 and 1 to 3 of sample 0, side by side on a tp rank whose first is the second of them."""
    whole = Dropout(0.5, 1)(torch.ones(4, 9, 32), context())
    sources = torch.tensor([[2, 5], [2, 6], [2, 7], [2, 8], [0, 1], [0, 2], [0, 3]])
    part = SequencePart(shares=(((0, 4),),), tokens=torch.zeros(7, dtype=torch.int64), documents=None, sources=sources)
    moved = dataclasses.replace(context(samples=(0,), token_start=1), part=part)
    found = Dropout(0.5, 1)(torch.ones(1, 6, 32), moved)
    assert torch.equal(found, torch.cat([whole[2, 6:9], whole[0, 1:4]]).unsqueeze(0))
    weights = AttentionDropout(0.5, 3, context())((0, 2), (0, 9), (0, 9))
    of_document = AttentionDropout(0.5, 3, moved).of_document(2, 5)((0, 2), (0, 4), (0, 4))
    assert torch.equal(of_document, weights[2:3, :, 5:9, 5:9])
