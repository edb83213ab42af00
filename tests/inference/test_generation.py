"""Generated answers; their masks are the same whether the answers are generated or imposed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import SIZES, scripted
from tests.golden import INTERNLM2, INTERNLM2_WHOLE, NETWORKS, WITH_MASKS, cases_of

from vessel.batch import Features, collate
from vessel.data.dataset import make_sample
from vessel.data.images import read_rgb
from vessel.data.inputs import InputImage
from vessel.data.prompt import QUESTIONS, Prompt
from vessel.data.questions import question_sample
from vessel.inference.generation import Conversations, generate_answers
from vessel.inference.predictor import Predictor
from vessel.inference.samples import question_sample_loader


def answer_to(network, prompt, sample, **options):
    """Ids of the answer to the question that a sample ends with."""
    batch = collate([sample], prompt.token_ids.pad)
    [answer] = Conversations(network, prompt, batch, **options).generate([sample.input_ids])
    return answer


def generated_states(network, prompt, sample):
    """Ids of the answer, and the states [N, d] of its `[SEG]` while it was generated, as the public code takes them."""
    embeddings = network.embed(sample.input_ids[None], network.encode_tiles(sample.tiles))
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
    embeddings = network.embed(ids, network.encode_tiles(sample.tiles))
    hidden = network.mllm.model.language_model(inputs_embeds=embeddings).last_hidden_state
    return hidden[ids == prompt.token_ids.seg]


@pytest.fixture
def speaking(plan, prompt):
    """A tiny random network that answers `[SEG]<|im_end|>` to one question, and a sample that asks it."""
    network = plan().build().eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    sample = question_sample(image, "Where is the lumen?", prompt, plan().sizes.geometry)
    answer = [prompt.token_ids.seg, prompt.token_ids.eos]
    ids = torch.cat([sample.input_ids, torch.tensor(answer[:1])])[None]
    with torch.no_grad():
        embeddings = network.embed(ids, network.encode_tiles(sample.tiles))
        hidden = network.mllm.model.language_model(inputs_embeds=embeddings).last_hidden_state
        # A unit vector agrees best with its own direction.
        network.mllm.lm_head.weight.zero_()
        network.mllm.lm_head.weight[answer] = torch.nn.functional.normalize(hidden[0, -2:], dim=-1)
    return network, sample, answer


def test_a_teacher_forced_seg_has_the_state_of_a_generated_one(speaking, prompt):
    network, sample, answer = speaking
    with torch.no_grad():
        said, states = generated_states(network, prompt, sample)
        assert said == answer == answer_to(network, prompt, sample)
        assert torch.allclose(states, taught_states(network, prompt, sample, answer), rtol=1e-4, atol=1e-5)


@pytest.fixture
def asked(plan, prompt):
    """`asked(prompt)`: a sample that asks a question."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return lambda prompt=prompt: question_sample(image, "Where?", prompt, plan().sizes.geometry)


def words_of(network, prompt, sample, text, **options):
    hook = scripted(network, prompt.tokenizer(text).input_ids)
    said = answer_to(network, prompt, sample, **options)
    hook.remove()
    return prompt.decode(said)


@pytest.mark.parametrize("template", ["qwen_chat", "internlm2_chat", "phi3_chat"])
def test_an_answer_ends_with_the_stop_word_of_its_template(plan, asked, template):
    prompt = Prompt(template=template)
    assert len(prompt.tokenizer("<|end|>").input_ids) > 1
    network = plan().build().eval()
    stop = prompt.template.end
    assert words_of(network, prompt, asked(prompt), f"Sure, [SEG].{stop} and on") == f"Sure, [SEG].{stop}"


def test_an_answer_that_does_not_end_is_cut(plan, prompt, asked):
    network = plan().build().eval()
    words = words_of(network, prompt, asked(), "and on " * 50, max_new_tokens=7)
    assert len(prompt.tokenizer(words).input_ids) == 7


def test_image_tokens_are_never_said(plan, prompt, asked):
    network = plan().build().eval()
    with torch.no_grad():
        network.mllm.lm_head.weight.zero_()
    hook = scripted(network, [prompt.token_ids.image] * 3)
    said = answer_to(network, prompt, asked(), max_new_tokens=3)
    hook.remove()
    assert said
    assert prompt.token_ids.image not in said


def language(network, sample, ids):
    embeddings = network.embed(ids[None], network.encode_tiles(sample.tiles))
    return network.mllm.model.language_model(inputs_embeds=embeddings).last_hidden_state[0]


