"""Words that Hydra cannot compose: one line with what to type."""

import shlex

import pytest
from tests.launching import command


@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("train", ["sed=1", "data.root=x"], ("sed:", "did you mean seed?")),
        (
            "train",
            ["experiment=tiny", "data.root=x", "trainer.max_step=3"],
            ("trainer.max_step:", "max_steps?"),
        ),
        ("train", ["data.root=x", "optimizr.lr=1e-3"], ("optimizr.lr:", "optimizer.lr?")),
        ("train", ["data.root=x", "modle=tiny"], ("modle", "model?")),
        ("train", ["data.root=x", "model=tinny"], ("model=tinny:", "unet", "did you mean tiny?")),
        ("train", ["experiment=lora_r28"], ("experiment=lora_r28:", "lora_r128?")),
        ("train", ["experiment=tiny", "data.root=x", "zzzz=1"], ("zzzz:", "--help")),
        ("prepare", ["sorce=x", "out=y"], ("sorce:", "source?")),
        ("evaluate", ["ckpt=x", "data.rot=y"], ("data.rot:", "data.root?")),
        ("predict", ["ckpt=x", "images=y", "out=z", "treshold=0.3"], ("treshold:", "threshold?")),
        ("export", ["ckpt=x", "out=z", "dtyp=bf16"], ("dtyp:", "dtype?")),
    ],
)
def test_a_misspelt_option_is_answered_with_the_nearest_one(verb, words, expected, tmp_path):
    done = command(f"vessel.{verb}", *words, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {expected[0]}")
    for part in expected[1:]:
        assert part in line
    assert "+" not in line


@pytest.mark.parametrize("value", ["scan(1)", "a{b", "x[1", "it's", "a'b(c"])
def test_a_value_with_characters_of_hydra_is_answered_with_what_to_type(value, tmp_path):
    done = command("vessel.prepare", f"source={value}", "out=data", cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    typed = shlex.split(line.rpartition("type ")[2])
    again = command("vessel.prepare", *typed, "out=data", cwd=tmp_path)
    assert f"source={value}: no such folder" in again.stderr


def test_a_word_that_is_no_option_is_refused(tmp_path):
    done = command("vessel.prepare", "scans", "out=data", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: scans: write OPTION=VALUE")


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = command("vessel.prepare", "sorce=x", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
