import pytest
import torch

from vessel.errors import VesselError
from vessel.model.groups import choose_trainable, parameter_group
from vessel.model.lora import Lora, adapter_state, add_lora, is_adapter, merged_name, merged_state


def _shake(network, seed=1):
    """Give adapters and token copies values of their own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in network.trainable_groups()["lora"] + network.trainable_groups()["tokens"]:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("tokens", ["full", "new"])
def test_merged_network_computes_what_the_adapted_one_does(plan, make_batch, tokens):
    adapted = plan(trainable="lora", lora=Lora(r=4, dropout=0.0, tokens=tokens)).build().eval()
    _shake(adapted)
    plain = plan().build().eval()
    plain.load_state_dict(dict(merged_state(adapted)))
    batch = make_batch([["lumen", "cap"]])
    with torch.no_grad():
        one, two = adapted(batch), plain(batch)
    assert torch.allclose(one.mask_logits, two.mask_logits, atol=1e-4)
    assert torch.allclose(one.lm_logits, two.lm_logits, atol=1e-4)


def test_merging_does_not_touch_the_live_network(plan):
    adapted = plan(trainable="lora", lora=Lora(r=4)).build()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    list(merged_state(adapted))
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_new_rows_are_the_only_rows_that_train(plan, prompt):
    network = plan(trainable="lora", lora=Lora(r=4, tokens="new")).build()
    shapes = {name: tuple(p.shape) for name, p in network.trainable_groups()["tokens"]}
    assert set(shapes.values()) == {(len(prompt.new_tokens), 32)}


def test_guard_T3_seg_rows_must_be_trainable_or_trained(plan):
    with pytest.raises(VesselError, match=r"lora\.tokens=frozen"):
        plan(trainable="lora", lora=Lora(r=4, tokens="frozen")).build()
    network = plan().build()
    add_lora(network, Lora(r=4, tokens="frozen"), new_tokens=range(5), seg_is_trained=True)
    choose_trainable(network, "lora")
    assert "tokens" not in network.trainable_groups()


def test_guard_T3_seg_rows_get_a_gradient(plan, make_batch, prompt):
    network = plan(trainable="lora", lora=Lora(r=4)).build()
    output = network(make_batch([["lumen"]]))
    torch.nn.functional.cross_entropy(output.lm_logits, output.lm_targets).backward()
    rows = {name: p.grad[prompt.token_ids.seg] for name, p in network.trainable_groups()["tokens"]}
    assert len(rows) == 2
    assert all(row.abs().sum() > 0 for row in rows.values())


def test_guard_T11_heads_without_gradient_are_frozen_in_every_choice(plan):
    for choice in ("lora", "decoder_only", "all"):
        network = plan(trainable=choice).build()
        names = [n for n, p in network.named_parameters() if p.requires_grad]
        assert not [n for n in names if "iou_prediction_head" in n or "pred_obj_score_head" in n or "memory" in n]


def test_all_with_adapters_keeps_the_adapted_language_model_frozen(plan):
    groups = plan(trainable="all", lora=Lora(r=4)).build().trainable_groups()
    assert "language" not in groups
    assert {"lora", "tokens", "vision", "image_encoder", "mask_decoder"} <= groups.keys()


def test_unknown_choices_are_refused(plan):
    with pytest.raises(VesselError, match=r"trainable=decoder: .*lora, decoder_only, nothing, all"):
        plan(trainable="decoder").build()
    with pytest.raises(VesselError, match=r"lora\.tokens=some: .*full, new or frozen"):
        plan(lora=Lora(r=4, tokens="some")).build()


def test_every_parameter_has_a_group(plan):
    names = [n for n, _ in plan(lora=Lora(r=4)).build().named_parameters()]
    assert {parameter_group(n) for n in names} == {
        "lora", "tokens", "vision", "projector", "language", "text_hidden_fcs", "frozen heads", "mask_decoder",
        "image_encoder", "prompt", "video memory",
    }  # fmt: skip


@pytest.mark.parametrize("tokens", ["full", "new"])
def test_every_tensor_of_an_adapted_network_has_its_name_in_a_merged_one(plan, tokens):
    adapted, plain = plan(trainable="lora", lora=Lora(r=4, tokens=tokens)).build(), plan().build().state_dict()
    assert {merged_name(name) for name in adapted.state_dict()} == plain.keys()
    own = {name for name in adapted.state_dict() if is_adapter(name)}
    assert own == {name for group in ("lora", "tokens") for name, _ in adapted.trainable_groups()[group]}
    assert len(dict(adapter_state(adapted))) == len(own)


def test_merging_is_done_in_float32(plan):
    """Merge a small update into a base in bf16: the sum is that of float32, not rounded on the way."""
    adapted = plan(trainable="lora", lora=Lora(r=4), frozen_dtype=torch.bfloat16).build()
    _shake(adapted)
    name = "mllm.model.language_model.layers.0.mlp.up_proj"
    layer = adapted.get_submodule(name)
    a, b = (layer.get_parameter(f"lora_{part}.default.weight") for part in "AB")
    by_hand = layer.base_layer.weight.double() + 2.0 * b.double() @ a.double()
    merged = dict(merged_state(adapted))[f"{name}.weight"]
    assert merged.dtype == torch.float32
    assert (merged - by_hand).abs().max() < 1e-6
