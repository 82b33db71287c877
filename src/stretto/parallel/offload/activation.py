"""What one stage keeps of one micro-batch, as storages that can be somewhere else.

autograd is given, instead of each tensor that it saves, a note of where in which storage it lies.  Storages are what
moves: once each, however many views of it were saved.

    saved by autograd    q [2, 8, 16]   k (a view)   y          notes: offset, size, stride
                              └────┬──────┘         │
    Storage                        A                B          device: its bytes, or None while it is away

What others hold too (parameters, the batch, what the blocks of a micro-batch share) stays where it is.  autograd can't
check what it didn't save itself: a saved tensor that is changed in place afterwards goes unnoticed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Watch = Callable[[Tensor], object]
"""Told of a tensor that is kept on the device; what it returns is kept as long."""
PLAIN = (Tensor, nn.Parameter)
"""Types that nothing is hidden behind."""


class Storage:
    """A storage of which something was saved."""

    __slots__ = ("__weakref__", "_seen", "device", "num_bytes")

    def __init__(self, there: Tensor, watch: Watch) -> None:
        self.device: Tensor | None = there
        """Its bytes; None while they are on the host."""
        self.num_bytes = there.numel()
        self._seen = watch(there)

    def leave(self) -> None:
        """Let its device memory go."""
        self.device = self._seen = None

    def come(self, there: Tensor, watch: Watch) -> None:
        """It lies in other device memory now."""
        self.device, self._seen = there, watch(there)


@dataclass(slots=True)
class Note:
    """Where a tensor lies in a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor, on the device again."""
        there = self.storage.device
        assert there is not None, "an activation is needed while it is on the host"
        return there.new_empty(0, dtype=self.dtype).set_(there.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(slots=True)
class Stays:
    """A tensor that autograd saved and that does not move."""

    there: Tensor
    seen: object
    """What whoever counts gave for it."""

    def tensor(self) -> Tensor:
        """The tensor."""
        return self.there


class Activation:
    """All that a stage keeps of a micro-batch.

    Args:
        device: where what moves lies; tensors elsewhere stay.
        shared: what others hold too, anything with tensors in it.
        watch: told of all tensors that are kept on the device.
    """

    def __init__(self, device: torch.device, shared: Iterable[object], watch: Watch) -> None:
        self._device, self._watch = device, watch
        self._shared = {_key(tensor) for thing in shared for tensor in tensors_in(thing)}
        self._storages: WeakValueDictionary[int, Storage] = WeakValueDictionary()
        self._inputs: list[tuple[Tensor, Note]] = []

    def noting(self, parameters: Iterable[Tensor]) -> AbstractContextManager[object]:
        """Note what autograd saves inside ``with``; ``parameters`` (as they lie now) stay."""
        stay = self._shared | {_key(parameter) for parameter in parameters}
        return saved_tensors_hooks(lambda tensor: self._note(tensor, stay), _tensor_of)

    def _note(self, tensor: Tensor, stay: set[int]) -> Note | Stays:
        """A note of a tensor, or what says that it stays."""
        if not self._moves(tensor) or (key := _key(tensor)) in stay:
            there = tensor.detach()
            return Stays(there, self._watch(there))
        found = self._storages.get(key)
        if found is None:
            whole = torch.empty(0, dtype=torch.uint8, device=self._device).set_(tensor.untyped_storage())
            found = self._storages[key] = Storage(whole, self._watch)
        return Note(found, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def _moves(self, tensor: Tensor) -> bool:
        """Whether bytes of its storage, size and stride are all that makes the tensor."""
        return (
            type(tensor) in PLAIN
            and tensor.device == self._device
            and tensor.layout is torch.strided
            and not tensor.is_conj()
            and not tensor.is_neg()
            and tensor.untyped_storage().nbytes() > 0
        )

    def empty_inputs(self, inputs: Iterable[Tensor]) -> None:
        """Let these leaves of the graph hold no memory; ``fill_inputs`` brings it back."""
        for leaf in inputs:
            if self._moves(leaf) and _key(leaf) not in self._shared:
                note = self._note(leaf.detach(), set())
                assert isinstance(note, Note)
                self._inputs.append((leaf, note))
                leaf.data = leaf.detach().new_empty(()).expand(leaf.shape)

    def fill_inputs(self) -> None:
        """Leaves are what they were."""
        for leaf, note in self._inputs:
            leaf.data = note.tensor()
        self._inputs = []

    @property
    def device(self) -> torch.device:
        """Where what moves lies."""
        return self._device

    def storages(self) -> list[Storage]:
        """The storages that somebody still needs."""
        return list(self._storages.values())


def _tensor_of(note: Note | Stays) -> Tensor:
    return note.tensor()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(thing: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, and in the fields of dataclasses and plain objects."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for item in thing:
            yield from tensors_in(item)
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif is_dataclass(thing):
        yield from tensors_in([getattr(thing, field.name) for field in fields(thing)])
    elif isinstance(attributes := getattr(thing, "__dict__", None), dict) and not isinstance(thing, (type, nn.Module)):
        yield from tensors_in([value for value in attributes.values() if isinstance(value, (Tensor, tuple, list))])
