import json
import re
from random import Random

import pytest
import torch

from vessel.data.prompt import ANSWERS, IMAGE, QUESTIONS, SEG, TEMPLATES, Prompt
from vessel.errors import VesselError


def test_golden_ids_with_the_real_tokenizer(shared):
    """Ids of the specification, section 2.5: three context tokens, then question and answer."""
    prompt = Prompt(str(shared("tokenizer")))
    assert (prompt.token_ids.seg, prompt.token_ids.image) == (151674, 151667)
    assert (prompt.token_ids.pad, prompt.token_ids.eos) == (151643, 151645)
    assert prompt.new_tokens == range(151674, 151679)
    assert prompt.has_seg
    assert prompt.tokenizer.convert_tokens_to_ids(["[SEG]", "<p>", "</p>", "<vp>", "</vp>"]) == [*range(151674, 151679)]
    ids, labels = prompt.conversation(["Please segment blood vessel in this image."], ["Sure, [SEG]."], 3)
    question = [151644, 872, 198, 151665, 151667, 151667, 151667, 151666, 198]
    question += [5501, 10238, 6543, 26182, 304, 419, 2168, 13, 151645, 198, 151644, 77091, 198]
    answer = [39814, 11, 220, 151674, 13, 151645]
    assert ids.tolist() == [*question, *answer, 198]
    assert labels.tolist() == [-100] * len(question) + answer + [-100]


@pytest.mark.parametrize("network", ["sa2va_qwen2", "sa2va_internlm2"])
def test_golden_prompt_lengths(golden_folder, network):
    """What the public code counted for its three images of one, seven and thirteen tiles."""
    folder = golden_folder(network)
    prompt = Prompt(str(folder), json.loads((folder / "config.json").read_text())["template"])
    cases = {case["name"]: case for case in json.loads((folder / "expected.json").read_text())["cases"]}
    for name, tiles in {"square": 1, "wide": 7, "small_gray": 13}.items():
        ids, _ = prompt.conversation([cases[name]["text"]], [], tiles * 256)
        assert len(ids) == cases[name]["prompt_tokens"]


def test_each_phrase_has_one_seg_and_only_answers_are_supervised(prompt):
    ids, labels = prompt.encode(["lumen", "lipid core", "side branch"], 4)
    assert (ids == prompt.token_ids.seg).sum() == 3
    assert (ids == prompt.token_ids.image).sum() == 4
    supervised = labels != -100
    assert (ids[supervised] == labels[supervised]).all()
    assert prompt.decode(ids[supervised].tolist()) == "Sure, [SEG].<|im_end|>" * 3


def test_prompt_templates_vary_in_training_and_repeat_with_the_seed(prompt):
    def words(seed):
        return prompt.encode(["lumen"] * 4, 4, rng=Random(seed))[0].tolist()

    assert words(1) == words(1)
    assert len({tuple(words(seed)) for seed in range(20)}) > 10


def test_every_answer_holds_exactly_one_seg_and_every_question_its_phrase():
    assert all(answer.count(SEG) == 1 for answer in ANSWERS)
    assert all(question.count("{phrase}") == 1 for question in QUESTIONS)


def test_a_conversation_can_stop_where_generation_begins(prompt):
    ids, labels = prompt.conversation(["First?", "Second?"], ["[SEG]"], 2)
    assert prompt.decode(ids.tolist()).endswith("<|im_start|>assistant\n")
    assert (labels != -100).sum() == 2


def test_small_tokenizer_writes_any_phrase_and_is_the_same_each_time(prompt):
    text = "Läsion №3 ~ 血管"
    again = Prompt()
    assert prompt.decode(prompt.tokenizer(text).input_ids) == text
    assert again.tokenizer.get_vocab() == prompt.tokenizer.get_vocab()


def test_saved_tokenizer_comes_back(prompt, tmp_path):
    prompt.save(tmp_path)
    back = Prompt(str(tmp_path))
    assert back.token_ids == prompt.token_ids
    assert back.new_tokens == prompt.new_tokens
    assert back.encode(["lumen"], 4)[0].tolist() == prompt.encode(["lumen"], 4)[0].tolist()


def test_phi3_template_of_the_4b_checkpoint(shared):
    """Its tokenizer is Qwen's, which has none of the template's tokens."""
    prompt = Prompt(str(shared("tokenizer")), "phi3_chat")
    ids, labels = prompt.conversation(["Where?", "And now?"], ["[SEG]."], 2)
    text = "<|user|>\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhere?<|end|>\n<|assistant|>\n[SEG].<|end|>\n"
    assert prompt.decode(ids.tolist()) == text + "<|user|>\nAnd now?<|end|>\n<|assistant|>\n"
    assert prompt.decode(labels[labels != -100].tolist()) == "[SEG].<|end|>"
    assert prompt.token_ids.eos == 151645


def test_an_answer_is_over_by_a_token_or_by_a_stop_word_in_pieces(shared):
    tokenizer = str(shared("tokenizer"))
    qwen, phi3 = Prompt(tokenizer), Prompt(tokenizer, "phi3_chat")

    def over(prompt, text):
        return prompt.is_finished(prompt.tokenizer(text).input_ids)

    assert [over(qwen, text) for text in ("Yes<|im_end|>", "Yes<|endoftext|>", "Yes<|end|>", "Yes")] == [1, 1, 0, 0]
    assert [over(phi3, text) for text in ("Yes<|im_end|>", "Yes<|endoftext|>", "Yes<|end|>", "Yes")] == [1, 0, 1, 0]
    assert [over(phi3, text) for text in ("Yes<|end|>\n", "<|end|> Yes", "Yes<|end", "")] == [1, 0, 0, 0]


