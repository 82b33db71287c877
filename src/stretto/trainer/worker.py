"""``python -m stretto.trainer.worker ASSIGNMENT``: one rank that our own launcher started.

It prints no traceback: what went wrong is written to the run's directory, and the launcher, which sees
all ranks, says what came first.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from dataclasses import asdict, dataclass, replace

from stretto.resilience import StopRequest, die_with_parent
from stretto.resilience.phase import during


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What the launcher tells a rank; RANK and its like are in the environment."""

    run_file: str
    """The resolved run."""
    entry: str
    """``module:function`` to run."""
    parent: int
    """Process id of the launcher."""
    attempt: str
    """Name of this attempt."""
    resume: str | None
    """Checkpoint to go on from, where it isn't the one that the run file says."""

    def text(self) -> str:
        """As a command-line argument."""
        return json.dumps(asdict(self))


def main(argument: str) -> int:
    """Run one rank; returns its exit code."""
    faulthandler.enable()
    assignment = Assignment(**json.loads(argument))
    die_with_parent(assignment.parent)
    stop = StopRequest()
    with stop.listening():  # before the slow imports, so that no signal is lost
        return _train(assignment, stop)


def _train(assignment: Assignment, stop: StopRequest) -> int:
    from stretto.spec import toml
    from stretto.spec.errors import StrettoError
    from stretto.trainer.member import STOPPED, Vital, leave_word, train_as_member
    from stretto.trainer.placement import find_membership

    run = toml.from_text(toml.read(assignment.run_file), assignment.run_file)
    if assignment.resume is not None:
        run = replace(run, checkpoint=replace(run.checkpoint, resume=assignment.resume))
    membership = find_membership(os.environ, attempt=assignment.attempt, supervised=True)
    assert membership is not None
    vital = Vital.start(run, membership.world)
    try:
        with during(vital.observer, "START"):  # torch, mostly
            from stretto.trainer.launch import load_entry

            train = load_entry(assignment.entry)
    except BaseException as error:
        leave_word(error, run, membership, vital)
        _leave_now(2 if isinstance(error, StrettoError) else 1)
    try:
        result = train_as_member(run, membership, train, stop=stop, vital=vital)
    except BaseException as error:
        _leave_now(2 if isinstance(error, StrettoError) else 1)
    return STOPPED if result.get("stopped") else 0


def _leave_now(code: int) -> None:
    """End without the interpreter's tear-down, which may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
