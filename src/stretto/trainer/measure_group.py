"""Measuring what processes of this machine do together: messages, collectives by size and group, sharing of cores.

    processes 0 1 2 3      groups of 2: (0 1) (2 3), both at work at once; groups of 4: (0 1 2 3)
                           contention: 1, 2 and 4 processes compute, the others wait without computing

All ranks measure the same; of the slowest rank the lower quartile counts, which neighbours disturb less than medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from stretto.parallel import collectives
from stretto.parallel.process_groups import new_group
from stretto.planner.machine import COLLECTIVES, Curve

SIZES = (64, 4096, 65_536, 524_288, 4_194_304)
"""Bytes of the whole tensor."""
REPEATS = {64: 15, 4096: 15, 65_536: 11, 524_288: 7, 4_194_304: 3}
"""Times that each size is measured."""
SHORT, LONG = 4, 20
"""Products of a piece of work: between two exchanges, and to see how processes share cores."""
LEAST_SECONDS = 1e-5
"""What an exchange takes at least."""
WORK_SECONDS = 0.15
"""How long processes compute to see how they share cores."""
PATIENCE = timedelta(seconds=120)
"""A collective that takes longer ends the measurement."""
ELEMENT = 4
"""Bytes of float32."""


def measure_group(processes: int) -> dict[str, Any]:
    """``messages``, ``collectives`` and ``contention`` of Machine, by ``processes`` new processes of this machine.

    Raises RuntimeError where one of them failed.
    """
    from torch.multiprocessing.spawn import start_processes

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        store, target = (Path(folder) / "store").as_uri(), Path(folder) / "found.pt"
        start_processes(_work, (processes, store, str(target)), nprocs=processes, start_method="spawn")
        found: dict[str, Any] = torch.load(target)
    messages = Curve(points=found["messages"])
    groups = tuple((name, ranks, Curve(points=points)) for name, ranks, points in found["collectives"])
    return {"messages": messages, "collectives": groups, "contention": found["contention"]}


def _work(rank: int, world: int, store: str, target: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
    found = measure_together(rank, world)
    if rank == 0:
        torch.save(found, target)
    dist.barrier()
    dist.destroy_process_group()


def measure_together(rank: int, world: int) -> dict[str, Any]:
    """What rank 0 keeps; collective over the world of ``world`` processes."""
    found: list[tuple[str, int, tuple[tuple[float, float], ...]]] = []
    for size in sorted({*_powers(world), world} - {1}):
        group = _group_of(rank, world, size)
        for name in COLLECTIVES:
            points = [(float(num_bytes), _collective(name, size, num_bytes, group)) for num_bytes in SIZES]
            if group is not None:
                found.append((name, size, tuple(points)))
    return {
        "collectives": found,
        "messages": tuple((float(num_bytes), _message(rank, num_bytes)) for num_bytes in SIZES),
        "contention": tuple((count, slower) for count, slower in _contention(rank, world)),
    }


def _powers(world: int) -> list[int]:
    return [size for size in (2, 4, 8, 16, 32) if size <= world and world % size == 0]


def _group_of(rank: int, world: int, size: int) -> Any:
    """This rank's group of neighbours; all ranks make all groups."""
    if size == world:
        return dist.group.WORLD
    groups = [new_group(range(start, start + size)) for start in range(0, world, size)]
    return groups[rank // size]


def _collective(name: str, ranks: int, num_bytes: int, group: Any) -> float:
    """Of the slowest rank."""
    if name == "exchange":
        return _exchange(ranks, num_bytes, group)
    count = max(1, num_bytes // ELEMENT // ranks)
    whole, part = torch.zeros(count * ranks), torch.zeros(count)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: collectives.all_reduce(whole, group).wait(),
        "all_gather": lambda: collectives.all_gather(part, whole, group).wait(),
        "reduce_scatter": lambda: collectives.reduce_scatter(whole, part, group).wait(),
    }
    return _slowest(_typical(calls[name], REPEATS[num_bytes]))


def _exchange(ranks: int, num_bytes: int, group: Any) -> float:
    """Gathering and scattering of activations between pieces of work, as layers do: what both add to the work.

    Ranks then come at different moments, to cold caches and fresh memory, and share the cores with those who work.
    """
    width = max(1, min(64, num_bytes // ELEMENT // ranks))
    rows = max(1, num_bytes // ELEMENT // ranks // width)
    part, whole = torch.zeros(1, rows, width), torch.zeros(1, rows * ranks, width)
    work = _unit(SHORT)

    def layer() -> None:
        work()
        collectives.gather_dim(part, 1, group)
        work()
        collectives.reduce_scatter_dim(whole, 1, group)

    repeats = 2 * REPEATS[num_bytes]
    both, alone = _slowest(_typical(layer, repeats)), _slowest(_typical(work, repeats))
    return max(LEAST_SECONDS, both / 2 - alone)


def _typical(call: Callable[[], object], repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.quantiles(found, n=4)[0] if len(found) > 2 else min(found)


def _slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _message(rank: int, num_bytes: int) -> float:
    """Half of the way of a message from rank 0 to rank 1 and back."""
    value = torch.zeros(max(1, num_bytes // ELEMENT))

    def there_and_back() -> None:
        for sender in (0, 1):
            if rank == sender:
                dist.send(value, 1 - sender)
            else:
                dist.recv(value, sender)

    return _slowest(_typical(there_and_back, REPEATS[num_bytes]) / 2 if rank < 2 else 0.0)


def _contention(rank: int, world: int) -> list[tuple[int, float]]:
    """How many times longer work takes when so many processes do it."""
    work = _unit(LONG)
    for _ in range(3):
        work()
    repeats, alone, found = 1, 0.0, []
    for count in (1, *(size for size in (2, 3, 4, 6, 8, 16, 32) if size < world), world):
        dist.barrier()
        start = time.perf_counter()
        if rank < count:
            for _ in range(repeats):
                work()
        taken = _slowest((time.perf_counter() - start) / repeats if rank < count else 0.0)
        if count == 1 and repeats == 1:  # once more, long enough
            repeats = max(1, round(WORK_SECONDS / taken))
            dist.barrier()
            start = time.perf_counter()
            if rank == 0:
                for _ in range(repeats):
                    work()
            taken = alone = _slowest((time.perf_counter() - start) / repeats if rank == 0 else 0.0)
        found.append((count, max(1.0, taken / alone)))
    return found


def _unit(times: int) -> Callable[[], None]:
    """A piece of what training does: a product, and kernels that move data."""
    x, weight = torch.randn(256, 128), torch.randn(256, 128)

    def work() -> None:
        for _ in range(times):
            y = F.silu(F.linear(x, weight))
            (y * y).sum()

    return work
