"""Runs for the fault tests, started as a user starts them: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stretto.spec import toml
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

ROOT = Path(__file__).parents[2]
_SETTINGS = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def small_run(folder: Path, *, ranks: int = 2, **settings: object) -> RunSpec:
    """A run of ``ranks`` data-parallel ranks on a few lines of text."""
    corpus = folder / "corpus.txt"
    corpus.write_text("What voice enters before the last has finished?\n" * 40)
    return RunSpec(
        run=replace(RunSettings(dir=str(folder / "run"), device="cpu"), **settings),
        model=ModelSpec(vocab_size=257, max_positions=16),
        plan=PlanSpec(dp_replicate=ranks),
        training=TrainingSpec(steps=2, global_batch_size=ranks, sequence_length=16),
        data=DataSpec(path=str(corpus)),
    )


class Launched:
    """A launcher process."""

    def __init__(self, run: RunSpec, entry: str, *, command: Sequence[str] = (sys.executable,)) -> None:
        """``command`` starts Python, or several: torchrun and its options."""
        self.folder = Path(run.run.dir)
        file = toml.save(run, self.folder.parent / "given.toml")
        started_by = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [*command, "-m", "tests.fault.launch_main", str(file), entry],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k not in started_by} | _SETTINGS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float = 60) -> tuple[int, str, float]:
        """Wait for its end; returns exit code, standard error and seconds since its start."""
        try:
            _, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, errors, time.monotonic() - self.began

    def wait_for(self, name: str, timeout: float = 60) -> Path:
        """Wait until file ``name`` of the run's directory has content."""
        deadline = time.monotonic() + timeout
        file = self.folder / name
        while not (file.exists() and file.stat().st_size):
            assert time.monotonic() < deadline and self.process.poll() is None, f"no {name}"
            time.sleep(0.05)
        return file


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
