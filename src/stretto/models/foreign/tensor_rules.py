"""Tensor parallelism for a block that we didn't write, by rule (Redco has such rules).

A linear layer that widens the residual stream or makes heads is split by columns, one that comes
back to it by rows, and the module that holds both is a region:

    attention  = REGION        q k v  D -> heads·K  COLUMN        o     heads·K -> D  ROW
    mlp        = REGION        up     D -> inner    COLUMN        down  inner   -> D  ROW

Shapes decide where they can; a square layer is told by its name.  Layers outside a region stay
whole, which is right for anything that treats tokens one by one.  Attention can't: where it isn't a
region, no rules are returned and the model can't be split over tp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from stretto.spec.sharding import TensorRule

COLUMN_NAMES = re.compile(r"(^|[._])(q|k|v|query|key|value|gate|up|fc1|fc_in|c_fc|w1|w3|wi|wq|wk|wv|h_to_4h)(_|$|\d)")
"""Names of layers that split heads or widen."""
ROW_NAMES = re.compile(r"(^|[._])(o|out|wo|w2|dense|down|fc2|fc_out|c_proj|proj|4h_to_h)(_|$)")
"""Names of layers that come back to the residual stream."""
FUSED_NAMES = re.compile(r"qkv|query_key_value|c_attn|in_proj|gate_up|gate_and_up|up_gate", re.IGNORECASE)
"""Names of several layers in one: which rows belong to which head can't be told from shapes."""
ATTENTION_NAMES = re.compile(r"(^|[._])(attn|attention)|attn$|attention$", re.IGNORECASE)
"""Names of attention modules."""


def derive_tensor_rules(
    block: nn.Module, *, hidden_size: int | None = None, fused: bool = False
) -> dict[str, TensorRule]:
    """Return module name inside ``block`` -> REGION, COLUMN or ROW; empty where no rule fits.

    ``hidden_size``: width of the residual stream; by default the size of the block's norms.
    ``fused``: also split fused projections (right only where each head's rows lie together).
    """
    width = hidden_size or stream_width(block)
    regions: dict[str, dict[str, nn.Linear]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            regions.setdefault(parent, {})[leaf] = module
    rules: dict[str, TensorRule] = {}
    for parent, linears in regions.items():
        found = region_rules(linears, width, fused=fused)
        # A region can't be the block itself: its residual connection needs the slice, not the sequence.
        if parent and found and not any(rules.get(above) for above in enclosing(parent)):
            rules[parent] = TensorRule.REGION
            rules.update({f"{parent}.{leaf}": rule for leaf, rule in found.items()})
    return rules if attention_is_split(block, rules) else {}


def region_rules(linears: Mapping[str, nn.Linear], width: int | None, *, fused: bool) -> dict[str, TensorRule]:
    """Return the rules of sibling linear layers, or nothing unless they are columns closed by one row."""
    rules: dict[str, TensorRule] = {}
    for leaf, linear in linears.items():
        rule = linear_rule(leaf, linear, width)
        if rule is None or (not fused and FUSED_NAMES.search(leaf)):
            return {}
        rules[leaf] = rule
    counted = Counter(rules.values())
    return rules if counted[TensorRule.COLUMN] and counted[TensorRule.ROW] == 1 else {}


def linear_rule(leaf: str, linear: nn.Linear, width: int | None) -> TensorRule | None:
    """Return the rule of one layer by its shape, or by its name where it is square."""
    inner, outer = linear.in_features, linear.out_features
    if inner == width != outer:
        return TensorRule.COLUMN
    if outer == width != inner:
        return TensorRule.ROW
    if inner != outer:
        return None
    if FUSED_NAMES.search(leaf) or COLUMN_NAMES.search(leaf):
        return TensorRule.COLUMN
    return TensorRule.ROW if ROW_NAMES.search(leaf) else None


def stream_width(block: nn.Module) -> int | None:
    """Return the size of the norms that lie directly in the block, or None where they disagree."""
    sizes = {
        parameter.numel()
        for child in block.children()
        if "norm" in type(child).__name__.lower()
        for parameter in child.parameters(recurse=False)
    }
    return sizes.pop() if len(sizes) == 1 else None


def enclosing(name: str) -> list[str]:
    """Return the names of the modules around ``name``, without the block."""
    words = name.split(".")
    return [".".join(words[:n]) for n in range(1, len(words))]


def attention_is_split(block: nn.Module, rules: Mapping[str, TensorRule]) -> bool:
    """Return whether the rules make a region of attention."""
    regions = [name for name, rule in rules.items() if rule is TensorRule.REGION]
    return any(ATTENTION_NAMES.search(name) for name in regions)
