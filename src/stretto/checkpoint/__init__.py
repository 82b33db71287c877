"""Checkpoints that belong to a run, not to the plan that wrote them.

    step-000123/                     every rank writes what it owns,
    ├── __0_0.distcp  __1_0.distcp   one file each, in torch's distributed format;
    ├── .metadata                    where each rectangle of each global tensor lies;
    └── manifest.json                written last: step, state, tensors, every file's checksum

A checkpoint exists whole or not at all (it is written beside its place and renamed into it), is
never overwritten in place, and is read only after its checksums have been verified.  Names and
shapes are global, so that any plan reads what any other wrote (PyTorch's distributed checkpoint;
Universal Checkpointing; ByteCheckpoint, NSDI 2025).
"""

from stretto.checkpoint.load import load
from stretto.checkpoint.manifest import StoredTensor
from stretto.checkpoint.read import list_tensors, read_state, verify
from stretto.checkpoint.retention import latest, previous_good
from stretto.checkpoint.save import save

__all__ = ["StoredTensor", "latest", "list_tensors", "load", "previous_good", "read_state", "save", "verify"]
