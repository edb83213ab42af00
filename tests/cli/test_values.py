"""Bad values of options: one line with the option, its value and a good one, before anything heavy is imported."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from tests.conftest import _configuration
from tests.launching import command

from vessel.cli.values import RULES, check_values
from vessel.errors import VesselError

GIVEN = {
    "train": ("experiment=tiny", "data.root=data"),
    "prepare": ("source=scans", "out=data"),
    "evaluate": ("ckpt=run",),
    "predict": ("ckpt=run", "images=scans", "out=masks"),
    "export": ("ckpt=run", "out=export"),
}
BAD = {
    "train": (
        "optimizer.lr=fast", "optimizer.lr=-1", "optimizer.lr=0", "optimizer.lr=.nan", "optimizer.weight_decay=-3",
        "optimizer.warmup=2", "optimizer.betas=[0.9]", "optimizer.betas=0.9", "data.batch_size=0",
        "data.batch_size=two", "data.batch_size=1.5", "data.workers=-1", "data.repeats=0", "data.fold=-1",
        "data.phrases=[]", "data.phrases=3", "data.augmentation=none", "trainer.devices=two", "trainer.devices=0",
        "trainer.devices=[]", "seed=x", "seed=-1", "seed=null", "trainer.val_check_interval=0",
        "trainer.val_check_interval=1.5", "trainer.max_time=10", "trainer.max_time=fast",
        "trainer.accumulate_grad_batches=0", "trainer.max_steps=-2", "trainer.max_epochs=ten",
        "trainer.gradient_clip_val=-1", "trainer.log_every_n_steps=0", "name=", "name=' '", "name=null",
        "plan=maybe", "force=1", "compile=yes please", "gpu_gb=0", "activation_checkpointing=sometimes",
        "loss.dice_weight=-1", "lora.r=-1",
    ),
    "prepare": ("folds=-1", "gap=-1", "overwrite=maybe", "seed=x", "synthetic.size=0", "synthetic.patients=0"),
    "evaluate": (
        "batch_size=0", "workers=-1", "search=maybe", "tolerance=-1", "data.phrases=[]", "overwrite=2",
        "network.dtype=fp16",
    ),
    "predict": (
        "batch_size=0", "workers=-1", "devices=0", "decode=greedy", "max_new_tokens=0", "phrases=[]",
        "network.dtype=int4",
    ),
    "export": ("layout=onnx", "dtype=int4", "to_pth=2", "private=maybe"),
}  # fmt: skip


@pytest.mark.parametrize(("verb", "override"), [(verb, override) for verb, bad in BAD.items() for override in bad])
def test_a_bad_value_is_refused_with_its_option(verb, override):
    key, _, _ = override.partition("=")
    config = _configuration(verb, [*GIVEN[verb], override])
    with pytest.raises(VesselError, match=f"^{key}=.*: must be ") as refused:
        check_values(config, verb)
    assert "\n" not in str(refused.value)


GOOD = (
    "optimizer.lr=1", "trainer.devices=2", "trainer.devices='2'", "trainer.devices=auto",
    "trainer.devices=[0,1]", "trainer.devices=-1", "trainer.devices='0,1'", "trainer.max_time=00:00:10:00",
    "trainer.max_time={minutes: 3}", "trainer.max_time=null", "trainer.val_check_interval=10",
    "trainer.val_check_interval=0.5", "data.phrases=lumen", "trainer.val_check_interval=1.0",
    "data.phrases=[lumen,lipid core]", "data.augmentation=null", "trainer.max_steps=-1", "gpu_gb=40",
    "gpu_gb=null", "activation_checkpointing=true", "data.fold=0", "trainer.check_val_every_n_epoch=null",
)  # fmt: skip


@pytest.mark.parametrize("override", GOOD)
def test_a_good_value_passes(override):
    check_values(_configuration("train", [*GIVEN["train"], override]), "train")


@pytest.mark.parametrize("verb", RULES)
def test_the_shipped_values_pass_and_every_rule_has_its_option(verb):
    config = _configuration(verb, [*GIVEN[verb], *(["loss=sa2va", "cache=features"] if verb == "train" else [])])
    check_values(config, verb)
    absent = object()
    signature_only = {"optimizer.final", "lora.alpha_ratio", "lora.dropout"}
    for key in RULES[verb].keys() - signature_only:
        assert OmegaConf.select(config, key, default=absent, throw_on_missing=False) is not absent, key


def test_a_value_that_is_missing_is_not_judged():
    check_values(_configuration("train", ["experiment=tiny"]), "train")


@pytest.mark.parametrize(("verb", "override"), [(verb, bad[0]) for verb, bad in BAD.items()])
def test_the_command_answers_in_one_line(verb, override, tmp_path):
    done = command(f"vessel.{verb}", *GIVEN[verb], override, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {override.partition('=')[0]}=")


@pytest.mark.parametrize("verb", BAD)
def test_it_is_refused_before_heavy_imports(verb, tmp_path):
    code = (
        f"import sys; sys.argv = ['vessel.{verb}', *{[*GIVEN[verb], BAD[verb][0]]!r}]\n"
        f"from vessel.{verb} import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
