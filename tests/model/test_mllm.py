"""Each architecture against a naive forward pass, written from its description."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vessel.batch import TokenIds
from vessel.errors import VesselError
from vessel.model.mllm import LanguageConfig, VisionConfig, build_mllm
from vessel.weights.names import PublicNames

TOKENS = TokenIds(seg=40, image=41, pad=2, eos=3)
INTERNLM2 = LanguageConfig(
    width=48, layers=2, heads=6, kv_heads=2, mlp=80, vocabulary=64, context=32, family="internlm2", rms_eps=1e-5,
    rope_theta=1000.0,
)  # fmt: skip
VISION = VisionConfig(tile_size=56, width=24, layers=2, heads=3, mlp=40)
VISION_6B = replace(VISION, norm="rms_norm", qk_norm=True, qkv_bias=False)


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def filled(network):
    """Fill every parameter with random values, so that no norm is one and no bias zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return network.eval()


def public(network, names):
    """Return the tensors under public names; a Sa2VA has this part under `mllm.`."""
    return dict(names.to_public((f"mllm.{name}", tensor) for name, tensor in network.state_dict().items()))


def rotated(x, theta):
    """Apply the rotary embedding to [L, heads, head]: pair (i, i + head / 2) turns by position / theta^(2 i / head)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def attention(q, k, v, mask=None):
    """Compute attention: [L, heads, head] each -> [L, heads * head]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def naive_internlm2(state, ids, sizes):
    """Compute logits [L, vocabulary] of token ids [L] from public tensors.

    `wqkv` holds, for each key head, its query heads, then the key, then the value.
    """
    groups, causal = sizes.heads // sizes.kv_heads, torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    x = state["language_model.model.tok_embeddings.weight"][ids]
    for i in range(sizes.layers):
        w = {
            name.split(f"layers.{i}.")[1]: t for name, t in state.items() if f"language_model.model.layers.{i}." in name
        }
        fused = rms_norm(x, w["attention_norm.weight"], sizes.rms_eps) @ w["attention.wqkv.weight"].T
        heads = fused.view(len(ids), sizes.kv_heads, groups + 2, sizes.width // sizes.heads)
        q = rotated(heads[:, :, :groups].flatten(1, 2), sizes.rope_theta)
        k = rotated(heads[:, :, groups], sizes.rope_theta).repeat_interleave(groups, dim=1)
        v = heads[:, :, groups + 1].repeat_interleave(groups, dim=1)
        x = x + attention(q, k, v, causal) @ w["attention.wo.weight"].T
        y = rms_norm(x, w["ffn_norm.weight"], sizes.rms_eps)
        gated = F.silu(y @ w["feed_forward.w1.weight"].T) * (y @ w["feed_forward.w3.weight"].T)
        x = x + gated @ w["feed_forward.w2.weight"].T
    x = rms_norm(x, state["language_model.model.norm.weight"], sizes.rms_eps)
    return x @ state["language_model.output.weight"].T


def test_internlm2_as_a_llama_equals_its_description():
    network = filled(build_mllm(INTERNLM2, VISION, TOKENS))
    ids = torch.randint(4, 40, (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = network(input_ids=ids[None]).logits[0]
        naive = naive_internlm2(public(network, PublicNames("internlm2", kv_heads=2, groups=3)), ids, INTERNLM2)
    assert naive.std() > 0.1
    assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()


def naive_internvit(state, tiles, sizes):
    """Compute the last hidden states [T, 1 + patches, width] from public tensors."""

    def norm(x, name):
        if sizes.norm == "rms_norm":
            return rms_norm(x, state[f"{name}.weight"], 1e-6)
        return F.layer_norm(x, (sizes.width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    embeddings = "vision_model.embeddings."
    patches = F.conv2d(
        tiles, state[f"{embeddings}patch_embedding.weight"], state[f"{embeddings}patch_embedding.bias"], sizes.patch
    )
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{embeddings}class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + state[f"{embeddings}position_embedding"]
    for i in range(sizes.layers):
        layer = f"vision_model.encoder.layers.{i}."
        q, k, v = linear(norm(x, f"{layer}norm1"), f"{layer}attn.qkv").chunk(3, dim=-1)
        if sizes.qk_norm:
            q = rms_norm(q, state[f"{layer}attn.q_norm.weight"], 1e-6)
            k = rms_norm(k, state[f"{layer}attn.k_norm.weight"], 1e-6)
        heads = [part.unflatten(-1, (sizes.heads, -1)) for part in (q, k, v)]
        mixed = torch.stack([attention(*(part[t] for part in heads)) for t in range(len(x))])
        x = x + state[f"{layer}ls1"] * linear(mixed, f"{layer}attn.proj")
        hidden = F.gelu(linear(norm(x, f"{layer}norm2"), f"{layer}mlp.fc1"))
        x = x + state[f"{layer}ls2"] * linear(hidden, f"{layer}mlp.fc2")
    return x


@pytest.mark.parametrize("sizes", [VISION, VISION_6B], ids=["300M", "6B"])
def test_internvit_equals_its_description(sizes):
    network = filled(build_mllm(INTERNLM2, sizes, TOKENS))
    tiles = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = network.model.vision_tower(tiles).last_hidden_state
        naive = naive_internvit(public(network, PublicNames("internlm2", kv_heads=2, groups=3)), tiles, sizes)
    assert (ours - naive).abs().max() < 1e-5 * naive.abs().max()


def test_dynamic_scaling_changes_nothing_up_to_the_context_and_something_beyond():
    plain = filled(build_mllm(INTERNLM2, VISION, TOKENS))
    scaled = filled(build_mllm(replace(INTERNLM2, rope_factor=2.0), VISION, TOKENS))
    ids = torch.randint(4, 40, (1, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for length, same in ((32, True), (40, False), (31, True)):
            logits = [network(input_ids=ids[:, :length]).logits for network in (plain, scaled)]
            assert torch.equal(*logits) is same, length


@pytest.mark.parametrize(("family", "biases"), [("qwen2", True), ("internlm2", False)])
def test_only_qwen2_has_biases_and_each_its_own_eps(family, biases):
    network = build_mllm(replace(INTERNLM2, family=family), VISION, TOKENS).model.language_model
    assert any(name.endswith("bias") for name, _ in network.named_parameters()) is biases
    assert network.norm.variance_epsilon == 1e-5


def test_unknown_families_and_norms_are_refused():
    with pytest.raises(VesselError, match=r"model\.language\.family=phi3: .*qwen2, internlm2"):
        replace(INTERNLM2, family="phi3")
    with pytest.raises(VesselError, match=r"model\.vision\.norm=batch_norm: .*layer_norm, rms_norm"):
        replace(VISION, norm="batch_norm")
