"""How much slower a collective is because its flows share links of a switched network with others.

In a leaf-spine network each flow takes one of the U paths upward.  Which one is decided by a hash or a static table, so
m flows are m balls thrown into U bins, and a collective is over when its slowest flow is, the one in the fullest bin:

    E[fullest bin] = sum over k >= 1 of P(some bin holds k or more),   P = 1 - (1 - P(Poisson(m / U) >= k))^U

    64 adapters, U = 64:   8 flows 1.4    16 flows 2.0    32 flows 2.7    64 flows 4.0

A flow that is split into s parts on paths of their own throws s m balls of 1/s each, which tends to m / U (Addanki et
al. 2024, "Challenging the Need for Packet Spraying"; static routing on InfiniBand: Hoefler et al. 2008, "Multistage
Switches are not Crossbars").
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, expm1, log1p

NEGLIGIBLE = 1e-4
"""Probability below which fuller bins don't count."""

MANY = 500.0
"""Parts on a path from which on all paths are taken to be equally full."""


@lru_cache(maxsize=4096)
def slowdown(flows: int, paths: int, splits: int = 1) -> float:
    """Expected load of the fullest path over one flow's own load, at least 1.

    >>> round(slowdown(64, 64), 1), round(slowdown(8, 64), 1), slowdown(1, 64)
    (4.0, 1.4, 1.0)
    >>> round(slowdown(64, 64, 64), 1)
    1.3
    """
    if flows <= 1:
        return 1.0
    mean = flows * splits / paths
    if mean > MANY:
        return max(1.0, flows / paths)
    fullest, reached, term, below = 0.0, 0, exp(-mean), 0.0
    while True:
        below += term  # P(Poisson <= reached)
        reached += 1
        beyond = min(1.0, max(0.0, 1.0 - below))
        some = 1.0 if beyond >= 1.0 else -expm1(paths * log1p(-beyond))
        fullest += some
        term *= mean / reached
        if reached > mean and some < NEGLIGIBLE:
            return max(1.0, fullest / splits)
