"""Group-interleaved: several chunks per rank, micro-batches in groups of any size, the backward split.

Megatron-LM's interleaved schedule sends R micro-batches through a chunk before the next; a larger or smaller group is
its ``microbatch_group_size_per_vp_stage``.  With I and W apart a gradient passes a rank in the time of I, so each
rank runs R - 1 - r forwards fewer ahead: less memory, and with groups of R or more a bubble of (R - 1) (F + I) / V
where interleaved 1F1B has (R - 1) (F + I + W) / V.  Smaller groups trade time for memory.  W follows I at once.

4 ranks, 2 chunks, 4 micro-batches, groups of 2:

    rank 0 │F0-F1-      F0-F1-F2-F3-         I0-W0-   F2-I1-W1-F3-I0-W0-I1-W1-   I2-W2-   I3-W3-I2-W2-I3-W3-
    rank 1 │   F0-F1-      F0-F1-F2-      I0-W0-F3-I1-W1-F2-I0-W0-F3-I1-W1-   I2-W2-   I3-W3-I2-W2-I3-W3-
    rank 2 │      F0-F1-      F0-F1-   I0-W0-F2-I1-W1-F3-I0-W0-F2-I1-W1-F3-I2-W2-   I3-W3-I2-W2-I3-W3-
    rank 3 │         F0-F1-      F0-I0-W0-F1-I1-W1-F2-I0-W0-F3-I1-W1-F2-I2-W2-F3-I3-W3-I2-W2-I3-W3-
    time   │0                                                                                             16

Turns are counted in groups of G.  A micro-batch comes back from its way through the ranks after R / 2 forwards of a
rank that also runs I and W between, so chunk c of group n has its turn K c turns after its chunk 0, where K G is at
least R / 2, and one more for every V / gcd(V, K) chunks, because no turn is had twice:

    turn(n, c) = V n + K c + c gcd(V, K) // V         V = 2, R = 4, G = 2: K = 1
        0        1        2        3                  backward in the same turns, chunks in reverse; I of a turn
    group 0  group 0  group 1  group 1                runs behind the F of the turn that is as much later as the
    chunk 0  chunk 1  chunk 0  chunk 1                last chunk is than the first, and R - 1 - r micro-batches more
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.families.option import whole
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]


def group_interleaved(*, ranks: int, microbatches: int, chunks: int, group: int | str | None = None) -> Schedule:
    """Stage s on rank s mod R; ``group`` micro-batches pass a chunk before the next, R where left out."""
    import numpy as np

    size = ranks if group is None else whole("group", group)
    chunk, micro = _turns(ranks, microbatches, chunks, size)
    apart = -(-((ranks + 1) // 2) // size)
    last = (apart * (chunks - 1) + (chunks - 1) * math.gcd(chunks, apart) // chunks) * size
    columns = [_columns(chunk, micro, chunks, ahead=last + ranks - rank - 1) for rank in range(ranks)]
    return Schedule.from_columns(
        kind=np.concatenate([kind for kind, _, _ in columns]),
        stage=np.concatenate([chunk * ranks + rank for rank, (_, chunk, _) in enumerate(columns)]),
        microbatch=np.concatenate([micro for _, _, micro in columns]),
        offsets=np.arange(ranks + 1) * 3 * chunks * microbatches,
        name="group-interleaved",
        num_stages=ranks * chunks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks * chunks)],
    )


def _turns(ranks: int, microbatches: int, chunks: int, size: int) -> tuple[Numbers, Numbers]:
    """Chunk and micro-batch of each place in the turns, -1 where a turn or a part of it is nobody's."""
    import numpy as np

    groups = -(-microbatches // size)
    apart = -(-((ranks + 1) // 2) // size)
    each = np.arange(chunks)
    turn = chunks * np.arange(groups)[:, None] + apart * each + each * math.gcd(chunks, apart) // chunks
    chunk = np.full((turn.max() + 1, size), -1)
    micro = np.full((turn.max() + 1, size), -1)
    chunk[turn] = each[None, :, None]
    micro[turn] = (np.arange(groups)[:, None] * size + np.arange(size))[:, None, :]
    chunk[micro >= microbatches] = -1
    return chunk.ravel(), micro.ravel()


def _columns(chunk: Numbers, micro: Numbers, chunks: int, *, ahead: int) -> tuple[Numbers, Numbers, Numbers]:
    """Kind, chunk and micro-batch of one rank: at each place its F, and I and W of the place ``ahead`` before."""
    import numpy as np

    places = np.arange(len(chunk))
    there = chunk >= 0
    time = np.concatenate([3 * places[there], 3 * (places[there] + ahead) + 1, 3 * (places[there] + ahead) + 2])
    kind = np.repeat([Kind.F, Kind.I, Kind.W], there.sum())
    which = np.concatenate([chunk[there], chunks - 1 - chunk[there], chunks - 1 - chunk[there]])
    order = np.argsort(time, kind="stable")
    return kind[order], which[order], np.tile(micro[there], 3)[order]
