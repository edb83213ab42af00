"""A network over several devices, for those too large for one."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import dispatch_model, infer_auto_device_map

from vessel.errors import VesselError
from vessel.model.network import Network

# Modules that stay whole on one device: a layer of either encoder or of the language model, SAM2, and a U-Net.
_WHOLE = [
    *("Qwen2DecoderLayer", "LlamaDecoderLayer", "InternVLVisionLayer", "InternVLVisionEmbeddings"),
    *("Grounding", "Unet"),
]


def distribute(network: Network, device_map: str | Mapping[str, str | int]) -> Network:
    """Put parts of a network on different devices; tensors follow them.

    Args:
        network: on the CPU, for inference.
        device_map: `auto` fills the GPUs that are there and then the CPU; else a device for each part by its name, such
            as `{mllm: cuda:0, text_hidden_fcs: cuda:0, grounding: cuda:1}`.

    Raises:
        VesselError: a part without a device, or a device that is not there.
    """
    if device_map == "auto":
        chosen = infer_auto_device_map(network, no_split_module_classes=_WHOLE)
    elif isinstance(device_map, Mapping):
        chosen = dict(device_map)
    else:
        raise VesselError(f"device_map={device_map}: use auto, or a device for each part: {{mllm: 0, grounding: 1}}")
    try:
        return dispatch_model(network, chosen, force_hooks=True)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise VesselError(f"device_map={dict(chosen)}: {error}") from error
