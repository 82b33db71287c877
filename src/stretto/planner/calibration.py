"""What was measured of a machine: shares of its data-sheet rates that real work reaches.

Four numbers are fitted (``FITTED``); their defaults are what ``benchmarks/planner_truth.py`` finds on the 13B runs of
Hagemann et al. 2023 (arXiv 2311.05610, A100-80GB, 64 devices).  The rest is cited: steps of one small cluster tell
neither the rates of the flash kernels, which are those of the kernels' own papers, nor the network's.

Later machines reach smaller shares of larger peaks (``OTHERS``).  An H100's tensor cores draw more than its 700 W where
they are all at work, so that its clock falls: its best product of all shapes reaches 80% of the peak, an A100's 87%
(Bekman, Machine Learning Engineering).  What remains in training is fitted on MosaicML's runs of one code on both
machines (``benchmarks/planner_h100.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
    overlap: float = 0.0
    """Of a device's processors, those that a collective takes from the products it is hidden under."""
    host_bytes_per_second: float = 2e10
    """Between a device and its host, each way: PCIe 4.0 x16 carries 31.5 GB/s, pinned copies get 2/3."""
    machine: Machine | None = None
    """Figures of the very machine, by size (``stretto diagnose --calibrate``): where there are some, a step is put
    together from them (``measured_step``), and the shares above aren't asked."""


HOPPER: Mapping[str, Any] = {"matmul": 0.63, "flash_2": 0.35, "overlap": 20 / 132}
"""``matmul``: see above.  ``flash_2``: made for the A100's instructions, it reaches 35% of an H100 (Shah et al. 2024,
arXiv 2407.08608, abstract).  ``overlap``: 20 of 132 processors communicate (DeepSeek-V3, arXiv 2412.19437, section
3.2.2); NCCL takes 24 for an all-gather."""
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "h100": HOPPER,
    "h200": HOPPER,
    # Its best product reaches 78% of the peak (Bekman), an H100's 80%; nothing is published of the rest.
    "b200": {**HOPPER, "matmul": 0.61},
}
"""Preset -> what differs from the A100's shares."""


def published(name: str) -> Calibration:
    """The published shares of a cluster, by the preset in its name (``h100:64``); of others the A100's.

    >>> published("h100:64").matmul, published("a100:64").matmul
    (0.63, 0.815)
    """
    return replace(Calibration(), **OTHERS.get(name.partition(":")[0], {}))
