"""The record of a run's settings: compared, and replaced when the run went on with others."""

from contextlib import suppress

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from vessel.cli.conf import CONF
from vessel.errors import VesselError
from vessel.runs.record import differing, noted, options_of, settings_of


def test_settings_are_compared_by_their_full_key():
    before = {"seed": 0, "trainer": {"devices": 1, "precision": 16}, "data": {"workers": 0, "root": "a"}, "lora": None}
    now = {"seed": 0, "trainer": {"devices": [0, 1], "precision": 32}, "data": {"root": "a"}, "lora": {"r": 8}, "x": 0}
    assert differing(before, before) == differing({}, {"callbacks": {"one": 1}, "trainer": {"enable_this": 1}}) == []
    told = ["trainer.precision=32 (there 16)", "lora.r=8 (there absent)", "x=0 (there absent)"]
    assert differing(before, now) == [*told, "lora=absent (there None)"]


def test_a_prompt_that_is_now_called_auto_is_no_other_setting():
    language, baseline = (
        {"_target_": f"vessel.model.{name}"} for name in ("sa2va.Sa2VAConfig", "baselines.UNetConfig")
    )
    auto, small = ({"tokenizer": t, "template": n} for t, n in (("auto", "auto"), (None, "qwen_chat")))
    public = {"tokenizer": "weights", "template": "weights"}
    for model, weights, old in ((language, [], small), (language, ["a"], public), (baseline, ["a"], small)):
        now = {"model": model, "weights": weights}
        assert differing({**now, "prompt": old}, {**now, "prompt": auto}) == []
    now = {"model": language, "weights": ["a"]}
    assert len(differing({**now, "prompt": small}, {**now, "prompt": auto})) == 2


@pytest.fixture
def job(monkeypatch):
    """A job's configuration as Hydra gives it to the command, with what Hydra knows of the job beside."""

    def begin(*options: str):
        with initialize_config_dir(CONF, version_base="1.3"):
            config = compose("train", ["experiment=tiny", *options], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            config.pop("hydra")
        return config

    return begin


def test_settings_are_noted_when_they_have_led_to_a_checkpoint(tmp_path, job):
    for name in (".hydra", "checkpoints"):
        (tmp_path / name).mkdir()
    OmegaConf.save({"seed": 0}, tmp_path / ".hydra/config.yaml")
    (tmp_path / "checkpoints/last-000001.ckpt").touch()
    config = job("seed=5", "hydra.output_subdir=null")

    def train(saves: str, ends: BaseException) -> None:
        with suppress(type(ends)), noted(config, tmp_path):
            (tmp_path / "checkpoints" / saves).touch()
            raise ends

    train(".last-000002.ckpt.part", VesselError("refused"))
    assert settings_of(tmp_path) == {"seed": 0}
    train("last-000002.ckpt", SystemExit(143))
    assert settings_of(tmp_path)["seed"] == 5
    assert differing(settings_of(tmp_path), OmegaConf.to_container(config, resolve=False)) == []
    assert options_of(tmp_path) == ["experiment=tiny", "seed=5"]


def test_a_folder_without_a_record_gets_none(tmp_path, job):
    with noted(job("hydra.output_subdir=null"), tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/last-000002.ckpt").touch()
    assert not (tmp_path / ".hydra").exists()


def test_options_and_settings_of_an_older_run_have_the_names_of_today(tmp_path):
    """So that it can be resumed: nothing of it differs from the same command of today."""
    (tmp_path / ".hydra").mkdir()
    old = ["experiment=tiny", "data.root=data", "objective=sa2va", "lora=r8"]
    OmegaConf.save(OmegaConf.create(old), tmp_path / ".hydra/overrides.yaml")
    options = options_of(tmp_path)
    assert options == ["experiment=tiny", "data.root=data", "loss=sa2va", "lora.r=8"]
    with initialize_config_dir(CONF, version_base="1.3"):
        now = OmegaConf.to_container(compose("train", options[:2]), resolve=False)
    before = {**now, "objective": now["loss"], "lora": {"_target_": "vessel.model.lora.Lora", "r": 0}}
    before.pop("loss")
    before["weights"], now["weights"] = ["ByteDance/Sa2VA-4B", "my/base"], ["hf://ByteDance/Sa2VA-4B", "my/base"]
    before["data"] = {**now["data"], "augmentation": {"_target_": "vessel.data.transforms.Augmentation"}}
    OmegaConf.save(OmegaConf.create(before), tmp_path / ".hydra/config.yaml")
    assert settings_of(tmp_path) == now
