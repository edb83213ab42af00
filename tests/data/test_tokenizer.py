"""Tokenizers of folders whose own code is never run."""

import io
import json
import re

import pytest
import sentencepiece

from vessel.data.prompt import Prompt
from vessel.data.tokenizer import read_tokenizer
from vessel.errors import VesselError

TEXTS = (
    "Please segment the blood vessel in this image.",
    "Sure, here is the mask of the lumen.",
    "two  spaces,\ttabs\nand lines ",
    " 血管 №3 ~ é",
)
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]


@pytest.fixture(scope="module", params=[False, True], ids=["as it is", "dummy prefix"])
def trained(request):
    """A model with the traits of InternLM2's: BPE, bytes for what is no piece, reserved pieces at its end."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2] * 5), model_writer=file, model_type="bpe", vocab_size=340, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=request.param,
        user_defined_symbols=["[UNUSED_1]", "[UNUSED_2]"], minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


@pytest.fixture
def folder(trained, tmp_path):
    """As InternVL2.5-8B has it: reserved pieces renamed, image tokens appended, a class of its own."""

    def make(**changes):
        (tmp_path / "tokenizer.model").write_bytes(trained.serialized_model_proto())
        base = trained.get_piece_size()
        reserved = {trained.piece_to_id("[UNUSED_1]"): "<|im_end|>", trained.piece_to_id("[UNUSED_2]"): "<|im_start|>"}
        added = {0: "<unk>", 1: "<s>", 2: "</s>", **reserved, **dict(enumerate(IMAGE_TOKENS, base))}
        flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        config = {
            "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in added.items()},
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "sp_model_kwargs": None,
            "tokenizer_class": "InternLM2Tokenizer", "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changes))
        (tmp_path / "added_tokens.json").write_text(json.dumps({t: base + i for i, t in enumerate(IMAGE_TOKENS)}))
        (tmp_path / "tokenization_internlm2.py").write_text("raise SystemExit('remote code ran')")
        return tmp_path

    return make


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_cut_as_sentencepiece_cuts_it(trained, folder, text):
    tokenizer = read_tokenizer(str(folder()))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == trained.encode(text)
    assert tokenizer.decode(ids) == trained.decode(ids)


def test_added_tokens_keep_their_ids_and_new_ones_follow(trained, folder):
    base = trained.get_piece_size()
    prompt = Prompt(str(folder()), "internlm2_chat")
    tokenizer = prompt.tokenizer
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKENS) == [*range(base, base + 5)]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == trained.piece_to_id("[UNUSED_1]")
    assert prompt.new_tokens == range(base + 5, base + 10)
    assert prompt.token_ids.seg == base + 5
    assert (prompt.token_ids.eos, prompt.token_ids.pad) == (2, 2)
    assert not prompt.has_seg
    assert prompt.is_finished([7, trained.piece_to_id("[UNUSED_1]")])


def test_a_conversation_begins_with_one_first_token(trained, folder):
    """Each stretch of text between special tokens is cut by itself."""
    prompt = Prompt(str(folder()), "internlm2_chat")
    start, end = trained.piece_to_id("[UNUSED_2]"), trained.piece_to_id("[UNUSED_1]")
    base, line = trained.get_piece_size(), trained.encode("\n")
    image = [base, base + 2, base + 2, base + 1]
    question = [1, start, *trained.encode("user\n"), *image, *trained.encode("\nWhere?"), end, *line, start]
    question += trained.encode("assistant\n")
    answer = [*trained.encode("Sure, "), base + 5, *trained.encode("."), end]
    again = [start, *trained.encode("user\nAnd?"), end, *line, start, *trained.encode("assistant\n")]
    ids, labels = prompt.conversation(["Where?", "And?"], ["Sure, [SEG]."], 2)
    assert ids.tolist() == [*question, *answer, *line, *again]
    assert labels[labels != -100].tolist() == answer
    plain = Prompt(str(folder(add_bos_token=False)), "internlm2_chat")
    assert plain.conversation(["Where?"], [], 2)[0].tolist() == question[1:]


def test_saved_it_is_an_internlm2_folder_again(folder, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    for add_bos_token in (True, False):
        prompt = Prompt(str(folder(add_bos_token=add_bos_token)), "internlm2_chat")
        prompt.save(saved)
        back = Prompt(str(saved), "internlm2_chat")
        assert back.has_seg
        assert back.token_ids == prompt.token_ids
        assert back.new_tokens == prompt.new_tokens
        assert back.encode(["lumen"], 4)[0].tolist() == prompt.encode(["lumen"], 4)[0].tolist()
        assert (back.tokenizer("").input_ids == [1]) == add_bos_token
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "InternLM2Tokenizer"
    assert config["auto_map"]["AutoTokenizer"][0] == "tokenization_internlm2.InternLM2Tokenizer"


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"tokenizer_class": 3}'])
def test_a_damaged_configuration_is_refused(folder, content):
    damaged = folder()
    (damaged / "tokenizer_config.json").write_text(content)
    with pytest.raises(VesselError, match=re.escape(f"prompt.tokenizer={damaged}")):
        read_tokenizer(str(damaged))


def test_a_damaged_model_is_refused(folder):
    damaged = folder()
    (damaged / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(VesselError, match=re.escape(f"prompt.tokenizer={damaged}")):
        read_tokenizer(str(damaged))
