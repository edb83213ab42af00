"""What the network says, and that its words mean the same whether they are its own or imposed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import scripted

from vessel.data.images import read_rgb
from vessel.data.inputs import Target
from vessel.data.prompt import Prompt
from vessel.data.questions import question_sample
from vessel.generation import say
from vessel.inference import Predictor
from vessel.model.grounding import GroundingSizes
from vessel.queries import asking
from vessel.restore import Reading, restore

GROUNDING = GroundingSizes(
    embed_dim=16, heads=1, stages=(1, 2, 2, 1), global_blocks=(4,), width=64, memory_width=16, memory_layers=2,
    memory_mlp=128,
)  # fmt: skip


def generated_states(network, prompt, sample):
    """Ids of the answer, and the states [N, d] of its `[SEG]` while it was generated, as the public code takes them."""
    embeddings = network.embed(sample.input_ids[None], sample.tiles)
    output = network.mllm.generate(
        inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
        max_new_tokens=16, do_sample=False, eos_token_id=prompt.token_ids.eos, pad_token_id=prompt.token_ids.pad,
        output_hidden_states=True, return_dict_in_generate=True,
    )  # fmt: skip
    states = torch.cat([step[-1][0] for step in output.hidden_states])
    words = output.sequences[0]
    return words.tolist(), states[-(len(words) - 1) :][words[:-1] == prompt.token_ids.seg]


def taught_states(network, prompt, sample, answer):
    ids = torch.cat([sample.input_ids, torch.tensor(answer)])[None]
    hidden = network.mllm.model.language_model(inputs_embeds=network.embed(ids, sample.tiles)).last_hidden_state
    return hidden[ids == prompt.token_ids.seg]


@pytest.fixture
def speaking(plan, prompt):
    """A tiny random network that answers `[SEG]<|im_end|>` to one question, and a sample that asks it."""
    network = plan().build().eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    sample = question_sample(image, "Where is the lumen?", prompt, plan().sizes.views)
    answer = [prompt.token_ids.seg, prompt.token_ids.eos]
    ids = torch.cat([sample.input_ids, torch.tensor(answer[:1])])[None]
    with torch.no_grad():
        hidden = network.mllm.model.language_model(inputs_embeds=network.embed(ids, sample.tiles)).last_hidden_state
        # A unit vector agrees best with its own direction.
        network.mllm.lm_head.weight.zero_()
        network.mllm.lm_head.weight[answer] = torch.nn.functional.normalize(hidden[0, -2:], dim=-1)
    return network, sample, answer


def test_a_teacher_forced_seg_has_the_state_of_a_generated_one(speaking, prompt):
    network, sample, answer = speaking
    with torch.no_grad():
        said, states = generated_states(network, prompt, sample)
        assert said == answer == say(network, prompt, sample.input_ids, sample.tiles)
        assert torch.allclose(states, taught_states(network, prompt, sample, answer), rtol=1e-4, atol=1e-5)


def words_of(network, prompt, text, **options):
    ids = prompt.tokenizer(text).input_ids
    asked, _ = prompt.conversation(["Where?"], [], 4)
    hook = scripted(network, ids)
    said = say(network, prompt, asked, torch.zeros(1, 3, 56, 56, dtype=torch.uint8), **options)
    hook.remove()
    return prompt.decode(said)


@pytest.mark.parametrize("template", ["qwen_chat", "internlm2_chat", "phi3_chat"])
def test_an_answer_ends_with_the_stop_word_of_its_template(plan, template):
    prompt = Prompt(template=template)
    assert len(prompt.tokenizer("<|end|>").input_ids) > 1
    network = plan().build().eval()
    stop = prompt.template.end
    assert words_of(network, prompt, f"Sure, [SEG].{stop} and on") == f"Sure, [SEG].{stop}"


def test_an_answer_that_does_not_end_is_cut(plan, prompt):
    network = plan().build().eval()
    assert len(prompt.tokenizer(words_of(network, prompt, "and on " * 50, max_new_tokens=7)).input_ids) == 7


def test_image_tokens_are_never_said(plan, prompt):
    network = plan().build().eval()
    with torch.no_grad():
        network.mllm.lm_head.weight.zero_()
    hook = scripted(network, [prompt.token_ids.image] * 3)
    asked, _ = prompt.conversation(["Where?"], [], 4)
    said = say(network, prompt, asked, torch.zeros(1, 3, 56, 56, dtype=torch.uint8), max_new_tokens=3)
    hook.remove()
    assert prompt.token_ids.image not in said


CASES = ("square", "wide", "small_gray")


@pytest.fixture(scope="module", params=["sa2va_qwen2", "sa2va_internlm2"])
def golden(request, shared):
    """A golden network, and what the public code computed with it."""
    folder = shared(f"golden/{request.param}")
    cases = {case["name"]: case for case in json.loads((folder / "expected.json").read_text())["cases"]}
    restored = restore(str(folder), Reading(grounding=GROUNDING))
    return restored, folder / "images", cases, load_file(folder / "expected.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_golden_answers_and_masks_of_generate(golden, name):
    restored, images, cases, expected = golden
    target = Target(name, images / f"{name}.png", f"{name}.png")
    predictor = Predictor(restored, device="cpu", decode="generate")
    [answer] = predictor.predict([target], asking([target], cases[name]["text"], restored))
    assert answer.answers == (cases[name]["prediction"],) == ("[SEG]<|im_end|>",)
    _, height, width = cases[name]["mask_shape"]
    truth = np.unpackbits(expected[f"{name}.mask"].numpy(), axis=-1)[0, :, :width].astype(bool)
    [probability] = answer.probabilities
    assert probability.shape == truth.shape == (height, width)
    assert ((probability > 0.5).numpy() == truth).mean() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_golden_states_and_masks_forced_and_generated_are_equal(golden, name):
    restored, images, cases, expected = golden
    network, prompt = restored.network, restored.prompt
    image = read_rgb(images / f"{name}.png")
    sample = question_sample(image, cases[name]["text"], prompt, restored.views)
    assert len(sample.input_ids) == cases[name]["prompt_tokens"]
    with torch.no_grad():
        said, generated = generated_states(network, prompt, sample)
        taught = taught_states(network, prompt, sample, said)
        logits = network.masks(sample.frame[None], torch.cat([generated, taught]), torch.tensor([0, 0]))
    assert prompt.decode(said) == cases[name]["prediction"]
    assert torch.allclose(generated, expected[f"{name}.seg_state"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(taught, expected[f"{name}.seg_state"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.slow
def test_golden_prompt_of_a_video(golden):
    """Five frames, one tile each, give the state that the public code recorded."""
    restored, images, cases, expected = golden
    prompt, side = restored.prompt, restored.views.tile
    frames = [Image.open(images / f"pullback_{i}.png").convert("RGB").resize((side, side)) for i in range(5)]
    tiles = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    ids, _ = prompt.conversation([cases["pullback"]["text"]], ["[SEG]"], 256, frames=5)
    with torch.no_grad():
        hidden = restored.network.mllm.model.language_model(
            inputs_embeds=restored.network.embed(ids[None], tiles)
        ).last_hidden_state
    state = hidden[ids[None] == prompt.token_ids.seg]
    assert torch.allclose(state, expected["pullback.seg_state"], rtol=1e-4, atol=1e-5)
