"""Imitate a GPU where the meta device differs: attention that keeps no scores, autocast, DeepSpeed's linear layer.

The meta device knows shapes only. Its attention would be the naive one with all scores, autocast passes it by, and
questions about values have no answer. This mode stands in for the three, in terms of what is kept for the backward
pass; what the results are worth does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_LOW = {
    *(F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.addmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.addmm, torch.baddbmm, torch.einsum),
}
_HIGH = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.softplus, torch.softmax, Tensor.softmax),
    *(F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss, F.l1_loss, F.interpolate),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log, Tensor.log),
    *(torch.cumsum, Tensor.cumsum, torch.reciprocal, Tensor.reciprocal, torch.norm, Tensor.norm),
}


class GpuEmulation(TorchFunctionMode):
    """A mode in which functions on tensors without content keep what they would keep on a GPU.

    Args:
        autocast: dtype that mixed precision casts to; None where there is none. Its rules are those of
            https://docs.pytorch.org/docs/stable/amp.html for CUDA.
        zero3: DeepSpeed's linear layer is in place, which keeps its input even for a frozen weight.
        padded: whether rows of the batch differ in length, which the language model reads from its mask.
        casting: wraps the casts of weights, which stay until the step is over.
    """

    def __init__(
        self,
        *,
        autocast: torch.dtype | None = None,
        zero3: bool = False,
        padded: bool = False,
        casting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.autocast, self.zero3, self.padded, self.casting = autocast, zero3, padded, casting
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, or the one that imitates it."""
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return not self.padded
        if self.autocast is not None:
            args, kwargs = self._cast(func, args, kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout and 0 < kwargs.get("p", 0.5) < 1 and kwargs.get("training", True):
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        if func is F.linear and self.zero3:
            return _KeepsInput.apply(*args, **kwargs)
        return func(*args, **kwargs)

    def forget_casts(self) -> None:
        """Drop the casts, as autocast does after the forward pass; the graph still holds those that it needs."""
        self._casts.clear()

    def _cast(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        dtype = self.autocast if func in _LOW else torch.float32 if func in _HIGH else None
        if dtype is None:
            return args, kwargs
        moved: tuple[Any, Any] = tree_map_only(Tensor, lambda tensor: self._as(tensor, dtype), (args, kwargs))
        return moved

    def _as(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (dtype == self.autocast and tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            with self.casting():
                self._casts[id(tensor)] = tensor.to(dtype)
        return self._casts[id(tensor)]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        # The kernels take a mask as numbers to add, in rows of a multiple of eight; they make them at every call.
        columns = -(-attn_mask.shape[-1] // 8) * 8
        attn_mask = query.new_empty(*attn_mask.shape[:-1], columns)
    output: Tensor = _Fused.apply(query, key, value, attn_mask)
    return output


class _Fused(torch.autograd.Function):
    """Attention without scores: query, key, value, result and one number a row of scores are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
        rows = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return (*(torch.empty_like(tensor) for tensor in (query, key, value)), None)


class _KeepsInput(torch.autograd.Function):
    """A linear layer as DeepSpeed's ZeRO-3 has it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)
        return (
            gradient.matmul(weight) if needs[0] else None,
            rows.t().matmul(input.flatten(0, -2)) if needs[1] else None,
            rows.sum(0) if bias is not None and needs[2] else None,
        )
