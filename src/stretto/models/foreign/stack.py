"""A Stack around someone else's modules.

Give the three parts; say how to call them where the defaults don't fit:

    class Mine(ForeignStack):
        @staticmethod
        def call_block(block, x, context):
            return block(x, mask=context)

        def context(self, batch, place):
            return my_mask(batch)

    stack = Mine(embed=model.embed, blocks=model.layers, head=model.head)

Parameters keep the values that they come with, and their names: ``blocks.3.module.<name>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from stretto.models.foreign.tensor_rules import derive_tensor_rules
from stretto.models.loss import cross_entropy_sum
from stretto.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.contract import Batch, Place
    from stretto.spec.sharding import TensorRule

Loss = Callable[[Any, "Batch"], "Tensor"]
"""``loss(predictions, batch)``: the sum over the tokens whose label isn't IGNORE."""


class Part(nn.Module):
    """A foreign module with the way to call it."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, *arguments: Any) -> Any:
        """Call the module."""
        return self.call(self.module, *arguments)


class ForeignStack(nn.Module):
    """``embed -> blocks -> head`` as a Stack (spec.contract.Stack says what the attributes mean).

    Args:
        embed: gives the first activations [B, T, D].
        blocks: layers that map activations to activations of the same shape.
        head: gives the predictions.
        loss: your own; default: cross-entropy of logits [B, T, V], summed.
        tensor_rules: what tensor parallelism does to the modules of a block, by name inside the
            block; default: derived from names and shapes (``derive_tensor_rules``).
    """

    def __init__(
        self,
        *,
        embed: nn.Module,
        blocks: Iterable[nn.Module],
        head: nn.Module,
        loss: Loss | None = None,
        tensor_rules: Mapping[str, TensorRule] | None = None,
    ) -> None:
        super().__init__()
        self.inputs = Part(embed, self.call_embed)
        self.blocks = nn.ModuleList(Part(block, self.call_block) for block in blocks)
        self.outputs = Part(head, self.call_head)
        if not len(self.blocks):
            raise UnsupportedError("A foreign model needs at least one block; its list of blocks is empty.")
        self.own_loss = loss
        self.tied = tied_names(self)
        inner = [block.module for block in self.blocks if isinstance(block, Part)]
        rules = derive_tensor_rules(inner[0]) if tensor_rules is None and alike(inner) else tensor_rules or {}
        self.tensor_rules = {f"blocks.*.module.{name}": rule for name, rule in rules.items()}

    @staticmethod
    def call_embed(embed: nn.Module, batch: Batch, context: Any) -> Any:
        """Return the first activations; override to pass more than the tokens."""
        return embed(batch.tokens)

    @staticmethod
    def call_block(block: nn.Module, x: Any, context: Any) -> Any:
        """Return the activations after ``block``; override to pass masks, positions or to unpack."""
        return block(x)

    @staticmethod
    def call_head(head: nn.Module, x: Any, context: Any) -> Any:
        """Return the predictions; override to pass more than the activations."""
        return head(x)

    def context(self, batch: Batch, place: Place) -> Any:
        """Return what all blocks of a micro-batch share, any object; by default the batch."""
        return batch

    def forward(self, batch: Batch, place: Place) -> Any:
        """Run the whole stack on one process and return its predictions."""
        context = self.context(batch, place)
        x = self.inputs(batch, context)
        for block in self.blocks:
            x = block(x, context)
        return self.outputs(x, context)

    def loss(self, predictions: Any, batch: Batch) -> Tensor:
        """Return the sum of the loss over the valid tokens."""
        return self.own_loss(predictions, batch) if self.own_loss else cross_entropy_sum(predictions, batch.labels)

    def initial_value(self, name: str) -> tuple[str, float] | None:
        """Return None: a foreign parameter starts with the value it has."""
        return None


def tied_names(stack: nn.Module) -> dict[str, str]:
    """Return name of a copy -> name of its original, for parameters registered twice."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in stack.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            tied[name] = original
    return tied


def alike(blocks: list[nn.Module]) -> bool:
    """Return whether all blocks have parameters of the same names and shapes."""
    shapes = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    return all(shape == shapes[0] for shape in shapes)
