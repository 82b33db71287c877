"""What rooms of one floor need of each other, as plain data and Protocols.

``data`` makes a Batch that ``models`` reads; ``models`` offer a Stack that ``parallel`` runs and
``assemble`` cuts; ``parallel`` holds Pieces that ``checkpoint`` writes; the pipeline tells an
Observer what it does, which ``resilience`` implements.  None of them imports the other.

Shapes: B sequences of a micro-batch, T tokens of a sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from stretto.spec.sequence import Range, Ranges, Section
    from stretto.spec.sharding import TensorRule

IGNORE = -100
"""A label with this value takes no part in the loss or in the token count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePart:
    """Which tokens of every row a context-parallel rank holds, and what it knows of the others."""

    shares: tuple[Ranges, ...]
    """Tokens of each rank of cp."""
    tokens: Tensor
    """int64 [T], where in the whole row each token of this rank sits."""
    documents: Tensor | None
    """``Batch.documents`` of the whole rows, [B, S]; the tokens of a document follow each other."""
    sections: tuple[Section, ...] = ()
    """Where documents have groups of their own, what this rank holds of which, in order (B is 1); ``tokens`` are then
    counted over each document, and ``shares`` says only how long the longest is."""
    sources: Tensor | None = None
    """int64 [T, 2], likewise: the sample of each token and its place in that row; -1 where it fills up."""
    away: int = 0
    """Blocks whose activations of this micro-batch are on the host between forward and backward."""

    @property
    def length(self) -> int:
        """Tokens of a whole row, S."""
        return max(ranges[-1][1] for ranges in self.shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """Clips on the way from noise to data (rectified flow); of cut ones the frames, and the patches, that are here."""

    noisy: Tensor
    """float32 [B, frames here, P, C], (1 - time) clip + time noise."""
    velocity: Tensor
    """float32 [B, F, patches here, C], noise - clip: what is to be told."""
    time: Tensor
    """float32 [B], between 0 (the clip) and 1 (noise)."""
    frames: Range
    """Which frames ``noisy`` has."""
    patches: Range
    """Which patches ``velocity`` has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch as the loader hands it to every stage."""

    tokens: Tensor
    """int64 [B, T], the input tokens."""
    labels: Tensor
    """int64 [B, T], the token to predict at each position, IGNORE where there is none."""
    positions: Tensor
    """int64 [B, T], position inside the document (restarts at 0 with each document)."""
    documents: Tensor | None
    """int64 [B, T], which document of the row a token belongs to, or None where each row is one
    document (plain causal attention is then right)."""
    samples: Tensor
    """int64 [B], global sample index of each row; with seed and step it keys dropout."""
    part: SequencePart | None = None
    """Where the T tokens sit, if rows are cut over cp; None: these are whole rows."""
    clips: Clips | None = None
    """Of clips, what they are; tokens, positions and labels (but for IGNORE) are 0, for each patch of each frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which part of a micro-batch this rank sees, and what keys its dropout."""

    seed: int = 0
    """run.seed."""
    step: int = 0
    """Optimizer step, from 1; 0 where nothing is trained."""
    token_start: int = 0
    """Which of the batch's tokens is the first of the activations between attention and feed-forward
    (sequence-parallel regions hold a slice of the sequence)."""
    head_start: int = 0
    """Index of the first query head that this rank computes."""
    training: bool = True
    """False in evaluation and generation: no dropout."""


@runtime_checkable
class Stack(Protocol):
    """A model as ``inputs -> blocks[0] ... blocks[L-1] -> outputs``: all that parallelism needs of it.

    It is an ``nn.Module`` whose parameters live under these three attributes, so that a
    parameter's global name starts with ``inputs.``, ``blocks.<i>.`` or ``outputs.``.  What
    travels from part to part is one tensor [B, T, D], or a tuple of tensors.
    """

    inputs: nn.Module
    """``inputs(batch, context) -> x``: embeddings."""
    blocks: nn.ModuleList
    """``blocks[i](x, context) -> x``: the layers that stages are cut from."""
    outputs: nn.Module
    """``outputs(x, context) -> predictions``: final norm and head."""
    tied: Mapping[str, str]
    """Global name of a tied copy -> global name of its original."""
    tensor_rules: Mapping[str, TensorRule]
    """What tensor parallelism does to which module, by module name with ``*`` for the block index.
    Empty: the model can't be split over tp."""

    def context(self, batch: Batch, place: Place) -> Any:
        """What all blocks of a micro-batch share (rotary tables, masks); has no parameters."""

    def loss(self, predictions: Any, batch: Batch) -> Tensor:
        """Sum (not mean) of the loss over the valid tokens of the micro-batch, a scalar."""

    def initial_value(self, name: str) -> tuple[str, float] | None:
        """How parameter ``name`` starts: ``("normal", std)``, ``("constant", value)``, or None to
        take the value that the module already holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of a named global tensor that lies on this rank."""

    name: str
    """Global name with its kind, ``model.blocks.0.attention.q.weight`` or ``optimizer.exp_avg.…``."""
    shape: tuple[int, ...]
    """Global shape."""
    offset: tuple[int, ...]
    """Where the rectangle starts, per dim."""
    tensor: Tensor
    """The data, shaped like the rectangle; loading writes into it in place."""
    owned: bool = True
    """True on exactly one rank per element: that rank writes it.  All ranks read theirs."""


class Observer(Protocol):
    """Hears what a rank does, operation by operation; must be cheap (a microsecond)."""

    step: int
    """The optimizer step under way; the loop sets it."""

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """``operation`` (``2F7``, ``RECV_F 2 7``, ``OPT`` ...) starts; ``peer`` is whom it waits for."""

    def end(self) -> None:
        """The operation begun last is over."""


class Silent:
    """The Observer that hears nothing."""

    step = 0

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """Ignore it."""

    def end(self) -> None:
        """Ignore it."""


class Progress(Protocol):
    """Shows how far a long piece of work is (tokenising, converting)."""

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """``done`` of ``total`` units of ``what`` are finished."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """Number of ids, special ones included."""
    end_of_text: int
    """The id that ends a document."""
    fingerprint: str
    """Hash of everything that decides the ids; a checkpoint refuses a tokenizer with another."""

    def encode(self, text: str) -> Sequence[int]:
        """Ids of ``text``, without end_of_text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
