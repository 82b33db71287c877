"""The training of a run, from its launch to its last checkpoint.

launch ──► local (processes of this machine) ──► worker ──┐
   └─────► under torchrun, Slurm, Kubernetes ─────────────┴► member ──► loop ──► session, step
"""
