"""Old names of options, answered with the ones of today."""

import pytest
from tests.launching import command

from vessel.cli.option_names import answer_old_names
from vessel.errors import VesselError
from vessel.runs.old_names import present_option


@pytest.mark.parametrize(
    ("verb", "old", "new"),
    [
        ("train", "objective=sa2va", "loss=sa2va"),
        ("train", "objective.dice_weight=1.0", "loss.dice_weight=1.0"),
        ("train", "+objective.dice_weight=1,2", "+loss.dice_weight=1,2"),
        ("train", "checkpointing=true", "activation_checkpointing=true"),
        ("train", "sweep=optuna", "sweeper=optuna"),
        ("train", "sweep=slurm", "launcher=slurm"),
        ("train", "lora=none", "lora.r=0"),
        ("train", "model.grounding.frame=64,128", "model.grounding.frame_size=64,128"),
        ("train", "++model.vision.tile=56", "++model.vision.tile_size=56"),
        ("train", "model.frame=64", "model.frame_size=64"),
        ("train", "lora=r8,r16", "lora.r=8,16"),
        ("predict", "views=[flip_lr,flip_ud]", "tta=[flip_lr,flip_ud]"),
        ("predict", "low=0.2", "hysteresis=0.2"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(verb, old, new):
    assert present_option(old, verb) == new
    with pytest.raises(VesselError) as caught:
        answer_old_names(["-m", "out=x", old], verb)
    assert str(caught.value).startswith(f"{old}: ")
    assert str(caught.value).endswith(f" {new}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option",
    ["lora=default", "lora.r=8", "lora=r8,r9", "lora=[r8", "sweep=", "sweeper=tpe", "~logger.csv", "name=lora=r8",
     "views=1", "--config-dir", "loss=sa2va", "activation_checkpointing=true", "low",
     "model.grounding.width=32", "frame=64"],
)  # fmt: skip
def test_other_words_are_hydras_to_read(option):
    assert present_option(option, "train") == option
    answer_old_names([option], "train")


@pytest.mark.parametrize(
    ("verb", "option", "new"), [("train", "objective=sa2va", "loss=sa2va"), ("predict", "low=0.2", "hysteresis=0.2")]
)
def test_the_commands_answer_in_one_line(verb, option, new, tmp_path):
    done = command(f"vessel.{verb}", option, "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {option}: ")
    assert line.endswith(new)
