"""The same under torchrun: it starts and restarts the ranks, we join, watch and name the culprit."""

import re
import signal
import sys
from pathlib import Path

from tests.fault.launching import Launched, small_run

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
STANDALONE = (*TORCHRUN, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--max-restarts=1")


def test_torchrun_brings_the_ranks_back_after_a_kill(tmp_path: Path) -> None:
    launched = Launched(small_run(tmp_path), "killed_once", command=STANDALONE)
    code, errors, _ = launched.finish(timeout=90)
    assert code == 0, errors
    assert (launched.folder / "done-0").read_text() == (launched.folder / "done-1").read_text() == "1"


def test_a_frozen_rank_under_torchrun_is_named_once(tmp_path: Path) -> None:
    command = (*TORCHRUN, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    launched = Launched(small_run(tmp_path, silent_seconds=3.0, seed=1), "stopped_by_signal", command=command)
    code, errors, _ = launched.finish(timeout=90)
    assert code != 0
    told = re.findall(r"stretto: error: rank 0 waits in .* for rank 1 \(host .*\), which has been silent for", errors)
    assert len(told) == 1, errors


def test_a_rank_that_raises_under_torchrun_is_shown_and_who_noticed_is_quiet(tmp_path: Path) -> None:
    code, errors, _ = Launched(small_run(tmp_path), "raise_on_rank_1", command=TORCHRUN).finish(timeout=90)
    assert code != 0
    assert re.search(r"RankError: rank 1 \(host .*\) failed: KeyError: 'the culprit'", errors), errors
    assert "RankError: rank 0" not in errors


def test_torchrun_passes_on_sigterm_and_waits_for_the_checkpoint(tmp_path: Path) -> None:
    launched = Launched(small_run(tmp_path), "until_asked", command=STANDALONE)
    for rank in range(2):
        launched.wait_for(f"pid-{rank}")
    launched.process.send_signal(signal.SIGTERM)
    code, errors, _ = launched.finish(timeout=90)
    assert code != 0, "not finished"
    assert (launched.folder / "saved-0").read_text() == (launched.folder / "saved-1").read_text(), errors