def test_stop_words_of_the_public_templates():
    stops = {"qwen_chat": ["<|im_end|>", "<|endoftext|>"], "internlm2_chat": ["<|im_end|>"], "phi3_chat": ["<|end|>"]}
    assert {name: list(template.stop_words) for name, template in TEMPLATES.items()} == stops


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_of_ids_reads_as_its_text(template):
    prompt = Prompt(template=template)
    questions, texts = ["First?", "Second?", "Third?"], ["Here: [SEG].", "[SEG]"]
    ended = prompt.tokenizer(texts[0] + prompt.template.end).input_ids
    cut = prompt.tokenizer(texts[1]).input_ids
    expected, labels = prompt.conversation(questions, texts, 2)
    ids, same_labels = prompt.conversation(questions, [ended, cut], 2)
    assert ids.tolist() == expected.tolist()
    assert same_labels.tolist() == labels.tolist()


def first_question(prompt, question, **options):
    ids, _ = prompt.conversation([question], [], 2, **options)
    text = prompt.decode(ids.tolist()).removeprefix("<|im_start|>user\n")
    return text.removesuffix("<|im_end|>\n<|im_start|>assistant\n").replace("<IMG_CONTEXT>", "x")


def test_the_image_stands_first_or_where_the_question_puts_it(prompt):
    assert first_question(prompt, "Where?") == "<img>xx</img>\nWhere?"
    assert first_question(prompt, "<image>\nWhere?") == "<img>xx</img>\nWhere?"
    assert first_question(prompt, "<image>Where?") == "<img>xx</img>Where?"
    assert first_question(prompt, "In <image>, where?") == "In <img>xx</img>, where?"
    with pytest.raises(VesselError, match="<image> once"):
        first_question(prompt, "<image> or <image>?")
    with pytest.raises(VesselError, match="<image> once"):
        prompt.conversation(["Where?", "And in <image>?"], ["[SEG]"], 2)


def test_frames_of_a_video_are_blocks_of_their_own(prompt):
    assert first_question(prompt, "Where?", frames=3) == "<img>xx</img>\n<img>xx</img>\n<img>xx</img>\nWhere?"


def test_regions_follow_the_image(prompt):
    """The text of the public code, which ends with a line break of its own."""
    regions = "\nThere are 2 part regions in the picture: region1<vp>xxx</vp>, region2<vp>x</vp>.\n"
    assert first_question(prompt, "<image>What?", regions=[3, 1]) == f"<img>xx</img>{regions}What?"
    assert first_question(prompt, "What?", regions=[3, 1]) == f"<img>xx</img>{regions}\nWhat?"


def test_a_tokenizer_without_seg_is_known(prompt, tmp_path):
    assert not prompt.has_seg
    prompt.save(tmp_path)
    assert Prompt(str(tmp_path)).has_seg


def test_bad_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VesselError, match=r"prompt\.template=llama.*qwen_chat"):
        Prompt(template="llama")
    with pytest.raises(VesselError, match=re.escape(f"prompt.tokenizer={tmp_path}")):
        Prompt(str(tmp_path))


@pytest.mark.parametrize("source", [None, "shared/tokenizer", "sa2va_qwen2", "sa2va_internlm2"])
@pytest.mark.parametrize("question", ["Where?", "In <image>, where?"])
def test_ids_are_those_of_the_whole_text(golden_folder, source, question):
    """The expected ids are those of the text with every image token written out, frames and regions included."""
    prompt = Prompt(None if source is None else str(golden_folder(source)))
    image = "\n".join([f"<img>{IMAGE * 20}</img>"] * 2)
    image += f"\nThere are 2 part regions in the picture: region1<vp>{IMAGE * 3}</vp>, region2<vp></vp>.\n"
    text = question.replace("<image>", image) if "<image>" in question else f"{image}\n{question}"
    turn = prompt.template.turn.format(question=text)
    naive = [*prompt._first, *prompt.tokenizer(turn, add_special_tokens=False).input_ids]
    assert prompt.conversation([question], [], 20, frames=2, regions=[3, 0])[0].tolist() == naive


def test_a_text_is_cut_into_tokens_once(monkeypatch):
    prompt = Prompt()
    first = prompt.encode(["lumen", "lipid core"], 4)
    encoded = []
    cut = type(prompt.tokenizer).__call__
    monkeypatch.setattr(
        type(prompt.tokenizer), "__call__", lambda self, text, **k: encoded.append(text) or cut(self, text, **k)
    )
    again, wide = prompt.encode(["lumen", "lipid core"], 4), prompt.encode(["lumen", "lipid core"], 3328)
    assert not encoded
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert len(wide[0]) == len(first[0]) + 3324
    prompt.encode(["cap"], 4)
    assert len(encoded) == 1  # the answer is known


def test_the_texts_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("vessel.data.prompt._KNOWN_TEXTS", 16)
    prompt = Prompt()
    expected = prompt.encode(["lumen 0"], 4)[0].tolist()
    for number in range(40):
        prompt.encode([f"lumen {number}"], 4)
    assert len(prompt._known) <= 16
    assert prompt.encode(["lumen 0"], 4)[0].tolist() == expected
