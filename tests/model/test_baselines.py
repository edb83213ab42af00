"""SAM2 with learned prompts and the U-Net: their outputs, the weights they load, and refusals."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from tests.conftest import SIZES
from tests.weights.layouts import internvl_state, write_folder, write_sa2va, write_sam2
from torch.utils.data import DataLoader

from vessel.data.transforms import cut_tiles
from vessel.errors import VesselError
from vessel.losses import NativeLoss, lm_loss
from vessel.memory_plan.advice import alternatives
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Setup, memory_plan
from vessel.model.baselines import PromptedSam2, PromptedSam2Config, UNetConfig
from vessel.model.lora import Lora
from vessel.model.placement import distribute
from vessel.training.callbacks.first_step_check import check_gradients, gradient_flags
from vessel.training.optimizer import OptimizerSettings
from vessel.training.task import VesselTask
from vessel.weights.entry import Weights

PHRASES = ("lumen", "cap")
PROMPTED = PromptedSam2Config(SIZES.grounding)
UNET = UNetConfig("tu-test_resnet", (16, 16, 8, 8, 8), 64)
RESNET = UNetConfig("resnet18", (16, 16, 8, 8, 8), 64)
BOTH = pytest.mark.parametrize("sizes", [PROMPTED, UNET], ids=["sam2_prompt", "unet"])


@pytest.fixture
def baseline(plan):
    """Return a function that makes the plan of a baseline of two phrases."""
    return lambda sizes, **changes: plan(sizes=sizes, phrases=PHRASES, **changes)


def test_learned_prompts_replace_the_projected_seg_state_of_a_sa2va(plan, make_batch):
    """Compare with a Sa2VA whose projection is constant: it is SAM2 with that prompt."""
    network = plan().build().eval()
    constant, last = torch.randn(SIZES.grounding.width), network.text_hidden_fcs[2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(constant)
    own = PromptedSam2(network.grounding, PHRASES).eval()
    with torch.no_grad():
        own.phrase_prompts.weight[1] = constant
        batch = make_batch([["cap"], ["cap"]])
        assert torch.equal(own(batch).mask_logits, network(batch).mask_logits)
        assert not torch.equal(own(make_batch([["lumen"], ["lumen"]])).mask_logits, network(batch).mask_logits)


def test_a_unet_has_a_channel_for_each_phrase(baseline, make_batch):
    network, batch = baseline(UNET).build().eval(), make_batch([["cap", "lumen"], ["lumen"]])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (batch.frames / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        output, channels = network(batch), network.unet(pixels)
    assert torch.allclose(output.mask_logits, torch.stack([channels[0, 1], channels[0, 0], channels[1, 0]]), atol=1e-5)
    assert output.seg_to_image.tolist() == [0, 0, 1]
    assert [p.shape for p in network.probabilities(output, batch)] == [(2, 48, 40), (1, 48, 40)]


@BOTH
def test_there_are_no_words(baseline, make_batch, sizes):
    network = baseline(sizes).build()
    output = network(make_batch([["lumen", "cap"]]))
    assert len(output.lm_logits) == len(output.lm_targets) == len(network.emitted(output)) == 0
    assert lm_loss(output.lm_logits, output.lm_targets) == 0


@BOTH
def test_of_tiles_the_smallest_is_cut(sizes):
    assert cut_tiles(torch.zeros(480, 640, 3, dtype=torch.uint8).numpy(), sizes.geometry).shape == (1, 3, 1, 1)
    assert sizes.geometry.frame_size == 64


@BOTH
def test_another_phrase_and_another_resolution_are_refused(baseline, make_batch, sizes):
    network = baseline(sizes).build()
    with pytest.raises(VesselError, match=r"phrases: plaque: .*lumen, cap"):
        network(make_batch([["lumen", "plaque"]]))
    batch = make_batch([["lumen"]])
    with pytest.raises(VesselError, match=r"\(32, 32\) .*64 x 64"):
        network(replace(batch, frames=batch.frames[:, :, ::2, ::2]))


@BOTH
def test_guard_T11_every_group_learns_and_no_tensor_is_left_out(baseline, make_batch, sizes):
    """Check also a batch without some of the phrases."""
    network, batch = baseline(sizes).build().train(), make_batch([["cap"], ["cap"]])
    sum(NativeLoss()(network(batch).mask_logits, batch.masks, network.frame_size).values()).backward()
    groups = network.trainable_groups()
    arrived = {name for members in groups.values() for name, parameter in members if parameter.grad is not None}
    check_gradients(groups, gradient_flags(groups, arrived))
    expected = {
        PROMPTED: {"phrase_prompts", "image_encoder", "mask_decoder", "prompt"}, UNET: {"unet_encoder", "unet_decoder"}
    }  # fmt: skip
    assert groups.keys() == expected[sizes]


def test_only_prompts_and_decoder_learn_on_the_weights_of_a_sam2(baseline, plan, tmp_path):
    teacher = plan().build()
    chosen = baseline(PROMPTED, weights=[str(write_sam2(tmp_path / "sam2.pt", teacher))], trainable="decoder_only")
    network = chosen.build()
    own, theirs = network.grounding.state_dict(), teacher.grounding.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    assert network.trainable_groups().keys() == {"phrase_prompts", "mask_decoder"}
    assert [report.kind for report in chosen.reports] == ["SAM 2.0 file"]
    assert chosen.nbytes() == sum(parameter.nbytes for parameter in network.parameters()) + sum(
        buffer.nbytes for buffer in network.grounding.buffers() if buffer.ndim == 2
    )


def test_of_a_sa2va_the_grounding_is_taken_and_the_rest_reported(baseline, plan, tmp_path):
    teacher = plan().build()
    chosen = baseline(PROMPTED, weights=[str(write_sa2va(tmp_path, teacher))])
    network = chosen.build()
    assert torch.equal(network.grounding.no_mem_embed, teacher.grounding.no_mem_embed)
    (report,) = chosen.reports
    assert all(module.module.startswith("grounding.") and module.fraction == 1 for module in report.modules)
    assert report.left_out == len(teacher.state_dict()) - len(teacher.grounding.state_dict())


def resnet(path, *, without=(), **changes):
    """Write a file of random weights as torchvision does; return its tensors."""
    encoder = RESNET.build(None, ["lumen"]).unet.encoder.state_dict()
    state = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in encoder.items()}
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)} | changes
    written = {name: tensor for name, tensor in state.items() if not name.endswith(without)} if without else state
    torch.save(written, path)
    return state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_encoder_of_a_unet_comes_from_a_local_file(baseline, tmp_path, suffix):
    file = tmp_path / f"resnet18{suffix}"
    state = resnet(file)
    if suffix == ".safetensors":
        save_file(state, file)
        (file.parent / "config.json").write_text("{}")
    chosen = baseline(RESNET, weights=[str(file)])
    own = chosen.build().unet.encoder.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    (report,) = chosen.reports
    assert [(module.module, module.fraction) for module in report.modules] == [("unet.encoder", 1)]


def test_a_file_without_the_counts_of_batches_is_read(baseline, tmp_path):
    state = resnet(tmp_path / "old.pth", without="num_batches_tracked")
    own = baseline(RESNET, weights=[str(tmp_path / "old.pth")]).build().unet.encoder.state_dict()
    assert torch.equal(own["bn1.running_var"], state["bn1.running_var"])
    assert own["bn1.num_batches_tracked"] == 0


def test_guard_W1_weights_that_do_not_fit_a_baseline_are_refused(baseline, plan, prompt, tmp_path):
    teacher = plan().build()
    sam2, vlm = str(write_sam2(tmp_path / "sam2.pt", teacher)), tmp_path / "vlm"
    write_folder(vlm, internvl_state(teacher, prompt.new_tokens.start))
    resnet(tmp_path / "resnet18.pth")
    resnet(tmp_path / "half.pth", without=("layer4.1.bn2.weight",))
    whole = str(write_sa2va(tmp_path / "sa2va", teacher))
    encoder, half = str(tmp_path / "resnet18.pth"), str(tmp_path / "half.pth")
    part = {"source": sam2, "partial": ["grounding.mask_decoder"]}
    for sizes, weights, message in (
        (PROMPTED, str(vlm), r"InternVL folder .*grounding,"),
        (PROMPTED, encoder, r"ResNet file .*grounding,"),
        (PROMPTED, [sam2, whole], r"Sa2VA folder .*overwrite grounding "),
        (PROMPTED, part, r"weights=.* \d+ of \d+ tensors of grounding"),
        (UNET, sam2, r"SAM 2\.0 file .*unet\.encoder,"),
        (UNET, encoder, r"resnet18\.pth \(ResNet file\): .*model="),
        (RESNET, half, r"1 missing \(first: unet\.encoder\.layer4\.1\.bn2\.weight\)"),
        (SIZES, encoder, r"ResNet file .*mllm, "),
    ):
        with pytest.raises(VesselError, match=message):
            baseline(sizes, weights=Weights.listed(weights)).build()


@BOTH
def test_adapters_are_refused(baseline, sizes):
    with pytest.raises(VesselError, match=r"lora\.r=8: .*lora\.r=0"):
        baseline(sizes, lora=Lora(r=8)).build()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (replace(UNET, frame_size=100), r"model\.frame_size=100.* 32"),
        (replace(UNET, encoder="resnet19"), r"model\.encoder=resnet19"),
        (replace(UNET, decoder=(16, 8)), r"model\.decoder=\[16, 8\]"),
    ],
)
def test_a_unet_of_no_such_size_is_refused(baseline, sizes, message):
    with pytest.raises(VesselError, match=message):
        baseline(sizes).build()


def test_a_missing_package_is_named(baseline, monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(VesselError, match=re.escape("pip install 'vessel[baselines]'")):
        baseline(UNET).build()


def test_layers_are_computed_again_where_they_can_be(baseline, make_batch):
    batch = make_batch([["lumen"]])
    gradients = []
    for activation_checkpointing in (False, True):
        network = baseline(PROMPTED, activation_checkpointing=activation_checkpointing).build().train()
        network(batch).mask_logits.square().mean().backward()
        gradients.append([p.grad for _, p in network.trainable_groups()["image_encoder"]])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))
    with pytest.raises(VesselError, match=r"activation_checkpointing=true: .*U-Net"):
        baseline(UNET, activation_checkpointing=True).build()


def test_other_settings_for_a_baseline_are_those_that_it_has():
    for sizes, frame in ((UNET, "model.frame_size=512"), (PROMPTED, "model.grounding.frame_size=512")):
        setup = Setup(sizes.with_frame_size(1024)[1], Lora(r=0), "all", NativeLoss(), Engine(), batch_size=2)
        options = [option for option, _ in alternatives(setup)]
        assert f"{frame} (coarser masks)" in options
        assert not [option for option in options if "tiles" in option or "lora" in option]
    assert memory_plan(replace(setup, sizes=PROMPTED)).total > 0


def test_the_statistics_of_a_unet_are_saved_with_what_trains(baseline, make_batch, tmp_path):
    """Save a run that began with weights, without frozen tensors: running means are no parameters."""
    loss_function, optimizer = NativeLoss(), OptimizerSettings(lr=1e-2)
    build = baseline(UNET).build
    task = VesselTask(build, loss_function=loss_function, optimizer=optimizer, keep_frozen=False, manifest={})
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_steps=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    batch = make_batch([["lumen", "cap"]] * 2)
    trainer.fit(task, DataLoader([batch] * 2, batch_size=None), DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"network.{name}" for name in task.network.state_dict()}
    again = build().eval()
    again.load_state_dict({name.removeprefix("network."): tensor for name, tensor in saved.items()})
    with torch.no_grad():
        assert torch.equal(again(batch).mask_logits, task.network.eval()(batch).mask_logits)


@BOTH
def test_a_distributed_baseline_computes_the_same(baseline, make_batch, sizes):
    network, batch = baseline(sizes).build().eval(), make_batch([["lumen", "cap"]])
    with torch.no_grad():
        before = network(batch).mask_logits
        assert torch.equal(before, distribute(network, "auto")(batch).mask_logits)
