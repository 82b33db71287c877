"""What was measured of a machine: shares of its data-sheet rates that real work reaches.

Five numbers are fitted (``FITTED``); their defaults are what ``benchmarks/planner_truth.py`` finds on the 13B runs of
Hagemann et al. 2023 (arXiv 2311.05610, A100-80GB, 64 devices).  The rest is cited: steps of one small cluster tell
neither the rates of the flash kernels, which are those of the kernels' own paper, nor the network's.
"""

from __future__ import annotations

from dataclasses import dataclass

FITTED = ("matmul", "memory", "link", "message", "layer_latency")
"""Fields that a fit to measured step times may move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Shares of the data sheet's rates, 0 to 1, and latencies."""

    matmul: float = 0.72
    """Of the 16-bit peak, matrix products of transformer shapes."""
    memory: float = 0.84
    """Of the memory bandwidth, kernels that only move data."""
    link: float = 0.6
    """Of the bandwidth inside a node, collectives."""
    network: float = 0.22
    """Of the bandwidth between nodes, collectives and messages that share it: Galvatron's published profile of two
    8-GPU nodes has all-reduce at 44.7 GB/s over 16 ranks and 8.1, 16.2 and 20.8 GB/s over 2, 4 and 8 of them while
    the other groups use the network too, 5.2 to 8.1 GB/s a device; 25 GB/s is the data sheet's."""
    message: float = 0.1
    """Of the bandwidth between nodes, one message between stages, hand-over by the host included."""
    layer_latency: float = 6e-4
    """Seconds that a layer's forward pass takes however little there is to compute: launches, and the tails of kernels
    whose last wave doesn't fill the device; the backward pass takes twice that."""
    flash_1: float = 0.32
    """Of the 16-bit peak, FlashAttention 1 forward and backward (Dao 2023, figure 4: about 100 TFLOP/s of 312)."""
    flash_2: float = 0.55
    """Of the 16-bit peak, FlashAttention 2 (same figure: about 170 TFLOP/s of 312)."""
    link_latency: float = 5e-6
    """Seconds of one hop inside a node, kernel launch included."""
    network_latency: float = 1e-5
    """Seconds of one hop between nodes."""
    host_bytes_per_second: float = 2e10
    """Between a device and its host, each way: PCIe 4.0 x16 carries 31.5 GB/s, pinned copies get 2/3."""
