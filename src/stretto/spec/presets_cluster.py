"""Cluster presets: ``cluster.name = "h100:512"``.

Rates are the vendors' dense peaks (no sparsity); memory is decimal as on the data sheets; links are one
direction of one device.  A measured figure of your own machine belongs in ``[cluster]`` and wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError, nearest

CLUSTERS: Mapping[str, ClusterSpec] = MappingProxyType(
    {
        # Nothing is known of a CPU until it is measured; MFU is then absent.
        "local-cpu": ClusterSpec(name="local-cpu"),
        # NVIDIA A100 data sheet (SXM, 80 GB: 312 TFLOP/s bfloat16, 19.5 TFLOP/s float32, 2,039 GB/s, NVLink
        # 600 GB/s both ways); DGX A100 user guide: eight 200 Gb/s adapters for compute.
        "a100": ClusterSpec(
            name="a100",
            devices_per_node=8,
            memory_bytes=80e9,
            peak_flops_bfloat16=312e12,
            peak_flops_float32=19.5e12,
            memory_bytes_per_second=2.039e12,
            link_bytes_per_second=300e9,
            network_bytes_per_second=25e9,
        ),
        # NVIDIA H100 data sheet (SXM: 1,979 TFLOP/s bfloat16 with sparsity, half of it dense; 67 TFLOP/s float32,
        # 3.35 TB/s, NVLink 900 GB/s both ways); DGX H100 user guide: eight 400 Gb/s adapters.
        "h100": ClusterSpec(
            name="h100",
            devices_per_node=8,
            memory_bytes=80e9,
            peak_flops_bfloat16=989.5e12,
            peak_flops_float32=67e12,
            memory_bytes_per_second=3.35e12,
            link_bytes_per_second=450e9,
            network_bytes_per_second=50e9,
        ),
        # NVIDIA H200 data sheet (SXM: the rates and links of H100, 141 GB at 4.8 TB/s).
        "h200": ClusterSpec(
            name="h200",
            devices_per_node=8,
            memory_bytes=141e9,
            peak_flops_bfloat16=989.5e12,
            peak_flops_float32=67e12,
            memory_bytes_per_second=4.8e12,
            link_bytes_per_second=450e9,
            network_bytes_per_second=50e9,
        ),
        # NVIDIA DGX B200 data sheet (1,440 GB and 64 TB/s over eight devices, NVLink 1.8 TB/s both ways, eight
        # 400 Gb/s adapters) and Blackwell architecture brief (HGX B200: 2.25 PFLOP/s dense bfloat16, 80 TFLOP/s
        # float32).
        "b200": ClusterSpec(
            name="b200",
            devices_per_node=8,
            memory_bytes=180e9,
            peak_flops_bfloat16=2250e12,
            peak_flops_float32=80e12,
            memory_bytes_per_second=8e12,
            link_bytes_per_second=900e9,
            network_bytes_per_second=50e9,
        ),
        # Frontier user guide (OLCF): a node is four MI250X, each two dies (GCDs) that count as devices of 64 GB;
        # 200 GB/s within a module but 50 to 100 GB/s between modules, so 50 is what a ring through the node
        # gets; four 25 GB/s Slingshot adapters a node.  AMD MI250X data sheet, halved per die: 383 TFLOP/s
        # bfloat16 matrix, 95.7 TFLOP/s float32 matrix, 3.2 TB/s.
        "mi250x": ClusterSpec(
            name="mi250x",
            devices_per_node=8,
            memory_bytes=64e9,
            peak_flops_bfloat16=191.5e12,
            peak_flops_float32=47.85e12,
            memory_bytes_per_second=1.6e12,
            link_bytes_per_second=50e9,
            module_devices=2,
            module_bytes_per_second=200e9,
            network_bytes_per_second=12.5e9,
        ),
        # LEONARDO's Booster (CINECA; Turisini, Amati and Cestari 2023, arXiv 2307.16885): a node is four custom A100 of
        # 64 GB at 1,640 GB/s and 124 processors, 22.4 TFLOP/s float64 on tensor cores and float32, and 16 times that
        # in bfloat16 as on every A100; each pair linked by NVLink at 200 GB/s both ways; four HDR100 ports a node.
        "leonardo": ClusterSpec(
            name="leonardo",
            devices_per_node=4,
            memory_bytes=64e9,
            peak_flops_bfloat16=358e12,
            peak_flops_float32=22.4e12,
            memory_bytes_per_second=1.64e12,
            link_bytes_per_second=300e9,
            network_bytes_per_second=12.5e9,
        ),
        # Fire-Flyer 2 (An et al. 2024, arXiv 2408.14158): a node is eight PCIe A100 of 40 GB and one adapter of 200
        # Gb/s, which they share.  NVIDIA A100 data sheet (PCIe, 40 GB: the rates of SXM, 1,555 GB/s); PCIe 4.0 x16
        # carries 31.5 GB/s one way.  Boards of the NVLink bridges that later nodes have: ``module_devices``.
        "fire-flyer": ClusterSpec(
            name="fire-flyer",
            devices_per_node=8,
            memory_bytes=40e9,
            peak_flops_bfloat16=312e12,
            peak_flops_float32=19.5e12,
            memory_bytes_per_second=1.555e12,
            link_bytes_per_second=31.5e9,
            network_bytes_per_second=3.125e9,
        ),
        # NVIDIA Ada architecture paper (RTX 4090: 165.2 TFLOP/s dense bfloat16 with float32 sums, 82.6 TFLOP/s float32,
        # 24 GB at 1,008 GB/s; no NVLink).  Without peer-to-peer every byte goes through the host's memory, in and out:
        # half of PCIe 4.0 x16.  A box is taken to hold eight and one 100 Gb/s adapter: write your own.
        "rtx-4090": ClusterSpec(
            name="rtx-4090",
            devices_per_node=8,
            memory_bytes=24e9,
            peak_flops_bfloat16=165.2e12,
            peak_flops_float32=82.6e12,
            memory_bytes_per_second=1.008e12,
            link_bytes_per_second=15.75e9,
            network_bytes_per_second=1.5625e9,
        ),
    }
)
"""Preset name -> one node of it."""


def cluster_preset(name: str, **overrides: Any) -> ClusterSpec:
    """The cluster that ``preset`` or ``preset:devices`` means, with fields replaced.

    Up to one node any number of devices will do; beyond it they must be whole nodes.  ConfigError
    says the nearest preset or the nearest numbers that fit.

    >>> cluster = cluster_preset("h100:512")
    >>> cluster.num_nodes, cluster.devices_per_node
    (64, 8)
    """
    preset, colon, count = name.partition(":")
    if preset not in CLUSTERS:
        raise ConfigError(
            f"There is no cluster preset {preset!r}{nearest(preset, CLUSTERS) or '.'} "
            f"Presets are {', '.join(CLUSTERS)}."
        )
    cluster = dataclasses.replace(CLUSTERS[preset], name=name)
    if colon:
        if not count.isascii() or not count.isdigit() or int(count) < 1:
            raise ConfigError(f"{name!r} must end in a number of devices, at least 1, for example {preset}:8.")
        cluster = _sized(cluster, preset, int(count))
    return dataclasses.replace(cluster, **overrides)


def _sized(cluster: ClusterSpec, preset: str, devices: int) -> ClusterSpec:
    per_node = cluster.devices_per_node
    if devices <= per_node or preset == "local-cpu":  # a CPU holds as many processes as one likes
        return dataclasses.replace(cluster, num_nodes=1, devices_per_node=devices)
    if devices % per_node:
        below = devices - devices % per_node
        raise ConfigError(
            f"{devices} devices aren't whole nodes of {per_node}; write {preset}:{below} or "
            f"{preset}:{below + per_node}."
        )
    return dataclasses.replace(cluster, num_nodes=devices // per_node)
