"""Which machines there are: devices, their memory and rates, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Equal nodes of equal devices."""

    name: str = "local-cpu"
    """Preset, or a label of your own; ``h100:512`` means 512 devices of the preset."""
    num_nodes: int = 1
    """Number of nodes."""
    devices_per_node: int = 1
    """Devices in a node; on a CPU, processes."""
    memory_bytes: float = 8e9
    """Memory of a device in bytes."""
    peak_flops_bfloat16: float = 0.0
    """Dense peak of a device in FLOP/s with bfloat16 inputs; 0: not known, MFU is then absent."""
    peak_flops_float32: float = 0.0
    """Same with float32 inputs; 0: not known."""
    memory_bytes_per_second: float = 0.0
    """Memory bandwidth of a device in bytes/s; 0: not known."""
    link_bytes_per_second: float = 0.0
    """Bandwidth of a device to others of its node, one direction, in bytes/s; 0: not known."""
    module_devices: int = 0
    """Neighbours in a node that are linked faster than the whole node (dies of a module, a bridged pair); 0: none."""
    module_bytes_per_second: float = 0.0
    """Bandwidth of a device to its neighbours of that module, one direction, in bytes/s."""
    network_bytes_per_second: float = 0.0
    """Bandwidth of a device to other nodes, one direction, in bytes/s; 0: not known."""
    calibration: str | None = None
    """File of ``stretto diagnose --calibrate``: what these machines reach; relative to the working directory."""
