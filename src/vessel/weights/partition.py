"""Assign content to a network's tensors: whole, or under ZeRO-3 each rank's part of it.

DeepSpeed's `zero.Init` partitions parameters inside constructors, which breaks initialisations that follow (those of
transformers, the zeros of peft), and it rounds buffers. A network is therefore built while that context is suspended,
and each parameter is partitioned as soon as it has its content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def suspend_zero_init() -> Iterator[ZeroRanks | None]:
    """Suspend an active `zero.Init` inside the block.

    Yields:
        the ranks that parameters are to be partitioned over; None where there is no such context.
    """
    # Code inside that context has imported its module.
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if zero is None or zero.top_level_context is None:
        yield None
        return
    zero.shutdown_init_context()
    try:
        yield ZeroRanks(zero.top_level_context)
    finally:
        zero.restore_init_context()


class ZeroRanks:
    """The ranks of a `zero.Init`.

    Args:
        context: the active one.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    @property
    def is_first(self) -> bool:
        """Return True on rank 0, which sends its content to the others."""
        from deepspeed import comm

        return bool(comm.get_rank(group=self._context.ds_process_group) == 0)

    def partition(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep this rank's part of each parameter, in the dtype of DeepSpeed; partitioned ones stay.

        Every rank calls this for the same parameters and gets the content of rank 0.
        """
        for parameter in parameters:
            if not is_partitioned(parameter):
                parameter.data = parameter.data.to(self._context.dtype)
                self._context._convert_to_zero_parameters([parameter])

    def partition_network(self, network: nn.Module) -> None:
        """Partition all parameters, and send the buffers of rank 0 to every rank; buffers stay whole.

        On ranks other than 0 both may be without content (meta device).
        """
        from deepspeed import comm

        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                own = parameter
                if parameter.is_meta:
                    own = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
                    setattr(module, name, own)
                self.partition([own])
            for name, buffer in module.named_buffers(recurse=False):
                full = torch.empty_like(buffer, device=self._context.local_device)
                if not buffer.is_meta:
                    full.copy_(buffer)
                comm.broadcast(full, 0, group=self._context.ds_process_group)
                setattr(module, name, full)


def assign(network: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> nn.Parameter | None:
    """Copy a tensor into the one of that name, or into its first rows where the network has more.

    Under ZeRO-3 every rank calls this.

    Args:
        network: whose parameters may be without content (meta device) or partitioned.
        name: of a parameter or buffer.
        tensor: of its shape, or with fewer rows.
        dtype: of a parameter that had no content.

    Returns:
        the parameter made for one that had no content; rows that `tensor` lacks are initialised like an embedding.
    """
    prefix, _, leaf = name.rpartition(".")
    module = network.get_submodule(prefix)
    own: Tensor = getattr(module, leaf)
    if not own.is_meta:
        with gathered([own], change=True):
            _copy(tensor, own)
        return None
    content = torch.empty(own.shape, dtype=dtype)
    if own.shape != tensor.shape:
        nn.init.normal_(content, std=own.shape[-1] ** -0.5)
    _copy(tensor, content)
    fresh = nn.Parameter(content, requires_grad=own.requires_grad)
    setattr(module, leaf, fresh)
    return fresh


def gathered(tensors: Sequence[Tensor], *, change: bool = False) -> AbstractContextManager[None]:
    """Gather partitioned tensors inside the block; every rank calls this.

    Args:
        tensors: all partitioned or none.
        change: keep the changes that rank 0 makes.
    """
    if not any(is_partitioned(tensor) for tensor in tensors):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(tensors), modifier_rank=0 if change else None)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor, of which a rank holds a part under ZeRO-3."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_partitioned(tensor: Tensor) -> bool:
    """Return True if this rank holds only a part of it, as under ZeRO-3."""
    return hasattr(tensor, "ds_id")


def _copy(tensor: Tensor, own: Tensor) -> None:
    rows = own.data[: len(tensor)] if own.ndim else own.data
    rows.copy_(tensor)
