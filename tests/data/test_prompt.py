from random import Random

import pytest

from vessel.data.prompt import ANSWERS, QUESTIONS, SEG, Prompt
from vessel.errors import VesselError


def test_golden_ids_with_the_real_tokenizer(shared):
    """Ids of the specification, section 2.5: three context tokens, then question and answer."""
    prompt = Prompt(str(shared("tokenizer")))
    assert (prompt.token_ids.seg, prompt.token_ids.image) == (151674, 151667)
    assert (prompt.token_ids.pad, prompt.token_ids.eos) == (151643, 151645)
    assert prompt.new_tokens == range(151674, 151679)
    ids, labels = prompt.conversation(["Please segment blood vessel in this image."], ["Sure, [SEG]."], 3)
    asked = [151644, 872, 198, 151665, 151667, 151667, 151667, 151666, 198]
    asked += [5501, 10238, 6543, 26182, 304, 419, 2168, 13, 151645, 198, 151644, 77091, 198]
    answered = [39814, 11, 220, 151674, 13, 151645]
    assert ids.tolist() == [*asked, *answered, 198]
    assert labels.tolist() == [-100] * len(asked) + answered + [-100]


def test_each_phrase_has_one_seg_and_only_answers_are_supervised(prompt):
    ids, labels = prompt.encode(["lumen", "lipid core", "side branch"], 4)
    assert (ids == prompt.token_ids.seg).sum() == 3
    assert (ids == prompt.token_ids.image).sum() == 4
    supervised = labels != -100
    assert (ids[supervised] == labels[supervised]).all()
    assert prompt.decode(ids[supervised].tolist()) == "Sure, [SEG].<|im_end|>" * 3


def test_wordings_vary_in_training_and_repeat_with_the_seed(prompt):
    def words(seed):
        return prompt.encode(["lumen"] * 4, 4, draw=Random(seed))[0].tolist()

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


def test_phi3_template_of_the_4b_checkpoint(prompt):
    with pytest.raises(VesselError, match=r"splits <\|end\|> into"):
        Prompt(template="phi3_chat")  # the small tokenizer has no such token


def test_bad_input_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(VesselError, match="known templates are qwen_chat"):
        Prompt(template="llama")
    with pytest.raises(VesselError, match="no tokenizer could be read"):
        Prompt(str(tmp_path))
