"""Run one_rank, replicate, shard, tensor and pipeline, then write their figures into docs/benchmarks.md.

    OMP_NUM_THREADS=1 python -m benchmarks

All other benchmarks are started one by one: docs/benchmarks.md says how.
"""

from __future__ import annotations

from benchmarks import document, one_rank, pipeline, replicate, shard, tensor
from benchmarks.processes import main

if __name__ == "__main__":
    for module in (one_rank, replicate, shard, tensor, pipeline):
        main(module.__name__.rpartition(".")[2], module.__doc__ or "", module.CASES)
    document.main()