@torch.no_grad()
def naive(network, prompt, sample, limit):
    """Answers to the phrases of one image, and the states of their `[SEG]`; all is read anew for every token."""
    image_tokens = int((sample.input_ids == prompt.token_ids.image).sum())
    questions, answers = [QUESTIONS[0].format(phrase=phrase) for phrase in sample.phrases], []
    for turn in range(len(questions)):
        before, _ = prompt.conversation(questions[: turn + 1], answers, image_tokens)
        answer = []
        while len(answer) < limit and not prompt.is_finished(answer):
            state = language(network, sample, torch.cat([before, torch.tensor(answer, dtype=torch.int64)]))[-1]
            logits = network.mllm.lm_head(state)
            logits[prompt.token_ids.image] = -torch.inf
            answer.append(int(logits.argmax()))
        answers.append(answer)
    ids, _ = prompt.conversation(questions, answers, image_tokens)
    return answers, language(network, sample, ids)[ids == prompt.token_ids.seg], ids


LIMIT = 9


@pytest.fixture
def talkative(plan, prompt):
    """A tiny random network that says `[SEG]` and ends its answers more often than chance would have it."""
    plan = plan(sizes=replace(SIZES, max_tiles=4))
    network = plan.build().eval()
    torch.manual_seed(35)  # answers of many lengths, two of them cut right after a `[SEG]`
    with torch.no_grad():
        head, embedding = network.mllm.lm_head.weight, network.mllm.get_input_embeddings().weight
        embedding.normal_(std=1)
        head.normal_(std=1)
        head[prompt.token_ids.seg] *= 2
        head[prompt.token_ids.eos] *= 2
    rng = np.random.default_rng(0)
    shapes = {(40, 50): ("lumen",), (40, 120): ("lumen", "side branch", "cap"), (90, 44): ("side branch", "lumen")}
    images = [(rng.integers(0, 256, (*size, 3), dtype=np.uint8), phrases) for size, phrases in shapes.items()]
    return network, [make_sample(image, phrases, prompt, plan.sizes.geometry) for image, phrases in images]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_together_images_get_the_answers_and_states_of_each_read_anew(talkative, prompt, batch):
    network, samples = talkative
    assert len({len(sample.tiles) for sample in samples}) == 3
    expected = [naive(network, prompt, sample, LIMIT) for sample in samples]
    said = [answer for answers, _, _ in expected for answer in answers]
    assert len({len(answer) for answer in said}) > 2
    assert any(len(answer) == LIMIT and answer[-1] == prompt.token_ids.seg for answer in said)
    spoken = []
    for i in range(0, 3, batch):
        spoken += generate_answers(network, prompt, samples[i : i + batch], max_new_tokens=LIMIT)
    for said, sample, (answers, states, ids) in zip(spoken, samples, expected, strict=True):
        assert said.answers == tuple(prompt.decode(answer).strip() for answer in answers)
        assert torch.equal(said.sample.input_ids, ids)
        assert said.phrases == sample.phrases
        assert len(said.sample.phrases) == len(states)
        assert torch.allclose(said.seg_states, states, rtol=1e-4, atol=1e-5)


def test_what_is_known_of_an_image_is_not_computed_again(talkative, prompt):
    network, samples = talkative
    expected = generate_answers(network, prompt, samples, max_new_tokens=LIMIT)
    with torch.no_grad():
        known = Features(network.encode_tiles(samples[1].tiles), network.encode_frame(samples[1].frame[None]))
    stored = replace(samples[1], tiles=samples[1].tiles[:0], frame=samples[1].frame[:, :0, :0], features=known)
    seen = []
    network.mllm.model.vision_tower.register_forward_hook(lambda _, __, output: seen.append(len(output[0])))
    found = generate_answers(network, prompt, [samples[0], stored, samples[2]], max_new_tokens=LIMIT)
    assert seen == [len(samples[0].tiles) + len(samples[2].tiles)]
    for a, b in zip(expected, found, strict=True):
        assert a.answers == b.answers
        assert torch.allclose(a.seg_states, b.seg_states, atol=1e-5)


def test_compiled_layers_are_not_compiled_anew_for_every_token(talkative, prompt):
    network, samples = talkative
    expected = generate_answers(network, prompt, samples[:1], max_new_tokens=LIMIT)
    compiled = []
    for layer in network.mllm.model.language_model.layers:
        layer.compile(backend=lambda graph, _: compiled.append(graph) or graph)
    found = generate_answers(network, prompt, samples[:1], max_new_tokens=LIMIT)
    assert not compiled
    assert found[0].answers == expected[0].answers


