"""Fingerprints of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def digests(state: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Compute SHA-256 over name, dtype, shape and bytes of each tensor, by name."""
    found = {}
    for name, tensor in state:
        digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()
    return found


def fingerprint(state: Iterable[tuple[str, Tensor]]) -> str:
    """Compute SHA-256 over names, dtypes, shapes and bytes, independent of order: 16 hexadecimal digits."""
    return combine_digests(digests(state))


def combine_digests(digests: Mapping[str, str]) -> str:
    """Compute the fingerprint of tensors from their digests."""
    return hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()[:16]
