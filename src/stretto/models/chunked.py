"""Linear attention with decay, and the gated delta rule, chunk by chunk in plain PyTorch.

Both are recurrences over a state S [K, K] per key/value head, with a in (0, 1] and b in (0, 1) per token:

    linear     S = a S + k v^T                              o = q^T S
    delta      S = a S + k u^T,  u = b (v - a S^T k)         o = q^T S        = a (I - b k k^T) S + b k v^T

Inside a chunk everything is matrix products.  With D[t, s] the decay from token s to t, d[t] that from the chunk's
start, e[s] that to its end, and M = tril(Q K^T * D), what a chunk makes of the state S before it is affine in S:

    U = Y - W S         (1 + tril(b K K^T * D, -1)) [Y W] = [b V, b d K]       (delta; for linear Y = V and W = 0)
    out = reads S + own           reads = d Q - M W           own  = M Y
    S'  = through S + gain        through = d_end - (e K)^T W     gain = (e K)^T Y

so chunks are summarised independently of each other and then chained (GLA, Yang et al. 2023; DeltaNet's WY form,
Yang et al. 2024; Gated DeltaNet, Yang et al. 2024).  A token that starts a document forgets what was before it: D, d
and e are 0 across it.  Decays are only ever exponentials of sums of logarithms that are not positive, so nothing
overflows.  States and sums are float32 at least.

Shapes: B sequences, T tokens, H query heads, G key/value heads, R = H/G, N chunks, C tokens of a chunk, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from stretto.models.norm import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64
"""Tokens of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What the recurrence reads, of consecutive tokens."""

    q: Tensor
    """[B, H, T, K]."""
    k: Tensor
    """[B, G, T, K]."""
    v: Tensor
    """[B, G, T, K]."""
    log_decay: Tensor
    """[B, G, T], logarithm of a, at most 0."""
    write: Tensor | None = None
    """[B, G, T], b of the delta rule; None: linear attention."""
    starts: Tensor | None = None
    """bool [B, T], True where a document begins; None: nowhere."""

    def narrow(self, start: int, length: int) -> Tokens:
        """Some of the tokens."""
        return Tokens(
            q=self.q.narrow(2, start, length),
            k=self.k.narrow(2, start, length),
            v=self.v.narrow(2, start, length),
            log_decay=self.log_decay.narrow(2, start, length),
            write=None if self.write is None else self.write.narrow(2, start, length),
            starts=None if self.starts is None else self.starts.narrow(1, start, length),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the chunks of consecutive tokens make of any state before them."""

    through: Tensor
    """[B, G, N, K, K]; [B, G, N, 1, 1] of linear attention, whose states are only scaled."""
    gain: Tensor
    """[B, G, N, K, K]."""
    q: Tensor
    """[B, G, R, N, C, K]."""
    k: Tensor
    """[B, G, N, C, K]."""
    written: Tensor
    """Y, what tokens write where the state before is 0, [B, G, N, C, K]."""
    taken: Tensor | None
    """W, how much less they write for what a state says, [B, G, N, C, K]; None: linear."""
    decay: Decay
    length: int
    """Tokens, without those that fill the last chunk."""

    def total(self) -> tuple[Tensor, Tensor]:
        """``through`` [B, G, K, K] (or [B, G, 1, 1]) and ``gain`` [B, G, K, K] of all chunks together."""
        # Not indexed one by one: the gradient of each index would be as large as all chunks.
        (through, *steps), (gain, *gains) = self.through.unbind(2), self.gain.unbind(2)
        for step, more in zip(steps, gains, strict=True):
            through, gain = step @ through, passed(step, gain) + more
        return through, gain

    def read(self) -> Reading:
        """What queries see of their own chunk, and how they read a state: nothing here waits for one."""
        mixed = (self.q @ self.k.transpose(3, 4).unsqueeze(2)) * self.decay.between.unsqueeze(2)
        reads = self.q * self.decay.since_start.unsqueeze(-1).unsqueeze(2)
        if self.taken is not None:
            reads = reads - mixed @ self.taken.unsqueeze(2)
        return Reading(reads=reads, own=mixed @ self.written.unsqueeze(2), summary=self)

    def output(self, state: Tensor) -> Tensor:
        """[B, H, T, K], given the state [B, G, K, K] before the first token."""
        return self.read().output(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Outputs as far as they don't need the state before the first token."""

    reads: Tensor
    """[B, G, R, N, C, K]."""
    own: Tensor
    """[B, G, R, N, C, K]."""
    summary: Summary

    def output(self, state: Tensor) -> Tensor:
        """[B, H, T, K], given the state [B, G, K, K] before the first token."""
        states = [state]
        for through, gain in list(zip(self.summary.through.unbind(2), self.summary.gain.unbind(2), strict=True))[:-1]:
            states.append(passed(through, states[-1]) + gain)
        out = self.own + self.reads @ torch.stack(states, dim=2).unsqueeze(2)
        return out.flatten(1, 2).flatten(2, 3)[:, :, : self.summary.length]


def passed(through: Tensor, state: Tensor) -> Tensor:
    """``through`` [..., K, K] applied to a state [..., K, K]; one of [..., 1, 1] scales it."""
    return through * state if through.size(-1) == 1 else through @ state


def summarise(tokens: Tokens, chunk: int = CHUNK) -> Summary:
    """Summarise consecutive tokens in chunks of ``chunk``; the last is filled up with tokens that do nothing."""
    length = tokens.k.size(2)
    chunk = min(chunk, length)
    q, k, v = (_chunked(at_least_float32(x), chunk) for x in (tokens.q, tokens.k, tokens.v))
    decay = Decay.of(tokens, chunk)
    kept = (k * decay.to_end.unsqueeze(-1)).transpose(3, 4)
    through, written, taken = decay.since_start[..., -1, None, None], v, None
    if tokens.write is not None:
        write = _chunked(at_least_float32(tokens.write).unsqueeze(-1), chunk)
        again = (write * (k @ k.transpose(3, 4)) * decay.between).tril(-1)
        right = torch.cat((write * v, write * decay.since_start.unsqueeze(-1) * k), dim=-1)
        written, taken = torch.linalg.solve_triangular(again, right, upper=False, unitriangular=True).chunk(2, dim=-1)
        through = through * torch.eye(k.size(-1), dtype=k.dtype, device=k.device) - kept @ taken
    return Summary(
        through=through,
        gain=kept @ written,
        q=q.unflatten(1, (k.size(1), -1)),
        k=k,
        written=written,
        taken=taken,
        decay=decay,
        length=length,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decay:
    """Products of decays inside chunks, 0 across the start of a document."""

    between: Tensor
    """From a token to a later one or itself, [B, G, N, C later, C earlier], 0 above the diagonal."""
    since_start: Tensor
    """From before the chunk to a token, [B, G, N, C]."""
    to_end: Tensor
    """From a token to the chunk's last, [B, G, N, C]."""

    @classmethod
    def of(cls, tokens: Tokens, chunk: int) -> Decay:
        """Those of tokens in chunks of ``chunk``."""
        decays = _chunked(at_least_float32(tokens.log_decay).unsqueeze(-1), chunk).squeeze(-1)
        total = decays.cumsum(-1)
        between = total.unsqueeze(-1) - total.unsqueeze(-2)
        seen = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).tril()
        since, to_end = total, total[..., -1:] - total
        if tokens.starts is not None:
            document = _chunked(tokens.starts[:, None, :, None].long(), chunk).squeeze(-1).cumsum(-1)
            seen = seen & (document.unsqueeze(-1) == document.unsqueeze(-2))
            since = since.masked_fill(document > 0, float("-inf"))
            to_end = to_end.masked_fill(document != document[..., -1:], float("-inf"))
        # Masked before the exponential, which overflows where it runs backwards in time.
        between = between.masked_fill(~seen, float("-inf"))
        return cls(between=between.exp(), since_start=since.exp(), to_end=to_end.exp())


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """[B, heads, T, X] -> [B, heads, N, C, X], filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.size(2) % chunk)).unflatten(2, (-1, chunk))
