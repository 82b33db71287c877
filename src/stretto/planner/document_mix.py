"""Documents of unequal lengths: what a step takes on a static mesh and in groups of their own, by the same costs.

    lengths ─┬─ packed into rows, each cut over cp ──► the fullest seat of each row, row after row      static
             └─ assign(...)                        ──► the fullest rank                                 dynamic

A seat of a row works on its tokens and on the pairs that its queries see, and hides what it passes on under the latter;
that is sent only to those who see it (``sequence_volume`` with what the documents let through).  Both are sums of the
same costs, so what a ring of unequal blocks waits for, and what a process adds to a message, is in neither.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from stretto.planner.document_costs import Costs
from stretto.planner.document_groups import Placement, assign, first_fit
from stretto.planner.sequence_volume import Heads, sequence_volume
from stretto.spec.errors import ConfigError
from stretto.spec.reach import Reach, Seats
from stretto.spec.sequence import Arrangement, cut_sequence

ONE = Heads(rows=1, heads=1, kv_heads=1, head_size=1, element_bytes=2)
"""A single number of a key, to count tokens that travel."""
PASSED = 16
"""Bytes of ``ONE`` for a token that is passed on: its key and value, the same again in the backward, and gradients."""
SAMPLED = 64
"""Rows whose time is worked out at most; of more, some evenly apart."""
LOGNORMAL = "lognormal"
FORM = f'"{LOGNORMAL}:median=2048,sigma=1.4,min=64,max=65536", or a file with one length a line'


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A distribution of documents' lengths: some seen, or a log-normal one."""

    seen: tuple[int, ...] = ()
    """Lengths in tokens, drawn from again and again; empty: log-normal."""
    median: float = 2048.0
    sigma: float = 1.4
    """Of the logarithm."""
    least: int = 64
    most: int = 65536

    def draw(self, tokens: int, *, seed: int = 0, longest: int | None = None) -> list[int]:
        """Lengths of at most ``longest`` that are together at least ``tokens``."""
        chance, found, total = random.Random(seed), list[int](), 0
        top = min(self.most, longest or self.most)
        while total < tokens:
            length = chance.choice(self.seen) if self.seen else self._next(chance)
            found.append(min(top, length))
            total += found[-1]
        return found

    def _next(self, chance: random.Random) -> int:
        return min(self.most, max(self.least, round(chance.lognormvariate(math.log(self.median), self.sigma))))


def mix_of(text: str) -> Mix:
    """What ``--lengths`` says; ConfigError where that is neither a mix nor a file of lengths.

    >>> mix_of("lognormal:median=1000,max=8192").median
    1000.0
    """
    name, _, rest = text.partition(":")
    if name != LOGNORMAL:
        return _of_file(text)
    keys = {"median": float, "sigma": float, "min": int, "max": int}
    given: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key in given:
            raise ConfigError(f"--lengths {text} gives {key} twice; write each once.")
        try:
            given[key] = keys[key](value)
        except (KeyError, ValueError):
            raise ConfigError(f"{part!r} of --lengths {text} can't be read; it may be {FORM}.") from None
    mix = Mix(
        median=given.get("median", 2048.0),
        sigma=given.get("sigma", 1.4),
        least=int(given.get("min", 64)),
        most=int(given.get("max", 65536)),
    )
    # A sigma of 10 already spreads lengths over as many powers of ten; far above it they overflow.
    if not (0 < mix.median < math.inf and 0 <= mix.sigma <= 10 and 1 <= mix.least <= mix.most):
        raise ConfigError(f"--lengths {text} has no such lengths: median above 0, sigma 0 to 10, 1 <= min <= max.")
    return mix


def _of_file(text: str) -> Mix:
    path = Path(text).expanduser()
    try:
        lengths = tuple(int(line) for line in path.read_text().split())
    except OSError as error:
        raise ConfigError(f"--lengths {text} can't be read ({error.strerror}); it may be {FORM}.") from error
    except ValueError:
        raise ConfigError(f"--lengths {text} isn't a file of whole numbers; it may be {FORM}.") from None
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"--lengths {text} needs lengths of at least one token; it may be {FORM}.")
    return Mix(seen=lengths, least=1, most=max(lengths))


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A step's documents on a static mesh and in dynamic groups, in the unit of the costs."""

    static: float
    dynamic: float
    lower_bound: float
    """No placement in groups is faster."""
    documents: int
    sizes: dict[int, int]
    """Documents by the number of their ranks."""

    @property
    def gain(self) -> float:
        """How many times faster dynamic groups are."""
        return self.static / self.dynamic


