"""Count the tensors that are alive: the bytes of every storage that operators make, on tensors without content."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_BLOCK = 512  # CUDA's allocator hands out multiples of this


class LiveMemory(TorchDispatchMode):
    """A counter of the bytes that are alive while it is active, by the part of the step that made them.

    Args:
        known: tensors that existed before, which are not counted; of the others those on the meta device are.

    Attributes:
        now: bytes alive by part.
        fullest: the same at the moment when their sum was largest.
        moment: the part that was running then.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.fullest: Counter[str] = Counter()
        self.moment = ""
        self._total = self._most = 0
        self._parts = ["activations: elsewhere"]
        self._owners = {tensor.untyped_storage()._cdata: "" for tensor in known}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count tensors that are made inside as those of the part of that name."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that is counted already as another part's."""
        storage = tensor.untyped_storage()
        owner = self._owners.get(storage._cdata)
        if owner:
            self.now[owner] -= _rounded(storage.nbytes())
            self.now[part] += _rounded(storage.nbytes())
            self._owners[storage._cdata] = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_iter(made):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._owners:
            return
        part, nbytes = self._parts[-1], _rounded(storage.nbytes())
        self._owners[key] = part
        weakref.finalize(storage, self._drop, key, nbytes)
        self.now[part] += nbytes
        self._total += nbytes
        if self._total > self._most:
            self._most, self.fullest, self.moment = self._total, self.now.copy(), part

    def _drop(self, key: int, nbytes: int) -> None:
        self.now[self._owners.pop(key)] -= nbytes
        self._total -= nbytes


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _BLOCK) * _BLOCK