def test_an_image_is_seen_once_and_a_token_read_once_whatever_the_turns(talkative, prompt):
    network, samples = talkative
    seen, read = [], []
    network.mllm.model.vision_tower.register_forward_pre_hook(
        lambda _, __, given: seen.append(len(given["pixel_values"])), with_kwargs=True
    )
    network.mllm.model.language_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    [said] = generate_answers(network, prompt, samples[1:2], max_new_tokens=LIMIT)
    assert seen == [len(samples[1].tiles)]
    tokens = sum(length for _, length in read)
    end = 3  # the last token of the last answer, what closes it and a line break: nothing comes after them
    assert len(said.sample.input_ids) - end <= tokens <= len(said.sample.input_ids)
    alone, read[:] = len(read), []
    generate_answers(network, prompt, samples, max_new_tokens=LIMIT)
    assert seen[1:] == [sum(len(sample.tiles) for sample in samples)]
    assert {rows for rows, _ in read} == {3}
    assert alone <= len(read) < alone + LIMIT  # in step with the longest, not one after the other


def answered(golden, name):
    """Let a golden network speak about a case; gives the prediction, whose answer is compared with the recorded one."""
    file = golden.folder / f"images/{name}.png"
    target = InputImage(name, file, file.name)
    predictor = Predictor(golden.model, device="cpu", decode="generate")
    [answer] = predictor.predict([target], question_sample_loader([target], golden.cases[name]["text"], golden.model))
    assert answer.answers == (golden.cases[name]["prediction"],) == ("[SEG]<|im_end|>",)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(("network", "name"), cases_of(INTERNLM2))
def test_golden_answers_of_generate(golden_network, network, name):
    answered(golden_network(network), name)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "name"), cases_of(*WITH_MASKS))
def test_golden_answers_and_masks_of_generate(golden_network, network, name):
    golden = golden_network(network)
    [probability] = answered(golden, name).probabilities
    [truth] = golden.mask(name)
    assert probability.shape == truth.shape == tuple(golden.cases[name]["mask_shape"][1:])
    assert ((probability > 0.5).numpy() == truth).mean() >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize(("network", "name"), [*cases_of(*NETWORKS), (INTERNLM2_WHOLE, "wide")])
def test_golden_states_and_masks_forced_and_generated_are_equal(golden_network, network, name):
    golden = golden_network(network)
    model, case, expected = golden.model, golden.cases[name], golden.tensors
    network, prompt = model.network, model.prompt
    image = read_rgb(golden.folder / f"images/{name}.png")
    sample = question_sample(image, case["text"], prompt, model.geometry)
    assert len(sample.input_ids) == case["prompt_tokens"]
    with torch.no_grad():
        said, generated = generated_states(network, prompt, sample)
        taught = taught_states(network, prompt, sample, said)
        [own] = generate_answers(network, prompt, [sample])
        pyramid = network.encode_frame(sample.frame[None])
        logits = network.decode_masks(pyramid, torch.cat([generated, taught]), torch.tensor([0, 0]))
    assert prompt.decode(said) == own.answers[0] == case["prediction"]
    assert torch.allclose(own.seg_states, generated, rtol=1e-4, atol=1e-5)
    assert torch.allclose(generated, expected[f"{name}.seg_state"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(taught, expected[f"{name}.seg_state"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("network", WITH_MASKS)
def test_golden_prompt_of_a_video(golden_network, network):
    """Five frames, one tile each, give the state that the public code recorded."""
    golden = golden_network(network)
    model, prompt, side = golden.model, golden.model.prompt, golden.model.geometry.tile_size
    frames = [Image.fromarray(golden.image(f"pullback_{i}")).resize((side, side)) for i in range(5)]
    tiles = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    ids, _ = prompt.conversation([golden.cases["pullback"]["text"]], ["[SEG]"], 256, frames=5)
    with torch.no_grad():
        hidden = model.network.mllm.model.language_model(
            inputs_embeds=model.network.embed(ids[None], model.network.encode_tiles(tiles))
        ).last_hidden_state
    state = hidden[ids[None] == prompt.token_ids.seg]
    assert torch.allclose(state, golden.tensors["pullback.seg_state"], rtol=1e-4, atol=1e-5)
