"""One sentence from what all ranks were doing: who waits for what from whom, and where that one is.

    rank 0 ── 0RECV_B3 ──► rank 1 ── 1RECV_B3 ──► rank 2 ── in 2B3, silent ◄── the cause
                                                    ▲
    rank 3 ── REDUCE_GRAD ─────────────────────────┘     waits for all, so for the one that isn't there

Who waits for one rank says so in its log: every receive, S for the output of the last stage, NORM for the partial sum
of the rank before, VALIDATE for the whole one of the last rank.  T, and the first backward behind S or T, wait for
every rank of the pipeline.

A cause is a rank that is dead or silent; in a hang, whoever waits for nobody.  Where all wait for each other the
circle is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from socket import gethostname

from stretto.resilience.beat import Beat
from stretto.resilience.stack import ask

WORDS = {
    "START": "its start",
    "JOIN": "joining the process group",
    "BUILD": "building its part of the model",
    "LOAD": "loading the checkpoint",
    "COMPILE": "compiling its part of the model",
    "DATA": "reading its data",
    "FLUSH": "handing over its last messages",
    "REDUCE_GRAD": "the last reduction of gradients",
    "NORM": "the sum of the gradient's norm along the pipeline",
    "OPT": "the optimizer's update",
    "VALIDATE": "the validation of its last update",
    "EVAL": "the evaluation",
    "SAVE": "saving a checkpoint",
    "LEAVE": "leaving together",
}
"""What a rank does outside a schedule."""
_MESSAGES = {
    "RECV_F": "the input of stage {}, micro-batch {}",
    "RECV_B": "the gradient of what stage {} put out, micro-batch {}",
}
_SINGLE = {
    "NORM": "the partial sum of the gradient's norm",
    "VALIDATE": "the whole sum of the gradient's norm",
}
"""What comes from one rank outside a schedule."""
_OUTPUT = "the output of the last stage, micro-batch {}"
_BLOCKS = {
    "UNSHARD": "gathering the parameters",
    "RESHARD": "freeing the parameters",
    "REDUCE_GRAD": "reducing the gradients",
}
_OPERATION = re.compile(r"(\d+)([A-Z_]+)(\d+)")
_COLLECTIVES = ("JOIN", "REDUCE_GRAD", "SAVE", "LEAVE")
"""In which a rank waits for all, whatever line it is seen at."""


def words(operation: str | None) -> str:
    """An operation for people.

    >>> words("2F7"), words("OPT")
    ('F of stage 2, micro-batch 7 (2F7)', "the optimizer's update (OPT)")
    """
    if operation is None:
        return "no operation"
    match = _OPERATION.fullmatch(operation)
    if match is None:
        return f"{WORDS[operation]} ({operation})" if operation in WORDS else operation
    stage, kind, number = match.groups()
    if kind in _BLOCKS:
        return f"{_BLOCKS[kind]} of block {number} of stage {stage} ({operation})"
    if kind in _MESSAGES:
        return f"waiting for {_MESSAGES[kind].format(stage, number)} ({operation})"
    of = "vocabulary shard" if kind in ("S", "T") else "stage"
    return f"{kind} of {of} {stage}, micro-batch {number} ({operation})"


def waits_for_peer(beat: Beat) -> bool:
    """Whether it waits for one rank: in a receive, for a sum along the pipeline, or seen to wait in an S."""
    if beat.operation is None or beat.peer is None:
        return False
    return "RECV" in beat.operation or beat.operation in _SINGLE or (beat.waits and _kind(beat) == "S")


def _kind(beat: Beat) -> str:
    """Kind of the operation of a schedule that it runs, else nothing."""
    match = _OPERATION.fullmatch(beat.operation or "")
    return match[2] if match else ""


def waits(beat: Beat) -> bool:
    """Whether it waits for another rank."""
    return waits_for_peer(beat) or beat.waits


def causes(ranks: Mapping[int, Beat]) -> list[int]:
    """Where nothing moves: the ranks that wait for nobody, those between operations first.

    Where all are in receives and the like, it is those whose line, unlike others', is of code that doesn't wait.
    """
    free = [rank for rank, beat in ranks.items() if not waits(beat)]
    if not free:
        elsewhere = [rank for rank, beat in ranks.items() if beat.place and beat.is_there and not beat.waits]
        free = elsewhere if len(elsewhere) < len(ranks) else []
    return sorted(
        free, key=lambda rank: (ranks[rank].operation is not None, ranks[rank].operation in _COLLECTIVES, rank)
    )


def sentence(ranks: Mapping[int, Beat], ill: Mapping[int, str], *, look: bool = True) -> str:
    """Who waits for what from whom, and where that one is.

    Args:
        ranks: what each rank was doing last.
        ill: what is wrong with those known to be the cause, as ``has been silent for 46 s``; empty in a hang.
        look: whether a process that can't speak may be asked where it is (it is let go on for that).
    """
    found = list(ill) or causes(ranks)
    if not found:
        return _circle(ranks)
    first, *others = found
    waiting = _waiting(ranks, first, set(found))
    told = waiting + _cause(ranks, first, (", which " if waiting else " ") + (ill.get(first) or "is still"), look=look)
    told += "".join(f"; rank {rank} {ill[rank]}, too" for rank in others if rank in ill)
    if not ill and others:
        told += f"; also not waiting: {_listed(others, ranks)}"
    return told


def _listed(others: Iterable[int], ranks: Mapping[int, Beat]) -> str:
    return ", ".join(f"rank {rank} in {words(ranks[rank].operation)}" for rank in list(others)[:3])


def _cause(ranks: Mapping[int, Beat], rank: int, what: str, *, look: bool) -> str:
    beat = ranks.get(rank)
    if beat is None:
        return f"rank {rank}{what}"
    who = f"rank {rank} (host {beat.host}, pid {beat.pid}){what} "
    return f"{who}{_doing(beat)}{_where(beat, look=look)}; its log is {beat.file}"


def _doing(beat: Beat) -> str:
    if beat.operation is None:
        return f"between two operations{_step(beat)}"
    return f"in {words(beat.operation)}{_step(beat)}"


def _step(beat: Beat) -> str:
    return f", step {beat.step}" if beat.step else ""


def _where(beat: Beat, *, look: bool) -> str:
    """Asked of the process itself if it may be, else where it was seen last."""
    if look and beat.host == gethostname():
        place = ask(beat.pid, Path(beat.file))
        if place is not None:
            return f", at {place.text}"
    if not beat.place:
        return ""
    return f", at {beat.place}" if beat.is_there else f", last seen before it at {beat.place}"


def _waiting(ranks: Mapping[int, Beat], cause: int, all_causes: set[int]) -> str:
    """The clause of whoever waits for the cause; empty where nobody does."""
    others = {rank: beat for rank, beat in ranks.items() if rank not in all_causes and not beat.left}
    direct = [rank for rank, beat in others.items() if waits_for_peer(beat) and beat.peer == cause]
    if direct:
        rank = direct[0]
        return f"rank {rank} waits for {_wanted(others[rank])} from "
    together = [rank for rank, beat in others.items() if waits(beat) and not waits_for_peer(beat)]
    together = together or [rank for rank, beat in others.items() if beat.operation in _COLLECTIVES]
    if together:
        rank = together[0]
        return (
            f"rank {rank} waits in {words(others[rank].operation)}{_step(others[rank])} for {_together(others[rank])}"
        )
    return ""


def _together(beat: Beat) -> str:
    """Why it waits for the cause, where all ranks of the pipeline are waited for."""
    needed = {"T": "S", "B": "S or T", "I": "S or T"}.get(_kind(beat))
    if needed is None or "/pipeline/vocabulary/" not in beat.place:
        return ""
    return f"{needed} of every rank of its pipeline, so for "


def _wanted(beat: Beat) -> str:
    """What a receive brings, or what else one rank gives."""
    match, told = _OPERATION.fullmatch(beat.operation or ""), _SINGLE.get(beat.operation or "")
    if match is not None:
        told = _OUTPUT.format(match[3]) if match[2] == "S" else _MESSAGES.get(match[2], "").format(match[1], match[3])
    return f"{told} ({beat.operation}{_step(beat)})" if told else f"{beat.operation}"


def _circle(ranks: Mapping[int, Beat]) -> str:
    """All wait: follow the one that got least far to whom it waits for, until someone comes a second time."""
    start = min(ranks, key=lambda rank: (ranks[rank].step, ranks[rank].finished, rank))
    told, at, seen = "", start, []
    while at in ranks and at not in seen and waits_for_peer(ranks[at]):
        seen.append(at)
        peer = ranks[at].peer
        assert peer is not None
        told += f"rank {at} waits for {_wanted(ranks[at])} from rank {peer}"
        told += ", which waits for it in turn" if peer in seen else "; "
        at = peer
    if at in seen:
        return told
    last = ranks.get(at)
    others = [rank for rank in ranks if rank != at and not ranks[rank].left]
    if last is not None and others and (together := _together(last)):
        # Whoever all wait for is most likely the one that got least far.
        slow = min(others, key=lambda rank: (ranks[rank].step, ranks[rank].finished, rank))
        waiting = f"{told}rank {at} waits in {words(last.operation)}{_step(last)} for {together}rank {slow}"
        return f"{waiting}, which got least far: it waits {_doing(ranks[slow])}{_where(ranks[slow], look=False)}"
    doing = "" if last is None else f"{_doing(last)}{_where(last, look=False)}; its log is {last.file}"
    return f"{told}rank {at} waits, too, {doing}".rstrip(" ,")
