"""S and T at run time, and both ends of the model that go with them.

    last stage's F ── to all ranks ─► S: scores of this rank's shard ── totals ──► T: gradient of the shard
                                         (scores.py)          (behind the arithmetic)
    algorithm 1     T also gives its part of the gradient of the input ── reduce ─────────────────► first backward
    algorithm 2     S gives it before the totals are known, and it is reduced behind them: one wait ► first backward

    every rank's rows ──► first stage's F        first stage's backward ──► every rank's rows      (rows.py)

A rank waits where the schedule has an arrow (schedule/arrows.py), so that what the verifier proved holds here too:
S for the last forward, T and algorithm 2's first backward for all S, algorithm 1's for all T.  Which algorithm
a micro-batch is of, the order of its T and its first backward says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stretto.parallel.collectives import DONE, Pending
from stretto.parallel.gradient import Deferred
from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.play import END_B, END_F, Play, Slot
from stretto.parallel.pipeline.segment import Value
from stretto.parallel.pipeline.transport import Transport, transport_for
from stretto.parallel.pipeline.vocabulary.background import Promise, background
from stretto.parallel.pipeline.vocabulary.groups import Groups, make_groups
from stretto.parallel.pipeline.vocabulary.rows import Rows, Table
from stretto.parallel.pipeline.vocabulary.scores import Scores, Totals
from stretto.parallel.pipeline.vocabulary.spread import Spread
from stretto.parallel.pipeline.vocabulary.sums import GroupSums, Sums
from stretto.schedule.arrows import Places
from stretto.schedule.itinerary import begun_in_warm_up, by_algorithm_2, itinerary
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from stretto.parallel.unit import Unit

Action = Callable[[Play], None]
BACKWARD = (Kind.B, Kind.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """This rank's rows of the head and of the embedding, shard pp · tp_size + tp of pp_size · tp_size."""

    head: nn.Parameter
    """[n, D]."""
    unit: Unit
    """The head's; of a tied one the embedding's too."""
    table: Table
    """The embedding's rows; the same part of the vocabulary."""

    @property
    def units(self) -> list[Unit]:
        """Each once, the embedding's first."""
        return list({id(unit): unit for unit in (self.table.unit, self.unit)}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the passes of all schedules of a rank share."""

    shard: Shard
    mesh: Mesh
    groups: Groups
    transport: Transport
    sums: Sums

    @classmethod
    def join(cls, shard: Shard, mesh: Mesh, device: torch.device) -> Vocabulary:
        """Make the groups; collective over the world."""
        transport = transport_for(device)
        groups = make_groups(mesh, device, transport)
        sums = GroupSums(groups, background(device), here=mesh.index("pp"))
        return cls(shard=shard, mesh=mesh, groups=groups, transport=transport, sums=sums)


class InFlight:
    """A micro-batch from its S on."""

    __slots__ = ("_promise", "_totals", "gradient", "scores")

    def __init__(self, scores: Scores | None) -> None:
        self.scores = scores
        """Until T takes them."""
        self.gradient: tuple[Tensor, Pending] | None = None
        """Of the input, on the rank that needs it: once T has run (algorithm 1), or all S are summed (algorithm 2)."""
        self._promise: Promise | None = None
        self._totals: Totals | None = None

    def expect(self, promise: Promise) -> None:
        """The sums over all ranks are on their way."""
        self._promise = promise

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps that is as large as activations."""
        if self.scores is not None:
            yield from self.scores.tensors()
        if self._promise is not None:
            yield from self._promise.found()[3:]
        if self.gradient is not None:
            yield self.gradient[0]

    def totals(self) -> Totals:
        """Wait for all ranks' S."""
        if self._promise is not None:
            top, mass, loss, *gradient = self._promise.result()
            self._promise, self._totals = None, Totals(top=top, mass=mass, loss=loss)
            if gradient:
                self.gradient = gradient[0], DONE
        assert self._totals is not None
        return self._totals


class Passes:
    """The vocabulary passes of one schedule on one rank.

    Args:
        schedule: lowered.
        rank: position along pp.
    """

    def __init__(self, vocabulary: Vocabulary, schedule: Schedule, rank: int) -> None:
        mesh, groups, shard = vocabulary.mesh, vocabulary.groups, vocabulary.shard
        self._shard, self._sums = shard, vocabulary.sums
        self._schedule, self._rank, own = schedule, rank, schedule.ops(rank)
        paths = {m: schedule.path(m) for m in range(schedule.num_microbatches)}
        self._first = {m: path[0] for m, path in paths.items()}
        self._last = {m: path[-1] for m, path in paths.items()}
        holders = {m: [schedule.rank_of(path[end], schedule.voice[m]) for end in (0, -1)] for m, path in paths.items()}
        self._ending = {m: last for m, (_, last) in holders.items()}
        self._early = by_algorithm_2(Places(schedule))
        self._visits = [v for v in itinerary(schedule, rank) if shard.table.trains or v.what == "look up"]
        order = [op.microbatch for op in own if op.kind is Kind.S]
        self._spread = Spread(
            vocabulary.transport, groups.outputs, order, self._ending, here=rank, num_ranks=mesh.size("pp")
        )
        self._rows = Rows(
            shard.table,
            vocabulary.transport,
            (groups.rows, groups.row_gradients),
            ranks=(mesh.size("pp"), mesh.size("tp")),
            here=rank * mesh.size("tp") + mesh.index("tp"),
            firsts={m: first for m, (first, _) in holders.items()},
        )
        self._in_flight: dict[int, InFlight] = {}
        self._outputs: dict[int, Tensor] = {}
        self._scored: Scores | None = None
        self._differentiated: Tensor | None = None
        """From what an operation waits for to it, and from it to what comes behind: output, scores, T's gradient."""
        self._reducing: list[Pending] = []
        heads = Counter({id(shard.unit): sum(op.kind is Kind.T for op in own) * shard.head.requires_grad})
        self.contributions = heads + Counter({id(shard.table.unit): sum(v.what == "take" for v in self._visits)})
        """How often each unit, by its id, gets gradients in a step."""
        self.losses: dict[int, Tensor] = {}
        """Of the last step, by micro-batch, where the last stage is."""
        self.watch: Callable[[], None] | None = None
        """Called when memory is at its highest: when S has made all that it makes."""

    @property
    def units(self) -> list[Unit]:
        """The shard's."""
        return self._shard.units

    def tensors(self) -> Iterator[Tensor]:
        """What is kept or on its way, as large as activations."""
        for flight in self._in_flight.values():
            yield from flight.tensors()
        yield from self._outputs.values()
        yield from self._spread.tensors()
        yield from self._rows.tensors()

    def begin_step(self, play: Play) -> None:
        """Tokens and labels are there."""
        batches, head = play.batches, self._shard.head
        self._rows.begin_step(batches)
        self._spread.begin_step(lambda m: [((*batches[m].tokens.shape, head.shape[1]), head.dtype)])

    def end_step(self, play: Play) -> None:
        """Sum the losses where the last stage is; return when everything has left."""
        totals = {m: self._in_flight[m].totals() for m in sorted(self._in_flight)}
        self.losses = {m: found.loss for m, found in totals.items() if self._ending[m] == self._rank}
        for loss in self.losses.values():
            play.add_loss(loss)
        for pending in self._reducing:
            pending.wait()
        self._in_flight.clear()
        self._reducing.clear()
        self._spread.end_step()
        self._rows.end_step()

    def abandon(self, play: Play) -> None:
        """The step is given up at its cut, before any S: nothing stays on its way."""
        looked_up, outputs = self._begun_early
        self._rows.abandon(looked_up)
        head = self._shard.head
        self._spread.abandon(outputs, lambda m: head.new_zeros(*play.batches[m].tokens.shape, head.shape[1]))

    @cached_property
    def _begun_early(self) -> tuple[list[int], int]:
        return begun_in_warm_up(self._schedule)

    def score(self, microbatch: int, play: Play) -> None:
        """S: logits and what is summed over the shards."""
        shard, m = self._shard, microbatch
        x = self._outputs.pop(m)
        early, learns = m in self._early, self._schedule.has_backward(self._last[m])
        with torch.no_grad(), whole(shard.unit):
            labels = play.batches[m].labels.flatten()
            scores = Scores(x, labels, shard.head, start=shard.table.start, early=early)
        if not learns:
            scores.forget()
        self._in_flight[m] = InFlight(scores if learns else None)
        self._scored = scores
        if self.watch is not None:
            self.watch()

    def _sum(self, microbatch: int, play: Play) -> None:
        """Behind S: all that needs no weights follows by itself."""
        assert self._scored is not None
        target = self._ending[microbatch] if microbatch in self._early else None
        scores, self._scored = self._scored, None
        self._in_flight[microbatch].expect(self._sums.of_scores(scores, microbatch, target))

    def _await_output(self, microbatch: int, play: Play) -> None:
        self._outputs[microbatch] = self._spread.take(microbatch).flatten(0, 1)

    def _await_totals(self, microbatch: int, play: Play) -> None:
        self._in_flight[microbatch].totals()
        self._spread.let_go(microbatch)

    def differentiate(self, microbatch: int, play: Play) -> None:
        """T: the gradient of the shard, and with algorithm 1 its part of that of the input."""
        shard, m = self._shard, microbatch
        flight = self._in_flight[m]
        totals = flight.totals()
        scores, flight.scores = flight.scores, None
        assert scores is not None
        dlogits = scores.take_logit_gradient(totals, play.seed(totals.top.dtype))
        if m not in self._early:
            with torch.no_grad(), whole(shard.unit):
                self._differentiated = (dlogits @ shard.head).to(totals.top.dtype)
        if shard.head.requires_grad:
            gradient = Deferred()
            gradient.use(scores.x, dlogits)
            shard.unit.add_gradients([gradient if len(shard.head) else None])

    def _send_gradient(self, microbatch: int, play: Play) -> None:
        """Behind T of algorithm 1: summed where the first backward will run; elsewhere let go when it has left."""
        target = self._ending[microbatch]
        dx, self._differentiated = self._differentiated, None
        assert dx is not None
        pending = self._sums.of_gradients(dx, microbatch, target)
        if target == self._rank:
            self._in_flight[microbatch].gradient = dx, pending
        else:
            self._reducing = [*(p for p in self._reducing if not p.is_over()), pending]

    def _gradient(self, microbatch: int, play: Play) -> Tensor:
        """The gradient of the last stage's output, [B, T, D]; waits for it."""
        flight = self._in_flight[microbatch]
        totals = flight.totals()
        assert flight.gradient is not None
        (dx, pending), flight.gradient = flight.gradient, None
        pending.wait()
        if microbatch in self._early:
            dx.mul_(play.seed(totals.top.dtype))
        return dx.view(*play.batches[microbatch].labels.shape, -1).to(self._shard.head.dtype)

    def giver(self, op: Op) -> int | None:
        """Rank that makes the output which an S waits for; None for this one."""
        ending = self._ending[op.microbatch]
        return None if ending == self._rank else ending

    def action(self, op: Op) -> Action:
        """What S or T does."""
        return partial(self.score if op.kind is Kind.S else self.differentiate, op.microbatch)

    def around(self, ops: Sequence[Op]) -> list[tuple[Action | None, Action | None]]:
        """What each of a rank's operations waits for, and what may happen once it is over."""
        visits: list[list[Action]] = [[] for _ in range(len(ops) + 1)]
        visit = {"look up": self._rows.look_up, "exchange": self._rows.exchange, "take": self._rows.take_gradient}
        for at, what, m in self._visits:
            visits[at].append(partial(_call, partial(visit[what], m)))
        before = [(*first, *self._before(op)) for op, first in zip(ops, visits, strict=False)]
        behind = [tuple(self._behind(op)) for op in ops]
        behind[-1] += tuple(visits[-1])
        return [(_together(first), _together(last)) for first, last in zip(before, behind, strict=True)]

    def _before(self, op: Op) -> Iterator[Action]:
        """What an operation waits for: S, T, and those at either end of the model."""
        m, stage = op.microbatch, op.stage
        if op.kind is Kind.S:
            yield partial(self._await_output, m)
        elif op.kind is Kind.T:
            yield partial(self._await_totals, m)
        elif op.kind is Kind.F and stage == self._first[m]:
            yield partial(_put, ("F", stage, m), lambda play: self._rows.take(m))
        elif op.kind in BACKWARD and stage == self._last[m]:
            yield partial(_put, ("B", stage, m), partial(self._gradient, m))

    def _behind(self, op: Op) -> Iterator[Action]:
        """What becomes of the result of such an operation."""
        m, stage = op.microbatch, op.stage
        if op.kind is Kind.S:
            yield partial(self._sum, m)
        elif op.kind is Kind.T and m not in self._early:
            yield partial(self._send_gradient, m)
        elif op.kind is Kind.F and stage == self._last[m]:
            yield partial(_take, (END_F, stage, m), lambda y: self._spread.give(m, y.detach().contiguous()))
        elif op.kind in BACKWARD and self._schedule.gradient_target(stage, m) is None:
            learns = stage == self._first[m] and self._shard.table.trains  # else nobody needs it
            yield partial(_take, (END_B, stage, m), partial(self._rows.give_back, m) if learns else _drop)


@dataclass(frozen=True, slots=True)
class Together:
    """Several actions, one after the other."""

    actions: tuple[Action, ...]

    def __call__(self, play: Play) -> None:
        """Play them."""
        for action in self.actions:
            action(play)


def _together(actions: tuple[Action, ...]) -> Action | None:
    return actions[0] if len(actions) == 1 else Together(actions) if actions else None


def _call(visit: Callable[[], None], play: Play) -> None:
    visit()


def _put(slot: Slot, make: Callable[[Play], Tensor], play: Play) -> None:
    play.values[slot] = make(play)


def _drop(value: Value) -> None:
    """Nobody needs it."""


def _take(slot: Slot, use: Callable[[Any], None], play: Play) -> None:
    use(play.values.pop(slot))


@contextmanager
def whole(unit: Unit) -> Iterator[None]:
    """With the unit's parameters gathered."""
    unit.unshard()
    unit.ready()
    yield
    unit.reshard()
