"""Saved configurations with names of before, read with those of today."""

import pytest

from vessel.runs.old_names import KEYS, present_config


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("vessel.model.mllm.VisionConfig", {"tile": 448, "patch": 14}, {"tile_size": 448, "patch": 14}),
        ("vessel.model.grounding.GroundingConfig", {"frame": 1024, "heads": 2}, {"frame_size": 1024, "heads": 2}),
        ("vessel.model.baselines.UNetConfig", {"frame": 512}, {"frame_size": 512}),
    ],
)
def test_keys_of_a_network_have_the_names_of_today(name, old, new):
    config = {"model": {"part": {"_target_": name, **old}}, "name": "frame"}
    assert present_config(config) == {"model": {"part": {"_target_": name, **new}}, "name": "frame"}
    assert present_config(present_config(config)) == present_config(config)


def test_a_class_and_its_key_that_were_both_renamed():
    config = {"model": {"vision": {"_target_": "vessel.model.mllm.VisionSizes", "tile": 56}}}
    vision = {"_target_": "vessel.model.mllm.VisionConfig", "tile_size": 56}
    assert present_config(config) == {"model": {"vision": vision}}
    assert config["model"]["vision"]["tile"] == 56, "the saved one stays as it is"


def test_keys_of_other_classes_stay():
    assert "torch.nn.Linear" not in KEYS
    config = {"callbacks": [{"_target_": "torch.nn.Linear", "frame": 1, "tile": 2}], "model": {"frame": 3}}
    assert present_config(config) == config
