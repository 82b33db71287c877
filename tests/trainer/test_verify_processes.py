"""The processes of a verification: they answer, they fail with their reason, and they never stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stretto.spec.errors import RankError
from stretto.trainer.verify_processes import run_on_processes

PAUSE = 100.0


def pid_or_raise(rank: int, world: int, culprit: int) -> int:
    """Rank ``culprit`` raises while the others wait for it."""
    import torch.distributed as dist

    if rank == culprit:
        raise ValueError(f"rank {rank} has a reason")
    dist.barrier()
    return os.getpid()


def die_or_sleep(rank: int, world: int) -> None:
    """Rank 1 dies without a word while rank 0 waits."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PAUSE)


def sleep(rank: int, world: int, path: str) -> None:
    """Write the process id and do nothing."""
    with open(f"{path}.{rank}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(PAUSE)


def gone(pid: int, within: float = 10.0) -> bool:
    """Whether a process ends in time; one that nobody has waited for yet counts as ended."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_ranks_answer_and_end() -> None:
    pids = run_on_processes(pid_or_raise, 2, -1)
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert all(gone(pid) for pid in pids)


def test_a_rank_that_raises_is_quoted() -> None:
    with pytest.raises(RankError, match="Rank 1 of 2 raised while verifying: ValueError: rank 1 has a reason"):
        run_on_processes(pid_or_raise, 2, 1)


def test_a_rank_that_dies_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"Rank 1 of 2 died while verifying \(exit code -9\)"):
        run_on_processes(die_or_sleep, 2)
    assert time.monotonic() - started < PAUSE


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recorded(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    with pytest.raises(RankError, match="rank 0, 1 of 2 did not finish in time"):
        run_on_processes(sleep, 2, str(tmp_path / "pid"), seconds=0.2)
    assert len(started) == 2 and all(gone(process.pid) for process in started)


def test_no_rank_outlives_a_killed_parent(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    script = (
        "from stretto.trainer.verify_processes import run_on_processes;"
        f"from trainer.test_verify_processes import sleep; run_on_processes(sleep, 1, {str(path)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        child = tmp_path / "pid.0"
        deadline = time.monotonic() + 60
        while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int(child.read_text())
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)
