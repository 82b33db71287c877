"""Runs a function on fresh local processes that never outlive it.

    parent ── job file ──► python -m stretto.trainer.verify_processes FOLDER RANK     one per rank, over gloo
       └───── pipe on standard input: when it closes, for whatever reason, the rank exits

A pipe, because a parent that is killed can't clean up; a module that is run, not a fork or a spawn of the parent's
main module, because that is somebody's script, which would run again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from stretto.spec.errors import RankError

SECONDS = 300.0
"""Time that all ranks have together."""
SILENCE = timedelta(seconds=45)
"""How long a rank waits for another in one message."""


def run_on_processes(function: Callable[..., Any], world: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """Call ``function(rank, world, *args)`` on ``world`` processes and return what each returned.

    The function must be importable and what it takes and returns must pickle.  Raises RankError with the
    text of the rank that raised first, or where ``seconds`` are over.
    """
    with tempfile.TemporaryDirectory(prefix="stretto-verify-") as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps((function, args, world)))
        # The ranks import what the parent can import, and OpenMP reads its threads before any import.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        command = [sys.executable, "-m", "stretto.trainer.verify_processes", name]
        processes = [
            subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=sys.stderr, env=environment)
            for rank in range(world)
        ]
        try:
            wait_for_all(processes, folder, time.monotonic() + seconds)
            return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world)]
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def wait_for_all(processes: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    """Return when all ended well; RankError when one didn't, or at ``deadline``."""
    while True:
        codes = [process.poll() for process in processes]
        bad = [rank for rank, code in enumerate(codes) if code]
        if bad:
            raise RankError(first_failure(folder, bad[0], codes[bad[0]], len(processes)))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            late = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise RankError(f"Verification took too long: rank {late} of {len(processes)} did not finish in time.")
        time.sleep(0.02)


def first_failure(folder: Path, rank: int, code: int | None, world: int) -> str:
    """What to say of a failure: the earliest error, since the others fail because of it."""
    errors = [pickle.loads(path.read_bytes()) for path in folder.glob("error.*")]
    if not errors:
        return f"Rank {rank} of {world} died while verifying (exit code {code})."
    _, rank, text = min(errors)
    last = text.strip().splitlines()[-1]
    return f"Rank {rank} of {world} raised while verifying: {last}\n{text}"


def main(folder: Path, rank: int) -> int:
    """One rank: read the job, do it, write the result."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        result = work(folder, rank)
    except Exception:
        write_whole(folder / f"error.{rank}", pickle.dumps((time.time(), rank, traceback.format_exc())))
        return 1
    write_whole(folder / f"result.{rank}", pickle.dumps(result))
    return 0


def work(folder: Path, rank: int) -> Any:
    """Join the group and call the function."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function, args, world = pickle.loads((folder / "job").read_bytes())
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=SILENCE)
    result = function(rank, world, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is never seen half-written."""
    half = path.with_name(f"half-{path.name}")
    half.write_bytes(data)
    half.rename(path)


def exit_with_parent() -> None:
    """End this process when the parent's end of standard input is closed."""
    # Not through sys.stdin: its lock can't be held by a thread when the interpreter ends.
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
