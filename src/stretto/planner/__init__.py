"""Which plan and why, without torch.  In this version: what a model costs, in parameters and FLOPs."""

from stretto.planner.flops import Parameters, flops_per_token, forward_flops_per_token, mfu, parameters

__all__ = ["Parameters", "flops_per_token", "forward_flops_per_token", "mfu", "parameters"]
