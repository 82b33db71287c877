"""A second opinion on schedules, written apart from the verifier on purpose.

It knows a schedule by its text alone: the tokens of each rank, the placement, and each micro-batch's path.
Ranks are played one operation at a time, and messages really travel: a buffered send puts one into the
channel, a rendezvous send and its receive happen together.  Slow, and without a table or an array.
"""

from __future__ import annotations

import re
from collections import deque

from stretto.schedule import Schedule

Token = tuple[str, int, int]
"""Kind, stage, micro-batch."""


class Fault(Exception):
    """Why a schedule is no good."""


def objection(schedule: Schedule, semantics: str = "buffered") -> str | None:
    """What is wrong with a schedule, None where nothing is."""
    try:
        Game(schedule, semantics).play()
    except Fault as fault:
        return str(fault)
    return None


class Game:
    """The state of one play."""

    def __init__(self, schedule: Schedule, semantics: str) -> None:
        self.schedule = schedule
        self.rendezvous = semantics == "rendezvous"
        lines = str(schedule).splitlines()[1:]
        self.orders = [[read(token) for token in line.split(": ", 1)[1].split()] for line in lines]
        self.all = {token for order in self.orders for token in order}
        self.lowered = any(token[0].startswith(("SEND", "RECV")) for token in self.all)
        self.at = [0] * len(self.orders)
        self.done: set[Token] = set()
        self.gathered: set[tuple[int, int, int]] = set()
        self.channels: dict[tuple[int, int, str], deque[Token]] = {}

    def play(self) -> None:
        """Run to the end, or raise Fault."""
        self.roll_call()
        moved = True
        while moved:
            moved = False
            for rank, order in enumerate(self.orders):
                while self.at[rank] < len(order) and self.step(rank, order[self.at[rank]]):
                    moved = True
        for rank, order in enumerate(self.orders):
            if self.at[rank] < len(order):
                raise Fault(f"rank {rank} is stuck in {order[self.at[rank]]}")
        if any(self.channels.values()):
            raise Fault("messages were never received")

    def roll_call(self) -> None:
        """Everything that must be there is there, once, in its place."""
        counted: dict[tuple[int, Token], int] = {}
        for rank, order in enumerate(self.orders):
            for token in order:
                counted[rank, token] = counted.get((rank, token), 0) + 1
        asked = set()
        for m in range(self.schedule.num_microbatches):
            for stage in self.schedule.path(m):
                rank = self.holder(stage, m)
                asked.add((rank, ("F", stage, m)))
                if self.learns(stage):
                    split = ("I", stage, m) in self.all or ("W", stage, m) in self.all
                    asked |= {(rank, (kind, stage, m)) for kind in (("I", "W") if split else ("B",))}
        if {key for key in counted if key[1][0] in ("F", "B", "I", "W")} != asked:
            raise Fault("not the operations that the flow asks for")
        once = ("F", "B", "I", "W", "R", "O", "L", "S", "T", "OPT", "SEND_F", "RECV_F", "SEND_B", "RECV_B")
        for (_, token), count in counted.items():
            if token[0] in once and count > 1:
                raise Fault(f"{token} stands twice")
        if {("L", *token[1:]) for token in self.all if token[0] == "O"} != {t for t in self.all if t[0] == "L"}:
            raise Fault("offloaded, but not loaded")

        for order in self.orders:
            self.gradients_are_used(order)

    def gradients_are_used(self, order: list[Token]) -> None:
        """Reduced after the last of them where any are, and every rank that has some steps last where any steps."""
        reduced = any(token[0] == "REDUCE_GRAD" for token in self.all)
        last = {token[1]: at for at, token in enumerate(order) if token[0] in ("B", "W")}
        for stage, at in last.items():
            blocks = {token[2] for token in order if token[0] in ("REDUCE_GRAD", "UNSHARD") and token[1] == stage}
            for block in blocks or {0}:
                if reduced and ("REDUCE_GRAD", stage, block) not in order[at:]:
                    raise Fault(f"block {block} of stage {stage} is not reduced after its last gradient")
        if ("OPT", -1, -1) in self.all and last and ("OPT", -1, -1) not in order:
            raise Fault("a rank with gradients does not step")
        if ("OPT", -1, -1) in order:
            behind = order[order.index(("OPT", -1, -1)) + 1 :]
            if any(token[0] not in ("UNSHARD", "RESHARD") for token in behind):
                raise Fault("work is left behind the step")

    def step(self, rank: int, token: Token) -> bool:
        """Run an operation if it can run now."""
        kind, stage, m = token
        if kind.startswith("SEND"):
            return self.send(rank, token)
        if kind.startswith("RECV"):
            return self.receive(rank, token)
        if any(need not in self.done for need in self.needs(rank, token)):
            return False
        if kind in ("UNSHARD", "RESHARD") and ((rank, stage, m) in self.gathered) == (kind == "UNSHARD"):
            raise Fault(f"{token} of what is so already")
        if kind == "UNSHARD":
            self.gathered.add((rank, stage, m))
        elif kind == "RESHARD":
            self.gathered.remove((rank, stage, m))
        elif kind in ("F", "B", "I", "R"):
            blocks = {t[2] for t in self.orders[rank] if t[0] == "UNSHARD" and t[1] == stage}
            if any((rank, stage, block) not in self.gathered for block in blocks):
                raise Fault(f"{token} without its parameters")
        self.done.add(token)
        self.at[rank] += 1
        return True

    def needs(self, rank: int, token: Token) -> set[Token]:
        """What must have happened anywhere before an operation that is no message."""
        kind, stage, m = token
        found: set[Token] = set()
        if kind == "F":
            found |= self.given("RECV_F", "F", self.before(stage, m), stage, m)
        elif kind in ("B", "I"):
            found |= {("F", stage, m)} | ({("R", stage, m), ("L", stage, m)} & self.all)
            found |= self.given("RECV_B", self.backward(self.source(stage, m), m), self.source(stage, m), stage, m)
            learning = [s for s in self.schedule.path(m) if self.learns(s)]
            shards = range(len(self.orders)) if any(t[0] == "S" for t in self.all) else ()
            if stage == learning[-1] and shards:
                mine = self.orders[rank].index(token)
                first = ("T", rank, m) in self.orders[rank][:mine]
                found |= {("T" if first else "S", shard, m) for shard in shards}
        elif kind == "S":
            found |= {("F", self.schedule.path(m)[-1], m)}
        elif kind == "T":
            found |= {("S", shard, m) for shard in range(len(self.orders))}
        elif kind in ("R", "O", "W", "L"):
            found |= {({"R": "F", "O": "F", "W": "I", "L": "O"}[kind], stage, m)}
            found |= {("L", stage, m)} & self.all if kind == "R" else set()
        return found

    def given(self, message: str, kind: str, giver: int | None, stage: int, m: int) -> set[Token]:
        """The operand from another stage: its message where it crosses ranks, else what makes it."""
        if giver is None:
            return set()
        crosses = self.holder(giver, m) != self.holder(stage, m)
        return {(message, stage, m) if crosses and self.lowered else (kind, giver, m)}

    def send(self, rank: int, token: Token) -> bool:
        """Put a message into its channel; under rendezvous only with its receiver's hand held out."""
        kind, stage, m = token
        maker = "F" if kind == "SEND_F" else self.backward(stage, m)
        there = self.after(stage, m) if kind == "SEND_F" else self.target(stage, m)
        if there is None or self.holder(there, m) == rank:
            raise Fault(f"{token} goes nowhere")
        if (maker, stage, m) not in self.done:
            return False
        peer, receive = self.holder(there, m), ("RECV" + kind[4:], there, m)
        if self.rendezvous:
            if self.orders[peer][self.at[peer] : self.at[peer] + 1] != [receive]:
                return False
            self.done.add(receive)
            self.at[peer] += 1
        else:
            self.channels.setdefault((rank, peer, kind[5:]), deque()).append(receive)
        self.at[rank] += 1
        return True

    def receive(self, rank: int, token: Token) -> bool:
        """Take a message that is expected; it must be the next in its channel."""
        kind, stage, m = token
        source = self.before(stage, m) if kind == "RECV_F" else self.source(stage, m)
        if source is None or self.holder(source, m) == rank:
            raise Fault(f"{token} comes from nowhere")
        channel = self.channels.get((self.holder(source, m), rank, kind[5:]))
        if self.rendezvous or not channel:
            return False
        if channel.popleft() != token:
            raise Fault(f"{token} is not what the channel brings")
        self.done.add(token)
        self.at[rank] += 1
        return True

    def holder(self, stage: int, m: int) -> int:
        return self.schedule.placement[self.schedule.voice[m]][stage]

    def learns(self, stage: int) -> bool:
        return not self.schedule.forward_only and stage not in self.schedule.frozen

    def backward(self, stage: int | None, m: int) -> str:
        return "I" if ("I", stage, m) in self.all else "B"

    def before(self, stage: int, m: int) -> int | None:
        path = list(self.schedule.path(m))
        return path[path.index(stage) - 1] if stage != path[0] else None

    def after(self, stage: int, m: int) -> int | None:
        path = list(self.schedule.path(m))
        return path[path.index(stage) + 1] if stage != path[-1] else None

    def source(self, stage: int, m: int) -> int | None:
        path = list(self.schedule.path(m))
        return next((s for s in path[path.index(stage) + 1 :] if self.learns(s)), None)

    def target(self, stage: int, m: int) -> int | None:
        path = list(self.schedule.path(m))
        return next((s for s in reversed(path[: path.index(stage)]) if self.learns(s)), None)


def read(token: str) -> Token:
    """Kind, stage and micro-batch of a token; ``OPT`` has neither."""
    if token == "OPT":
        return "OPT", -1, -1
    match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", token)
    assert match is not None, token
    return match[2], int(match[1]), int(match[3])
