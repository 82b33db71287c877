"""What a checkpoint of a run holds, and going on from one under any plan.

Values are pieces of global tensors (masters and moments); beside them stands what decides the rest of
the run: the step, the seed, the model, the tokenizer, the batch.  The data order is a function of the
step, so there is no loader state to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stretto.checkpoint import load, read_state, save
from stretto.spec.contract import Piece
from stretto.spec.errors import CheckpointError
from stretto.trainer.fitting import check_fits, checkpoint_folder
from stretto.trainer.freezing import matches
from stretto.trainer.optimizer import optimizer_pieces, set_steps_taken
from stretto.trainer.session import Session


def save_session(session: Session, *, step: int, tokens_seen: int, tokenizer: str, corpus: str) -> Path:
    """Write the checkpoint of ``step``; collective over all ranks.

    Args:
        tokens_seen: valid tokens trained on so far.
        tokenizer: fingerprint of the tokenizer.
        corpus: fingerprint of the corpus.
    """
    run = session.run
    state = {
        "seed": run.run.seed,
        "tokens_seen": tokens_seen,
        "optimizer_steps": session.step.updates,
        "tokenizer": tokenizer,
        "corpus": corpus,
        "model": asdict(run.model),
        "plan": asdict(run.plan),
        "training": asdict(run.training),
        "data": {"tokenizer": run.data.tokenizer},
    }
    return save(
        checkpoint_folder(run),
        step=step,
        pieces=list(session_pieces(session)),
        state=state,
        keep=run.checkpoint.keep,
    )


def session_pieces(session: Session) -> list[Piece]:
    """All that this rank holds of the run's tensors."""
    return list(optimizer_pieces(session.model.masters, session.optimizer))


def resume_session(session: Session, path: Path, *, tokenizer: str) -> Mapping[str, Any]:
    """Fill the session from a checkpoint; collective.  Returns the checkpoint's state.

    Raises:
        CheckpointError: if it is damaged, or of another model, tokenizer or batch.
    """
    check_fits(session.run, read_state(path), path, tokenizer=tokenizer)
    _check_moments(session, read_state(path), path)
    state = load(path, session_pieces(session))
    session.step.updates = int(state["optimizer_steps"])
    set_steps_taken(session.optimizer, session.step.updates)
    session.model.publish()
    return state


def _check_moments(session: Session, state: Mapping[str, Any], path: Path) -> None:
    """CheckpointError where a parameter trains now of which the checkpoint, for which it was frozen, has no moments."""
    frozen = state["training"].get("freeze", ())
    names = (m.sharding.tied_to or m.sharding.name for m in session.model.masters if m.trained)
    thawed = next((name for name in names if matches(name, frozen)), None)
    if thawed is not None:
        raise CheckpointError(
            f"checkpoint {path} was written with training.freeze = {list(frozen)}, so it has no moments of {thawed}, "
            "which trains now. Keep that, or start another run from the weights (stretto convert)."
        )
