"""Who we are, from the environments that launchers set."""

import pytest

from stretto.spec.errors import ConfigError
from stretto.trainer.placement import device_number, find_membership, first_host
from stretto.trainer.world import World

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "job/7",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_torchrun_and_kubernetes() -> None:
    found = find_membership(TORCHRUN)
    assert found is not None
    assert found.world == World(rank=5, world_size=8, local_rank=1, restarts=2)
    assert (found.address, found.port, found.attempt) == ("node0", 29400, "job_7-29400-2")


def test_srun() -> None:
    found = find_membership(SRUN)
    assert found is not None
    assert found.world == World(rank=3, world_size=4, local_rank=1)
    assert (found.address, found.port) == ("gpu07", 23456)


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}],
)
def test_nobody_started_us_as_a_rank(environment: dict[str, str]) -> None:
    assert find_membership(environment) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "eight"}, "RANK = 'eight' in the environment must be a whole number"),
        ({"RANK": "8"}, "RANK = 8 must be from 0 to WORLD_SIZE - 1 = 7"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR and MASTER_PORT, where they meet, are not"),
    ],
)
def test_what_can_not_be_is_refused(change: dict[str, str | None], message: str) -> None:
    environment = {key: value for key, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        find_membership(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[3,7]", "n3"), ("n[01-04]-ib,x", "n01-ib"), ("gpu-7-[12]", "gpu-7-12")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_device_for_each_rank_of_a_node() -> None:
    torchrun = {"LOCAL_WORLD_SIZE": "4"}
    assert [device_number(rank, 4, torchrun) for rank in range(4)] == [0, 1, 2, 3]
    assert device_number(3, 1, {"SLURM_LOCALID": "3"}) == 0
    for rank, devices, environment in ((1, 1, torchrun), (2, 2, {"SLURM_LOCALID": "2"}), (0, 0, {})):
        with pytest.raises(ConfigError, match=f"rank number {rank} of its node .* shows it {devices} CUDA device"):
            device_number(rank, devices, environment)
