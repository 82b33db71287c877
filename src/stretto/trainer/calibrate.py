"""``stretto diagnose --calibrate``: everything that is measured of this machine, put together.

Alone the processes are measured in about half a minute; whatever else runs on the machine is measured with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from stretto.planner.machine import Machine
from stretto.spec.errors import ConfigError
from stretto.trainer.measure import measure_process
from stretto.trainer.measure_group import measure_group
from stretto.trainer.processor import usable_cores

LEAST_PROCESSES = 4
"""Processes that are measured together where there are fewer cores: plans on a laptop share its cores."""
MOST_PROCESSES = 16


def calibrate(*, processes: int | None = None, say: Callable[[str], None] = print) -> Machine:
    """Measure the CPU of this machine, with ``processes`` at work together (as many as cores, 4 to 16).

    Raises ConfigError for a number of processes that can't be measured together.
    """
    count = processes if processes is not None else min(MOST_PROCESSES, max(LEAST_PROCESSES, usable_cores()))
    if not 2 <= count <= 64:
        raise ConfigError(f"--processes {count} can't be measured together; write a number from 2 to 64.")
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        say("one process: products, attention, blocks, loss, update, runtime")
        alone = measure_process()
        say(f"{count} processes: messages, collectives, shared cores ({time.perf_counter() - start:.0f} s so far)")
        together = measure_group(count)
    finally:
        torch.set_num_threads(threads)
    say(f"measured in {time.perf_counter() - start:.0f} s")
    return Machine(**alone, **together)
