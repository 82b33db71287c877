"""Groups of a lane share a thread, and nothing else."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ranks import Ranks
from stretto.parallel.process_groups import Lane, is_gloo, new_group

TASKS = Path("/proc/self/task")


def threads_of_devices() -> int:
    return sum(task.read_text().startswith("gloo_tcp") for task in TASKS.glob("*/comm"))


def make_and_use(rank: int, world: int) -> tuple[list[int], list[float], bool]:
    """Threads after one group of each lane and after many, and sums that ranks begin in different orders."""
    groups = [new_group(range(world), lane) for lane in Lane]
    threads = [threads_of_devices()]
    groups += [new_group(range(world), lane) for lane in Lane for _ in range(3)]
    threads.append(threads_of_devices())
    order = list(enumerate(groups))[:: -1 if rank else 1]
    values = [torch.full((1000,), float(number + rank)) for number in range(len(groups))]
    works = [dist.all_reduce(values[number], group=group, async_op=True) for number, group in order]
    for work in works:
        work.wait()
    return threads, [float(value.mean()) for value in values], all(is_gloo(group) for group in (None, *groups))


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_groups_of_a_lane_share_a_thread_and_no_order(ranks: Ranks) -> None:
    for (first, last), sums, gloo in ranks.run(make_and_use, 2):
        assert first == last > 0 and gloo
        assert sums == [2.0 * number + 1.0 for number in range(8)]
