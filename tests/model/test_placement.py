"""A network whose parts lie on different devices."""

import pytest
import torch

from vessel.errors import VesselError
from vessel.model.placement import distribute


def test_guard_I3_tensors_follow_their_modules(plan, make_batch):
    """Put half of the network on another device: torch refuses a tensor left behind."""
    network = plan().build().eval()
    network.grounding.to("meta")
    output = network(make_batch([["lumen", "cap"], ["lumen"]]))
    assert output.mask_logits.device.type == "meta"
    assert output.mask_logits.shape == (3, 16, 16)
    assert output.lm_logits.device.type == "cpu"
    network.text_hidden_fcs.to("meta")
    assert network(make_batch([["lumen"]])).mask_logits.device.type == "meta"


@pytest.mark.parametrize("device_map", ["auto", {"mllm": "cpu", "text_hidden_fcs": "cpu", "grounding": "cpu"}])
def test_a_distributed_network_computes_the_same(plan, make_batch, device_map):
    network, batch = plan().build().eval(), make_batch([["lumen", "cap"]])
    with torch.no_grad():
        before = network(batch)
        after = distribute(network, device_map)(batch)
    assert torch.equal(before.mask_logits, after.mask_logits)
    assert torch.equal(before.lm_logits, after.lm_logits)


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.gpu
def test_language_on_a_gpu_and_sam2_on_the_cpu(plan, make_batch):
    network, batch = plan().build().eval(), make_batch([["lumen"]])
    with torch.no_grad():
        before = network(batch).mask_logits
        after = distribute(network, {"mllm": 0, "text_hidden_fcs": 0, "grounding": "cpu"})(batch).mask_logits
    assert torch.allclose(before, after.cpu(), atol=1e-3)


@pytest.mark.parametrize("device_map", ["balanced?", 3, [{"mllm": "cpu"}], ["cpu", "cuda:0"]])
def test_a_device_map_that_is_no_mapping_is_refused(plan, device_map):
    with pytest.raises(VesselError, match=r"device_map=.*auto"):
        distribute(plan().build(), device_map)


@pytest.mark.parametrize("mllm", [["cpu"], "banana"])
def test_wrong_devices_are_refused(plan, mllm):
    with pytest.raises(VesselError, match="device_map"):
        distribute(plan().build(), {"mllm": mllm, "text_hidden_fcs": "cpu", "grounding": "cpu"})


def test_a_part_without_a_device_is_refused(plan):
    with pytest.raises(VesselError, match="device_map"):
        distribute(plan().build(), {"mllm": "cpu"})
