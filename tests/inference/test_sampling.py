"""Sampling: what is kept, and that a seed decides."""

from __future__ import annotations

import pytest
import torch

from stretto.inference.sampling import Sampler, Sampling, distribution
from stretto.spec.errors import ConfigError

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.1, 0.3, 0.1]),
        (Sampling(temperature=0.5), [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        (Sampling(top_k=2), [5 / 8, 0, 3 / 8, 0]),
        (Sampling(top_k=9), [0.5, 0.1, 0.3, 0.1]),
        (Sampling(top_p=0.6), [5 / 8, 0, 3 / 8, 0]),
        (Sampling(top_p=0.4), [1, 0, 0, 0]),
        (Sampling(top_p=1e-9), [1, 0, 0, 0]),
        (Sampling(top_k=2, top_p=0.6), [1, 0, 0, 0]),
    ],
)
def test_distribution(sampling, expected):
    torch.testing.assert_close(distribution(LOGITS, sampling), torch.tensor(expected, dtype=torch.float64))


def test_draws_follow_the_distribution_and_the_seed():
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed))
        return [sampler(LOGITS) for _ in range(2000)]

    first = draws(0)
    assert first == draws(0) and first != draws(1)
    shares = torch.bincount(torch.tensor(first), minlength=4) / 2000
    assert (shares - LOGITS.exp()).abs().max() < 0.05


def test_greedy_takes_the_likeliest():
    assert Sampler(Sampling(temperature=0))(LOGITS.float()) == 0


def test_next_to_no_temperature_takes_the_likeliest():
    assert Sampler(Sampling(temperature=1e-320))(LOGITS.float()) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
