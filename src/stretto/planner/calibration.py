"""What was measured of a machine: shares of its data-sheet rates that real work reaches.

Four numbers are fitted (``FITTED``); their defaults are what ``benchmarks/planner_truth.py`` finds on the 13B runs of
Hagemann et al. 2023 (arXiv 2311.05610, A100-80GB, 64 devices).  The rest is cited: steps of one small cluster tell
neither the rates of the flash kernels, which are those of the kernels' own papers, nor the network's.
"""

from __future__ import annotations

from dataclasses import dataclass

from stretto.planner.machine import Machine

FITTED = ("matmul", "memory", "link", "kernel_latency")
"""Fields that a fit to measured step times may move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Shares of the data sheet's rates, 0 to 1, and latencies."""

    matmul: float = 0.815
    """Of the 16-bit peak, matrix products whose waves are full (``matmul`` counts those that aren't)."""
    memory: float = 0.925
    """Of the memory bandwidth, kernels that only move data."""
    link: float = 0.467
    """Of the bandwidth inside a node, collectives."""
    kernel_latency: float = 1.89e-5
    """Seconds that each kernel takes however little there is to compute: its launch, and filling and draining the
    device."""
    network: float = 0.95
    """Of the bandwidth between nodes, collectives that meet no others: RDMA runs at the line's rate but for headers.
    What others on the same links cost comes on top (``congestion``)."""
    message: float = 0.32
    """Of the bandwidth between nodes, one message between stages: 7.7 to 8.8 GB/s of 25 in Galvatron's published
    profile of two 8-GPU nodes."""
    flow_splits: int | None = None
    """Parts that a flow is split into, each on a path of its own; None: 1 on networks of the A100's generation, 8 on
    those that choose paths packet by packet."""
    flash_1: float = 0.32
    """Of the 16-bit peak, FlashAttention 1 forward and backward (Dao 2023, figure 4: about 100 TFLOP/s of 312)."""
    flash_2: float = 0.55
    """Of the 16-bit peak, FlashAttention 2 (same figure: about 170 TFLOP/s of 312)."""
    flash_3: float = 0.65
    """Of the 16-bit peak, FlashAttention 3 on Hopper (Shah et al. 2024, figures 5 and 6: 550 to 740 of 989)."""
    link_latency: float = 5e-6
    """Seconds of one hop inside a node, kernel launch included."""
    network_latency: float = 1e-5
    """Seconds of one hop between nodes."""
    host_bytes_per_second: float = 2e10
    """Between a device and its host, each way: PCIe 4.0 x16 carries 31.5 GB/s, pinned copies get 2/3."""
    machine: Machine | None = None
    """Figures of the very machine, by size (``stretto diagnose --calibrate``): where there are some, a step is put
    together from them (``measured_step``), and the shares above aren't asked."""
