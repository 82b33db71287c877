"""Time of a matrix product on a device of many equal processors: work comes in tiles, and tiles in waves.

    [m, k] x [k, n]    ceil(m / a) x ceil(n / b) tiles of a x b; P tiles at a time, one on each of P processors

      ┌────┬────┬──┐   the last wave lasts as long as a full one, and a tile that hangs over the edge as long as a
      │    │    │  │   whole one.  Libraries pick the tile that is quickest; small tiles fill waves better and reuse
      ├────┼────┼──┤   less of what they load: SHARES of the rate that the largest reach (NVIDIA, Matrix
      └────┴────┴──┘   multiplication background, sections 3 and 4).

Tensor parallelism makes products narrow, so that waves are left open: this is where its efficiency goes.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (256, 64, 0.85), (64, 256, 0.85), (128, 64, 0.8))
"""Rows, columns and share of the rate."""
DRAIN = 160
"""Depth of the inner dim that a processor could have worked off while it loads a tile's first operands and stores its
result: some 5 microseconds on an A100, whose processor works off 256 x 128 x 32 of a tile in one."""
PROCESSORS = {
    "a100": 108, "h100": 132, "h200": 132, "b200": 148, "mi250x": 110, "leonardo": 124, "fire-flyer": 108,
    "rtx-4090": 128,
}  # fmt: skip
"""Multiprocessors (compute units) of a device, from the vendors' data sheets."""


@lru_cache(maxsize=65536)
def product_operations(m: int, n: int, k: int, processors: int = 0) -> float:
    """Operations that a device at its rate does in the time of the product; 2 m n k where waves aren't known (0).

    >>> product_operations(2048, 5120, 5120) == 2 * 2048 * 5120 * 5120
    True
    >>> round(product_operations(2048, 2560, 5120, 108) / (2 * 2048 * 2560 * 5120), 2)
    1.1
    """
    if not processors:
        return 2.0 * m * n * k
    waves = (
        (ceil(ceil(m / rows) * ceil(n / columns) / processors), rows * columns / share)
        for rows, columns, share in TILES
    )
    return min(number * processors * 2.0 * tile * (k + DRAIN) for number, tile in waves)


def processors_of(name: str) -> int:
    """Multiprocessors of a cluster's devices by the preset in its name (``a100:64``); 0: not known."""
    return PROCESSORS.get(name.partition(":")[0], 0)


def weight_operations(tokens: int, inputs: int, outputs: int, processors: int = 0) -> tuple[float, float]:
    """Of a weight [inputs, outputs] over ``tokens``: its forward product, and each of the two backward on average."""
    forward = product_operations(tokens, outputs, inputs, processors)
    of_inputs = product_operations(tokens, inputs, outputs, processors)
    of_weights = product_operations(inputs, outputs, tokens, processors)
    return forward, (of_inputs + of_weights) / 2
