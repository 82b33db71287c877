"""Any Hugging Face causal language model of the usual build, as a Stack.

    tokens ─► embedding (+ learned positions) ─► equal layers ─► norm ─► lm_head
                                                    ▲
                               rotary tables, mask, positions (the context)

The parts are found by inspection, never by the name of the architecture.  What inspection can't see
(scaled embeddings, capped logits, ...) is caught by a trial: the wrapped model must give the logits
of the original, for packed documents too, or it is refused.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from stretto.models.context import attention_mask
from stretto.models.foreign.split_check import rules_hold
from stretto.models.foreign.stack import ForeignStack, Loss
from stretto.models.foreign.tensor_rules import derive_tensor_rules
from stretto.spec.contract import Batch, Place
from stretto.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.sharding import TensorRule

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest accepted max|a-b| / max|b| of the trial by dtype (transformers computes parts in float32);
0.05 for narrower types."""


class Embeddings(nn.Module):
    """Token embedding plus, where the model has one, the learned position embedding."""

    def __init__(self, tokens: nn.Module, positions: nn.Module | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions

    def forward(self, batch: Batch) -> Tensor:
        """Return [B, T, D]."""
        x_BTD = self.tokens(batch.tokens)
        return x_BTD if self.positions is None else x_BTD + self.positions(batch.positions)


class Head(nn.Module):
    """Final norm and lm_head."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head = head

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return logits [B, T, V]."""
        return self.head(self.norm(x_BTD))


class HuggingFaceStack(ForeignStack):
    """The parts of a Hugging Face model; its context is the keyword arguments of a layer."""

    def __init__(self, parts: dict[str, Any], *, loss: Loss | None, bool_mask: bool) -> None:
        super().__init__(
            embed=Embeddings(parts["tokens"], parts.get("positions")),
            blocks=parts["layers"],
            head=Head(parts["norm"], parts["head"]),
            loss=loss,
            tensor_rules={},
        )
        self.rotary: nn.Module | None = parts.get("rotary")
        self.arguments = frozenset(inspect.signature(parts["layers"][0].forward).parameters)
        self.bool_mask = bool_mask

    @staticmethod
    def call_embed(embed: nn.Module, batch: Batch, context: Any) -> Tensor:
        """Embed tokens and positions."""
        return embed(batch)

    @staticmethod
    def call_block(block: nn.Module, x: Tensor, context: dict[str, Any]) -> Tensor:
        """Run a layer; older ones return a tuple."""
        out = block(x, **context)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def context(self, batch: Batch, place: Place) -> dict[str, Any]:
        """Return the keyword arguments that the layers take."""
        dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
        given: dict[str, Any] = {"attention_mask": self.mask(batch, dtype), "position_ids": batch.positions}
        if self.rotary is not None:
            example = torch.empty(0, dtype=dtype, device=batch.tokens.device)
            given["position_embeddings"] = self.rotary(example, batch.positions)
        return {key: value for key, value in given.items() if key in self.arguments}

    def mask(self, batch: Batch, dtype: torch.dtype) -> Tensor | None:
        """Return None for plain causal attention, a bool mask for packed documents, or, for models
        whose attention is written out, a mask to add."""
        mask = attention_mask(batch, None)
        if self.bool_mask:
            return mask
        if mask is None:
            length = batch.tokens.size(1)
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=batch.tokens.device).tril()
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def is_hugging_face(model: nn.Module) -> bool:
    """Return whether ``model`` has the face of a transformers model."""
    return hasattr(model, "config") and hasattr(model, "get_input_embeddings")


def from_hugging_face(model: nn.Module, *, loss: Loss | None = None) -> ForeignStack:
    """Wrap a Hugging Face decoder-only causal language model; it keeps its parameters and values.

    ``loss(predictions, batch)`` replaces cross-entropy.  Raises UnsupportedError that says, in one
    sentence, what of the model doesn't fit.
    """
    found = find_parts(model)
    stack = HuggingFaceStack(found, loss=loss, bool_mask=use_fused_attention(model))
    training = model.training
    model.eval()
    try:
        trial(model, stack)
        stack.tensor_rules = {f"blocks.*.module.{k}": rule for k, rule in split_rules(model, stack).items()}
    finally:
        model.train(training)
    return stack


def refuse(model: nn.Module, reason: str) -> NoReturn:
    """Raise UnsupportedError: ``reason`` completes 'X can't be wrapped: ...'."""
    raise UnsupportedError(
        f"{type(model).__name__} can't be wrapped as embeddings -> layers -> norm -> head: {reason}."
    )


def use_fused_attention(model: Any) -> bool:
    """Switch the model to torch's fused attention; False where it only has attention written out."""
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, ImportError, AttributeError):
        return False
    return True


