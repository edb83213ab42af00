"""Take a training step apart: each part alone, on the inputs that it has within the step.

A part is a call of the network itself. Its inputs are computed beforehand and require a gradient where trainable
weights made them, so that the backward pass of a part does what it does within the step, and no more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from vessel.batch import Batch, FeaturePyramid
from vessel.losses import Loss, lm_loss
from vessel.model.sa2va import Sa2VA

VISION, PROJECTOR, LANGUAGE, HEAD = "vision encoder", "projector and embedding", "language model", "LM head, its loss"
SAM2, DECODER, LOSSES = "SAM2 image encoder", "mask decoder", "mask losses"
Result = Tensor | FeaturePyramid
Pieces = dict[str, Callable[[], Result]]


def step_loss(network: Sa2VA, batch: Batch, loss_function: Loss) -> Tensor:
    """Compute the loss of a whole training step, a scalar, as `vessel.training.task` does."""
    assert batch.masks is not None
    output = network(batch)
    losses = dict(loss_function(output.mask_logits, batch.masks, network.frame_size))
    targets = output.lm_targets.to(output.lm_logits.device)
    losses["lm_loss"] = loss_function.lm_weight * lm_loss(output.lm_logits, targets)
    return torch.stack(list(losses.values())).sum()


def backward(result: Result) -> None:
    """Run the backward pass from a result; none where no trainable weight has a part in it."""
    wanted = [tensor for tensor in tree_iter(result) if tensor.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.ones_like(tensor) for tensor in wanted])


def pieces(network: Sa2VA, batch: Batch, loss_function: Loss) -> Pieces:
    """Return the parts of a step.

    Args:
        network: in the state that it trains in, on one device.
        batch: without features.
        loss_function: mask loss.

    Returns:
        the forward pass of each part by its name, in the order of the step.
    """
    own, masks = network.mllm.model, batch.masks
    assert masks is not None
    pyramid = FeaturePyramid(*map(_detached, network.encode_frame(batch.frames)))
    tile_features = _detached(network.encode_tiles(batch.tiles))
    embedded = _detached(network.embed(batch.input_ids, tile_features, batch.regions))
    reads = batch.attention_mask.to(embedded.device)

    def language() -> Tensor:
        states: Tensor = own.language_model(inputs_embeds=embedded, attention_mask=reads, use_cache=False)[0]
        return states

    hidden = _detached(language())
    at_seg = (batch.input_ids == network.tokens.seg).nonzero(as_tuple=True)
    supervised = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
    targets = batch.labels[:, 1:][supervised].to(hidden.device)
    answers, of_seg = (
        _detached(hidden[tuple(i.to(hidden.device) for i in positions)]) for positions in (supervised, at_seg)
    )
    logits = _detached(network.decode_masks(pyramid, of_seg, at_seg[0]))
    return {
        VISION: lambda: network.encode_tiles(batch.tiles),
        PROJECTOR: lambda: network.embed(batch.input_ids, tile_features, batch.regions),
        LANGUAGE: language,
        HEAD: lambda: lm_loss(network.mllm.lm_head(answers), targets),
        SAM2: lambda: network.encode_frame(batch.frames),
        DECODER: lambda: network.decode_masks(pyramid, of_seg, at_seg[0]),
        LOSSES: lambda: torch.stack(list(loss_function(logits, masks, network.frame_size).values())).sum(),
    }


def _detached(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, which requires a gradient where it had one."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
