"""The configuration of a run, settled so that it can be repeated from anywhere."""

import pytest
from hydra.errors import InstantiationException
from tests.conftest import _configuration
from tests.weights.layouts import write_sa2va, write_sam2

from vessel.errors import VesselError
from vessel.training.run import _data_module
from vessel.training.settings import check, settled


def settled_prompt(*overrides: str) -> dict:
    prompt = settled(_configuration("train", ["data.root=x", "run=x", *overrides]), None).prompt
    return {key: prompt[key] for key in ("tokenizer", "template")}


def test_an_old_key_in_a_file_is_answered_with_the_new_one():
    with pytest.raises(VesselError, match=r"objective.* loss\b"):
        check(_configuration("train", ["data.root=x", "run=x", "+objective.dice_weight=1"]))
    with pytest.raises(VesselError, match=r"model\.grounding\.frame .*model\.grounding\.frame_size"):
        check(_configuration("train", ["data.root=x", "run=x", "+model.grounding.frame=64"]))


def test_a_folder_called_weights_or_auto_is_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("weights", "auto"):
        (tmp_path / name).mkdir()
    assert settled_prompt() == {"tokenizer": None, "template": "qwen_chat"}


def test_a_prompt_follows_from_the_weights(plan, prompt, tmp_path):
    """Without weights, or with a baseline, which reads no prompt, it is the small one."""
    small = {"tokenizer": None, "template": "qwen_chat"}
    folder = write_sa2va(tmp_path / "public", plan().build(), template="internlm2_chat")
    sam2 = write_sam2(tmp_path / "sam2.pt", plan().build())
    public = {"tokenizer": str(folder), "template": "internlm2_chat"}
    given = f"weights=[{folder},{sam2}]"
    assert settled_prompt() == settled_prompt("prompt=small", given) == settled_prompt(f"weights=[{sam2}]") == small
    assert settled_prompt("model=sam2_prompt", given) == small
    assert settled_prompt(given) == settled_prompt("prompt=sa2va", given) == public
    assert settled_prompt(given, "prompt.template=phi3_chat") == {**public, "template": "phi3_chat"}


def test_a_typo_in_a_transform_is_refused():
    """albumentations itself would only warn, and leave the argument out."""
    typo = "data.augmentation.transforms=[{_target_: albumentations.HorizontalFlip, pp: 1}]"
    with pytest.raises(InstantiationException, match="pp"):
        _data_module(_configuration("train", ["data.root=x", typo]), None, None)
