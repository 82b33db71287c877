"""Bytes that one rank sends for a linear layer and micro-batch, for both ways to cut it over cp (LASP, LASP-2).

A state is BGKK numbers.  LASP hands it on once per hop, LASP-2 gives it to the n - 1 others; neither grows with the
tokens.  A decay that depends on the data adds one number a head to what LASP-2 gathers (its papers' decays are
constants), the delta rule a matrix [K, K], since its states are turned and not only scaled.
"""

from __future__ import annotations

from itertools import pairwise

from stretto.planner.sequence_volume import Heads, Volume
from stretto.spec.sequence import Ranges


def state_volume(way: str, kind: str, shares: tuple[Ranges, ...], rank: int, heads: Heads) -> Volume:
    """What ``rank`` of cp sends when the tokens are cut in ``shares``.

    Args:
        way: ``plan.linear_context``.
        kind: ``linear`` or ``delta``.
    """
    number = heads.rows * heads.kv_heads * heads.sum_bytes
    state = number * heads.head_size**2
    if way == "all-gather":
        times = (len(shares) - 1) * len(shares[rank])
        return Volume(forward=times * (state + (number if kind == "linear" else state)), backward=times * state)
    order = sorted((part, owner) for owner, ranges in enumerate(shares) for part in ranges)
    owners = [owner for _, owner in order]
    hops = list(pairwise(owners))
    ahead = sum(giver == rank != taker for giver, taker in hops)
    behind = sum(taker == rank != giver for giver, taker in hops)
    return Volume(forward=ahead * state, backward=behind * state)
