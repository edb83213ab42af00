"""Masks through a pullback: the first frames are prompted by the language, SAM2's memory carries them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vessel.model.grounding import FrameFeatures, Grounding, best_candidate

PROMPTED_FRAMES = 5  # the public model shows this many to the language model, and prompts them


class Tracker:
    """Follows N phrases from frame to frame, each with a memory of its own.

    What is remembered does not grow with the frames: the prompted ones stay, of the others only what SAM2's memory
    attention reads of the latest.

    Args:
        grounding: SAM2, in evaluation mode.
        prompts: [N, C], the projected `[SEG]` states of the phrases.
    """

    def __init__(self, grounding: Grounding, prompts: Tensor) -> None:
        self.grounding, self.prompts = grounding, prompts
        self.frame_index = 0
        # keys and values as SAM2's own methods read them
        self.memory: dict[str, dict[int, dict[str, Any]]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}

    def step(self, features: FrameFeatures) -> Tensor:
        """Predict the masks in the next frame.

        Args:
            features: of that frame alone (B = 1).

        Returns:
            mask logits float32 [N, S/4, S/4].
        """
        n, prompted = len(self.prompts), self.frame_index < PROMPTED_FRAMES
        features = features.of(torch.zeros(n, dtype=torch.int64, device=features.top.device))
        image = self.grounding.without_memory(features.top) if prompted else self._with_memory(features.top)
        masks, ious, tokens, appears = self.grounding.candidates(
            image, features.high, self.prompts if prompted else None
        )
        mask = best_candidate(masks, ious)
        remembered = self._encode(features.top, mask, appears) | {"obj_ptr": self._pointer(tokens, ious, appears)}
        self.memory["cond_frame_outputs" if prompted else "non_cond_frame_outputs"][self.frame_index] = remembered
        self.frame_index += 1
        self._forget()
        return mask

    def _with_memory(self, top: Tensor) -> Tensor:
        """Condition the features of this frame on the memory: [N, C, s, s]."""
        position = self.grounding.image_encoder.neck.position_encoding(top).to(top.dtype)
        return self.grounding._prepare_memory_conditioned_features(
            frame_idx=self.frame_index,
            is_init_cond_frame=False,
            current_vision_feats=[_flat(top)],
            current_vision_pos_embeds=[_flat(position)],
            feat_sizes=[top.shape[-2:]],
            output_dict=self.memory,
            num_frames=self.frame_index + 1,
        )

    def _encode(self, top: Tensor, mask: Tensor, appears: Tensor) -> dict[str, Any]:
        side = (self.grounding.image_size, self.grounding.image_size)
        full = F.interpolate(mask[:, None], side, mode="bilinear", align_corners=False)
        features, position = self.grounding._encode_new_memory(
            current_vision_feats=[_flat(top)],
            feat_sizes=[top.shape[-2:]],
            pred_masks_high_res=full.to(top.dtype),
            object_score_logits=appears,
            is_mask_from_pts=False,
        )
        # SAM2 keeps its memory in this precision, on any device
        return {"maskmem_features": features.bfloat16(), "maskmem_pos_enc": position}

    def _pointer(self, tokens: Tensor, ious: Tensor, appears: Tensor) -> Tensor:
        """Compute the memory's pointer to the object, [N, C]; a fixed vector where there is none."""
        pointer = self.grounding.obj_ptr_proj(best_candidate(tokens, ious))
        return torch.where(appears > 0, pointer, self.grounding.no_obj_ptr.to(pointer.dtype))

    def _forget(self) -> None:
        """Drop what no later frame can read."""
        recent = self.memory["non_cond_frame_outputs"]
        recent.pop(self.frame_index - self.grounding.max_obj_ptrs_in_encoder, None)
        if old := recent.get(self.frame_index - self.grounding.num_maskmem):
            recent[self.frame_index - self.grounding.num_maskmem] = {"obj_ptr": old["obj_ptr"]}


def _flat(features: Tensor) -> Tensor:
    """Flatten [N, C, h, w] to [h * w, N, C], as SAM2's video methods take it."""
    return features.flatten(2).permute(2, 0, 1)
