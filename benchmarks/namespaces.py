"""Two nodes on one machine: network namespaces, and between them a link that is as slow as it is told.

    node 0  ┌─────────────┐  east ── tbf ──► west  ┌─────────────┐  node 1        ranks of a node: loopback
            │ ranks 0 1 2 │  ◄── tbf ──────────    │ ranks 3 4 5 │                of different nodes: the link, all
            └─────────────┘                        └─────────────┘                of them through it

A namespace has no name and lives as long as a process in it, here one that reads from a pipe to this process and to the
ranks, which end with this process: whatever ends it, namespaces and link go with it.  Needs Linux, root, and the tools
ip, tc, unshare and nsenter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("ip", "tc", "unshare", "nsenter")
INTERFACES = ("east", "west")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
NEW_NETWORK = 0x40000000
"""Linux: CLONE_NEWNET."""
DEATH_SIGNAL = 1
"""Linux: ``prctl`` option for the signal that comes when the parent ends."""
BURST_SECONDS = 0.004
"""What the link lets through at once: less than a tick of the kernel's clock would make it slower than asked."""
QUEUE_BYTES = 64 * 2**20
"""What may wait before the link; more would be lost and sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Two namespaces."""

    holders: tuple[int, int]
    """Processes that live in them."""

    def enter(self, node: int) -> str:
        """Move the calling process to a node; the interface by which others reach it."""
        handle = os.open(f"/proc/{self.holders[node]}/ns/net", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(handle, NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"can't enter the namespace of node {node}")
        finally:
            os.close(handle)
        return INTERFACES[node]

    def limit(self, bytes_per_second: float) -> None:
        """Set the rate of the link, each way."""
        rate = f"{round(bytes_per_second * 8)}bit"
        burst = str(max(4096, round(bytes_per_second * BURST_SECONDS)))
        for node, interface in enumerate(INTERFACES):
            queue = ["root", "tbf", "rate", rate, "burst", burst, "limit", str(QUEUE_BYTES)]
            self._inside(node, ["tc", "qdisc", "replace", "dev", interface, *queue])

    def connect(self) -> None:
        """Lay the link."""
        east, west = INTERFACES
        ends = ["name", east, "type", "veth", "peer", "name", west, "netns", str(self.holders[1])]
        self._inside(0, ["ip", "link", "add", *ends])
        for node, interface in enumerate(INTERFACES):
            self._inside(node, ["ip", "address", "add", f"{ADDRESSES[node]}/24", "dev", interface])
            self._inside(node, ["ip", "link", "set", interface, "up"])
            self._inside(node, ["ip", "link", "set", "lo", "up"])

    def _inside(self, node: int, command: Sequence[str]) -> None:
        done = subprocess.run(
            ["nsenter", "--net", "--target", str(self.holders[node]), *command], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def die_with(parent: int) -> None:
    """Let this process be killed when its ``parent`` ends, however that ends."""
    ctypes.CDLL(None).prctl(DEATH_SIGNAL, int(signal.SIGKILL))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Two connected namespaces, gone afterwards; SystemExit where they can't be had."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"network namespaces need {', '.join(missing)}, which this machine lacks (Linux: iproute2).")
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root; run this as root, or benchmarks.context, which emulates links.")
    holders = [
        subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "01"
    ]
    try:
        for holder in holders:
            _wait_for_namespace(holder)
        nodes = Nodes(holders=(holders[0].pid, holders[1].pid))
        nodes.connect()
        yield nodes
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _wait_for_namespace(holder: subprocess.Popen[bytes]) -> None:
    ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{holder.pid}/ns/net")
    while holder.poll() is None:
        if theirs.readlink() != ours.readlink():
            return
        time.sleep(0.01)
    assert holder.stderr is not None
    raise SystemExit(f"no network namespace can be made here: {holder.stderr.read().decode().strip()}")
