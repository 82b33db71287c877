"""Who we are, if a launcher started us: torchrun, Kubernetes (which set RANK) or Slurm's srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.spec.errors import ConfigError
from stretto.trainer.world import World

if TYPE_CHECKING:
    import torch

    from stretto.spec.run import RunSpec

_SLURM_PORTS = 20000, 10000
"""First port, and how many, that Slurm jobs share by their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Our place among the ranks, and where they meet."""

    world: World
    """Rank and size."""
    address: str = "127.0.0.1"
    """Host of the store."""
    port: int = 0
    """Port of the store."""
    attempt: str = "alone"
    """Names this start on this machine; every rank here that was started with us has the same."""
    supervised: bool = False
    """Whether our own launcher watches us and speaks for us."""


def find_membership(
    environment: Mapping[str, str], *, attempt: str = "", supervised: bool = False
) -> Membership | None:
    """Our place as the environment says it, or None where nobody started us as a rank.

    Raises ConfigError if it is said incompletely or is not a number.
    """
    found = _from_ranks(environment) or _from_slurm(environment)
    if found is None:
        return None
    world, address, port = found
    if not 0 <= world.rank < world.world_size:
        raise ConfigError(f"RANK = {world.rank} must be from 0 to WORLD_SIZE - 1 = {world.world_size - 1}.")
    run_id = environment.get("TORCHELASTIC_RUN_ID", environment.get("SLURM_JOB_ID", "run"))
    name = re.sub(r"[^\w.-]", "_", f"{run_id}-{port}-{world.restarts}")
    return Membership(world=world, address=address, port=port, attempt=attempt or name, supervised=supervised)


def _from_ranks(environment: Mapping[str, str]) -> tuple[World, str, int] | None:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    world = World(
        rank=_number(environment, "RANK"),
        world_size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK", "0"),
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
    )
    if world.world_size > 1 and not ("MASTER_ADDR" in environment and "MASTER_PORT" in environment):
        raise ConfigError(
            f"RANK and WORLD_SIZE = {world.world_size} are set, so this is one of several ranks, but MASTER_ADDR and "
            "MASTER_PORT, where they meet, are not; set both, or unset RANK and WORLD_SIZE to start local processes."
        )
    return world, environment.get("MASTER_ADDR", "127.0.0.1"), _number(environment, "MASTER_PORT", "0")


def _from_slurm(environment: Mapping[str, str]) -> tuple[World, str, int] | None:
    # sbatch's own script and an interactive shell also have SLURM_PROCID = 0, but a step of one task.
    size = _number(environment, "SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" not in environment or size == 1:
        return None
    world = World(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=size,
        local_rank=_number(environment, "SLURM_LOCALID", "0"),
        restarts=_number(environment, "SLURM_RESTART_COUNT", "0"),
    )
    first, count = _SLURM_PORTS
    port = first + (_number(environment, "SLURM_JOB_ID", "0") + _number(environment, "SLURM_STEP_ID", "0")) % count
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return world, environment.get("MASTER_ADDR", first_host(nodes)), _number(environment, "MASTER_PORT", str(port))


def device_number(local_rank: int, devices: int, environment: Mapping[str, str]) -> int:
    """Number of this process's device among the ``devices`` that it sees; ConfigError where it has none.

    srun can give each task a device of its own, which then is all that it sees; who starts several ranks and says so
    (LOCAL_WORLD_SIZE) lets each see all.

    >>> device_number(3, 8, {}), device_number(3, 1, {"SLURM_PROCID": "11"})
    (3, 0)
    """
    if local_rank < devices:
        return local_rank
    if devices == 1 and "LOCAL_WORLD_SIZE" not in environment:
        return 0
    raise ConfigError(
        f"This is rank number {local_rank} of its node (from 0), which shows it {devices} CUDA "
        f'device{"" if devices == 1 else "s"}; start at most one rank for each device, or set run.device = "cpu".'
    )


def device_of(run: RunSpec, local_rank: int) -> torch.device:
    """The device of this process; ConfigError where the run asks for one that isn't there."""
    import torch

    if run.run.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", device_number(local_rank, torch.cuda.device_count(), os.environ))
    if run.run.device == "cuda":
        raise ConfigError('run.device = "cuda", but torch finds no CUDA device here; set run.device = "cpu" or "auto".')
    return torch.device("cpu")


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list.

    >>> first_host("gpu[007-011,20],login1"), first_host("a-1,b-2")
    ('gpu007', 'a-1')
    """
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    return nodes if found is None else f"{found[1]}{found[2] or ''}{found[3]}"


def _number(environment: Mapping[str, str], key: str, default: str = "") -> int:
    text = environment.get(key, default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{key} = {text!r} in the environment must be a whole number.") from None
