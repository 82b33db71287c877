"""Which machines there are: devices, their memory and rates, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """Some of the nodes of mixed machines, equal among themselves; all rates are known."""

    name: str
    """Preset and number of devices, or a label."""
    num_nodes: int
    """Number of nodes."""
    devices_per_node: int
    """Devices in a node."""
    memory_bytes: float
    """Memory of a device in bytes."""
    peak_flops_bfloat16: float
    """Dense peak of a device in FLOP/s with bfloat16 inputs."""
    memory_bytes_per_second: float
    """Memory bandwidth of a device."""
    link_bytes_per_second: float
    """Of a device to others of its node, one direction."""
    network_bytes_per_second: float
    """Of a device to other nodes of its group, one direction."""
    module_devices: int = 0
    """Neighbours in a node that are linked faster than the whole node; 0: none."""
    module_bytes_per_second: float = 0.0
    """Of a device to its neighbours of that module, one direction."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.num_nodes * self.devices_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Equal nodes of equal devices; or groups of such nodes, and what the planner may take for all of them."""

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
    groups: tuple[DeviceGroup, ...] = ()
    """Groups of unequal devices, in the order of their ranks: the first group's nodes have the first ranks."""
    calibration: str | None = None
    """File of ``stretto diagnose --calibrate``: what these machines reach; relative to the working directory."""