def find_parts(model: Any) -> dict[str, Any]:
    """Return tokens, layers, norm, head and, where there are, positions and rotary."""
    if any(parameter.is_meta for parameter in model.parameters()):
        refuse(model, "it has no values (meta device), and wrapping is checked by running it")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    number = getattr(config, "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if len(lists) != 1:
        refuse(model, f"it has {len(lists)} lists of {number} layers where one is expected")
    path, layers = lists[0]
    if len({type(layer) for layer in layers}) != 1:
        refuse(model, "its layers are of different classes")
    check_windows(model, config)
    check_dropout(model)
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        refuse(model, "it has no head onto the vocabulary")
    body = model.get_submodule(path.rpartition(".")[0])
    parts: dict[str, Any] = {"tokens": tokens, "layers": layers, "head": head}
    for name, child in body.named_children():
        if child is not tokens and child is not layers:
            place_child(model, parts, name, child)
    if "norm" not in parts:
        refuse(model, "it has no norm after its layers")
    left = {id(p) for p in model.parameters()} - {id(p) for m in parts.values() for p in m.parameters()}
    if left:
        names = [name for name, p in model.named_parameters() if id(p) in left]
        refuse(model, f"{names[0]} belongs to none of these parts")
    return parts


def place_child(model: nn.Module, parts: dict[str, Any], name: str, child: nn.Module) -> None:
    """Say which part a child of the body is, or refuse the model."""
    kind = type(child).__name__
    if "rotary" in kind.lower():
        role = "rotary"
    elif "norm" in kind.lower():
        role = "norm"
    elif type(child) is nn.Embedding:
        role = "positions"
    elif isinstance(child, nn.Dropout | nn.Identity):
        return
    else:
        refuse(model, f"{name} ({kind}) stands beside its layers")
    if role in parts:
        refuse(model, f"it has two candidates for {role}, the second is {name}")
    parts[role] = child


def check_windows(model: nn.Module, config: Any) -> None:
    """Refuse layers that see only a part of the sequence."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or window is not None:
        refuse(model, f"its layers have a sliding window or other kinds of attention ({sorted(kinds) or window})")


def check_dropout(model: nn.Module) -> None:
    """Refuse dropout: its random stream would differ from plan to plan."""
    for name, module in model.named_modules():
        rates = [module.p] if isinstance(module, nn.Dropout) else []
        rates += [rate for key, rate in vars(module).items() if "dropout" in key and isinstance(rate, float)]
        if any(rates):
            refuse(model, f"{name} has dropout {max(rates)}, which can't be equal under every plan; set it to 0")


def trial_batch(model: nn.Module) -> Batch:
    """Return one row of two packed documents of 5 and 3 tokens."""
    weight = next(model.parameters())
    vocabulary = model.get_input_embeddings().weight.size(0)  # type: ignore[operator, union-attr]
    tokens = (torch.arange(8, device=weight.device) * 7 + 3) % vocabulary
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], device=weight.device)
    documents = torch.tensor([0] * 5 + [1] * 3, device=weight.device)
    samples = torch.zeros(1, dtype=torch.int64, device=weight.device)
    return Batch(
        tokens=tokens[None], labels=tokens[None], positions=positions[None], documents=documents[None], samples=samples
    )


@torch.no_grad()
def trial(model: Any, stack: HuggingFaceStack) -> None:
    """Refuse the model unless its wrapped form gives its logits, packed and alone."""
    packed = trial_batch(model)
    rows = [packed.tokens[:, :5], packed.tokens[:, 5:]]
    try:
        expected = [model(input_ids=row).logits for row in rows]
        alone = [stack(single(packed, row), Place(training=False)) for row in rows]
        together = stack(packed, Place(training=False))
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        refuse(model, f"running it part by part fails ({reason.rstrip('.')})")
    tolerance = TOLERANCE.get(expected[0].dtype, 0.05)
    for name, got in (("alone", torch.cat(alone, 1)), ("packed with others", together)):
        want = torch.cat(expected, 1)
        off = ((got - want).abs().max() / want.abs().max()).item()
        if not off <= tolerance:
            refuse(model, f"documents {name} give other logits than the original (relative error {off:.1e})")


def single(packed: Batch, row: Tensor) -> Batch:
    """Return ``row`` as a batch of its own."""
    positions = torch.arange(row.size(1), device=row.device)[None]
    return Batch(tokens=row, labels=row, positions=positions, documents=None, samples=packed.samples)


def split_rules(model: Any, stack: HuggingFaceStack) -> dict[str, TensorRule]:
    """Return tensor rules of a layer that hold in a trial split, else none."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    factor = next((n for n in range(2, heads + 1) if heads % n == 0), None)
    layer = stack.blocks[0].module
    assert isinstance(layer, nn.Module)
    if factor is None:
        return {}
    batch = trial_batch(model)

    def run() -> Any:
        context = stack.context(batch, Place(training=False))
        return stack.blocks[0](stack.inputs(batch, context), context)

    for fused in (False, True):
        rules = derive_tensor_rules(layer, hidden_size=config.hidden_size, fused=fused)
        if rules and rules_hold(layer, rules, run, parts=factor):
            return rules
    return {}
