"""Host memory of a run that offloads activations: how much a rank may take, and how much it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.parallel.offload.pool import half_of_this_host
from stretto.schedule.op import Kind

if TYPE_CHECKING:
    from stretto.parallel.pipeline.runtime import Runtime
    from stretto.spec.run import RunSpec
    from stretto.trainer.session import Session


def limit_host_memory(runtime: Runtime, run: RunSpec) -> None:
    """Let all ranks of a host together take half of its memory; activations beyond that stay on their devices."""
    if runtime.offloader is not None:
        ranks = run.plan.num_ranks
        if run.cluster.num_nodes > 1:
            ranks = min(ranks, run.cluster.devices_per_node)
        runtime.offloader.pool.limit_bytes = half_of_this_host(ranks)


def host_bytes(session: Session) -> int | None:
    """The most that this rank's activations took on the host, in bytes; None where no rank offloads."""
    offloader = session.runtime.offloader
    if offloader is None and not (session.schedule.kind == Kind.O).any():
        return None
    return 0 if offloader is None else offloader.pool.peak_bytes