def compared(
    lengths: Sequence[int], costs: Costs, *, cp: int, replicas: int, row: int, memory_tokens: int, way: str = "ring"
) -> Compared:
    """A step of documents of ``lengths``, on ``cp`` x ``replicas`` ranks.

    Args:
        cp: ranks that cut every row on the static mesh.
        replicas: rows that are worked on at once there.
        row: tokens of a row.
        memory_tokens: tokens of a micro-batch on a rank with dynamic groups.
        way: ``plan.context``, as far as groups know it.
    """
    placement = assign(lengths, cp * replicas, costs, memory_tokens=memory_tokens)
    return Compared(
        static=static_time(lengths, costs, cp=cp, replicas=replicas, row=row, way=way),
        dynamic=placement.makespan,
        lower_bound=placement.lower_bound,
        documents=len(lengths),
        sizes=_sizes(placement),
    )


def _sizes(placement: Placement) -> dict[int, int]:
    sizes = [piece.ranks for piece in placement.pieces]
    return {size: sizes.count(size) for size in sorted(set(sizes))}


def static_time(lengths: Sequence[int], costs: Costs, *, cp: int, replicas: int, row: int, way: str = "ring") -> float:
    """The step of a static mesh; rows in the order in which they were packed, dealt out to the replicas."""
    order = sorted(lengths, reverse=True)
    rows: dict[int, list[int]] = {}
    for length, number in zip(order, first_fit(order, row), strict=True):
        rows.setdefault(number, []).append(length)
    packed = list(rows.values())
    times = [row_time(documents, costs, cp=cp, way=way) for documents in packed[:: -(-len(packed) // SAMPLED)]]
    if len(times) < len(packed):
        return sum(times) / len(times) * len(packed) / replicas
    return max(sum(times[replica::replicas]) for replica in range(replicas))


def row_time(documents: Sequence[int], costs: Costs, *, cp: int, way: str = "ring") -> float:
    """The fullest seat of a row of documents that is cut in zigzag over ``cp`` ranks; ``way``: ``plan.context``.

    Ranks that share heads exchange all of a row, whatever its documents; of a mesh each seat is told as if its ranks
    were seats of a ring.
    """
    row = sum(documents)
    if way == "ulysses":
        pairs = sum(map(costs.pairs, documents))
        return costs.token * -(-row // cp) + max(costs.pair * pairs / cp, costs.sent(cp) * row)
    seats = cut_sequence(row, cp, "zigzag")
    starts = [0, *accumulate(documents)]
    who = Arrangement(ranks=cp, outside=way if way in ("token-ring", "all-gather") else "ring")
    plain = len(documents) == 1 and costs.window is None
    reach = Reach.whole(seats) if plain else _reach(seats, starts, costs.window)
    worst = 0.0
    for seat, ranges in enumerate(seats):
        volume = sequence_volume(who, seats, seat, ONE, sees=lambda _: reach)
        passed = costs.passed(cp) * (volume.forward + volume.backward) / PASSED
        messages = costs.sent(cp) * row if way == "mesh" else passed
        attention = costs.pair * sum(_pairs(costs, starts, part) for part in ranges)
        tokens = sum(stop - start for start, stop in ranges)
        worst = max(worst, costs.token * tokens + max(attention, messages))
    return worst


def _reach(seats: Seats, starts: Sequence[int], window: int | None) -> Reach:
    """Who sees whom in a row of documents that begin at ``starts``, the last of which is the row's end."""

    def low(token: int) -> int:
        begin = starts[bisect_right(starts, token) - 1]
        return begin if window is None else max(begin, token + 1 - window)

    def high(token: int) -> int:
        end = starts[bisect_right(starts, token)]
        return end if window is None else min(end, token + window)

    return Reach.of(seats, low, high)


def _pairs(costs: Costs, starts: Sequence[int], part: tuple[int, int]) -> int:
    """Pairs of the queries ``[start, stop)`` of a row."""
    found, (start, stop) = 0, part
    while start < stop:
        at = bisect_right(starts, start) - 1
        end = min(stop, starts[at + 1])
        found += costs.pairs(end - starts[at]) - costs.pairs(start - starts[at])
        start = end
    return found
