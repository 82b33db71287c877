"""Proof that a schedule is right, before any process starts.

    complete      each operation that the flow asks for exists once, on the rank that holds its stage
    ordered       nothing runs before what it needs
    matched       on every channel, receives meet sends one by one in the same order
    live          no ranks wait for each other in a circle

Complete is relative to the schedule's paths, frozen stages and ``forward_only``.  An error names the
operation, says why, and points at it in the grid.
"""

from __future__ import annotations

from stretto.schedule.dependencies import REPEATABLE, Dependencies, Key
from stretto.schedule.op import COMPUTE, MESSAGES, Kind, text
from stretto.schedule.progress import Semantics, check_progress
from stretto.schedule.render.text import grid
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.memory import peak_activation
from stretto.spec.errors import ScheduleError

_VOCABULARY = (Kind.S, Kind.T)


def validate(schedule: Schedule, *, semantics: Semantics = "buffered") -> None:
    """Raise ScheduleError unless the schedule is complete, ordered, matched and live."""
    if semantics not in ("buffered", "rendezvous"):
        raise ScheduleError(f"Messages can't have {semantics!r} semantics; they are buffered or rendezvous.")
    _check_places(schedule)
    dependencies = Dependencies(schedule)
    _check_complete(schedule, dependencies)
    if dependencies.lowered:
        _check_matched(schedule, dependencies)
    check_progress(schedule, semantics=semantics)


def peak_memory(schedule: Schedule, *, act_w: float = 1.0) -> tuple[float, ...]:
    """Largest activation memory of each rank.

    Unit: what one micro-batch keeps alive over one rank's whole share of the layers.  ``act_w`` is the
    fraction kept between I and W.
    """
    return peak_activation(schedule, act_w=act_w)


def _broken(schedule: Schedule, rank: int, position: int, sentence: str) -> ScheduleError:
    """An error whose message shows the place."""
    return ScheduleError(f"{schedule.name}: {sentence}\n{grid(schedule, rank=rank, position=position)}")


def _check_places(schedule: Schedule) -> None:
    """Every operation is one that the flow asks for, once, on the rank that holds its stage."""
    seen: set[Key] = set()
    visited = [set(schedule.path(m)) for m in range(schedule.num_microbatches)]
    for rank in range(schedule.num_ranks):
        for position, row in enumerate(schedule.rows(rank)):
            kind, stage, microbatch, _ = row
            if kind in REPEATABLE:
                if kind != Kind.OPT and not any(replica[stage] == rank for replica in schedule.placement):
                    sentence = f"rank {rank} runs {text(*row[:3])}, but doesn't hold stage {stage}."
                    raise _broken(schedule, rank, position, sentence)
                continue
            if row[:3] in seen:
                sentence = f"rank {rank} runs {text(*row[:3])}, which has run already; each operation runs once."
                raise _broken(schedule, rank, position, sentence)
            seen.add(row[:3])
            if kind in _VOCABULARY:
                continue
            reason = _misplaced(schedule, rank, kind, stage, microbatch, visited)
            if reason:
                raise _broken(schedule, rank, position, f"rank {rank} runs {text(*row[:3])}, but {reason}.")


def _misplaced(
    schedule: Schedule, rank: int, kind: int, stage: int, microbatch: int, visited: list[set[int]]
) -> str | None:
    """Why an operation may not stand on a rank at all, None where it may."""
    holder = schedule.placement[schedule.voice[microbatch]][stage]
    if stage not in visited[microbatch]:
        return f"micro-batch {microbatch} doesn't visit stage {stage}"
    if holder != rank:
        return f"stage {stage} lies on rank {holder} for micro-batch {microbatch}"
    if kind in (Kind.B, Kind.I, Kind.W, Kind.SEND_B, Kind.RECV_B) and not schedule.has_backward(stage):
        return "the schedule is forward only" if schedule.forward_only else f"stage {stage} is frozen"
    return None


def _check_complete(schedule: Schedule, dependencies: Dependencies) -> None:
    """Every micro-batch passes its stages forward, and backward where they have one."""
    where = dependencies.where
    for microbatch in range(schedule.num_microbatches):
        for stage in schedule.path(microbatch):
            rank = schedule.rank_of(stage, schedule.voice[microbatch])
            if (Kind.F, stage, microbatch) not in where:
                sentence = f"{stage}F{microbatch} is missing from rank {rank}."
                raise _broken(schedule, rank, len(list(schedule.rows(rank))), sentence)
            if not schedule.has_backward(stage):
                continue
            backward = {kind.name for kind in (Kind.B, Kind.I, Kind.W) if (kind, stage, microbatch) in where}
            if backward not in ({"B"}, {"I", "W"}):
                has = " and ".join(sorted(backward)) or "none"
                sentence = (
                    f"stage {stage}, micro-batch {microbatch} has the backward operations {has} on rank {rank}; "
                    "it needs either B, or I and W."
                )
                raise _broken(schedule, rank, where[Kind.F, stage, microbatch][1], sentence)


def _check_matched(schedule: Schedule, dependencies: Dependencies) -> None:
    """Messages exist for exactly the arrows between ranks, and each channel keeps its order."""
    where = dependencies.where
    sent: dict[tuple[int, int, bool], list[Key]] = {}
    received: dict[tuple[int, int, bool], list[tuple[Key, int]]] = {}
    for rank in range(schedule.num_ranks):
        for position, (kind, stage, microbatch, peer) in enumerate(schedule.rows(rank)):
            key = (kind, stage, microbatch)
            if kind in MESSAGES:
                reason = _unmet(schedule, dependencies, key, peer, rank)
                if reason:
                    raise _broken(schedule, rank, position, f"rank {rank} runs {text(*key)}, but {reason}.")
                if kind in (Kind.SEND_F, Kind.SEND_B):
                    sent.setdefault((rank, peer, kind == Kind.SEND_F), []).append(key)
                else:
                    received.setdefault((peer, rank, kind == Kind.RECV_F), []).append((key, position))
            elif kind in COMPUTE and kind not in _VOCABULARY:
                for need in dependencies.needs(*key):
                    if need[0] in MESSAGES and need not in where:
                        sentence = (
                            f"rank {rank} runs {text(*key)}, but never receives what it needs; add {text(*need)}."
                        )
                        raise _broken(schedule, rank, position, sentence)
    for channel, receives in received.items():
        for send, (receive, position) in zip(sent[channel], receives, strict=True):
            if dependencies.counterpart(*send) != receive:
                sentence = (
                    f"rank {channel[1]} receives {text(*receive)} from rank {channel[0]} where the channel brings "
                    f"{text(*send)}; a channel keeps the order of its sends."
                )
                raise _broken(schedule, channel[1], position, sentence)


def _unmet(schedule: Schedule, dependencies: Dependencies, key: Key, peer: int, rank: int) -> str | None:
    """Why a message is met by nothing, None where it is met."""
    other = dependencies.counterpart(*key)
    expected = schedule.peer_of(*key)
    if other is None or expected == rank:
        return "nothing crosses ranks there"
    if peer != expected:
        return f"its peer is rank {peer}, while stage {other[1]} lies on rank {expected}"
    if other not in dependencies.where:
        return f"rank {expected} has no {text(*other)} to meet it"
    return None
