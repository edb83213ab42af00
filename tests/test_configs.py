"""Every shipped configuration composes, fits what it is made for, and refuses a typo at any depth."""

import inspect
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from tests.launching import command

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PRIMARIES = sorted(file.stem for file in CONF.glob("*.yaml"))
CHOICES = sorted(
    f"{file.parent.relative_to(CONF).as_posix()}={file.stem}"
    for file in CONF.glob("*/**/*.yaml")
    if file.relative_to(CONF).parts[0] not in ("hydra", "sam2", "sweeper", "launcher")
)
SAM2 = sorted(file.stem for file in CONF.glob("sam2/*.yaml"))
EXPERIMENTS = [choice for choice in CHOICES if choice.startswith("experiment=")]
LAUNCHERS = {"": "basic", "slurm": "submitit_slurm", "local": "submitit_local"}
HYDRAS_OWN = {"_target_", "_partial_", "_convert_", "_recursive_"}


@pytest.fixture(autouse=True)
def _fresh_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str, primary: str = "train") -> DictConfig:
    return compose(primary, list(overrides))


def targets(node: object, key: str = "") -> Iterator[tuple[str, dict]]:
    """Nodes with a `_target_`, and their full keys; interpolations stay as they are."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, child in node.items():
            yield from targets(child, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for position, child in enumerate(node):
            yield from targets(child, f"{key}[{position}]")


def documented() -> Iterator[tuple[str, str, str]]:
    """File, command and options of the lines in the comments and help texts of the configuration and in the README."""
    for file in [*sorted(CONF.rglob("*.yaml")), ROOT / "README.md"]:
        text = file.read_text().replace("\\\n", " ")
        text = re.sub(r"<(\w+)>", r"\1", text)  # a placeholder, which Hydra's grammar would not take
        for verb, rest in re.findall(
            r"python -m vessel\.(\w+)((?: [^\n`#]*=[^\n`#]*?)?)(?: +#.*)?$", text, flags=re.MULTILINE
        ):
            if not re.search(r"\[option|…|\||=NAME", rest):
                yield file.name, verb, rest.strip()


@pytest.mark.parametrize("primary", PRIMARIES)
def test_primary_composes(primary):
    assert composed(primary=primary)


@pytest.mark.parametrize("primary", PRIMARIES)
def test_defaults_end_with_what_overrides(primary):
    defaults = yaml.safe_load((CONF / f"{primary}.yaml").read_text())["defaults"]
    place = defaults.index("_self_")
    names = [entry if entry == "_self_" else next(iter(entry)) for entry in defaults]
    after = [name for name in names[place + 1 :] if not name.startswith("override ")]
    assert after == (["experiment", "sweeper", "launcher"] if primary == "train" else [])


@pytest.mark.parametrize("choice", [*CHOICES, *(f"sam2@model.grounding={size}" for size in SAM2)])
def test_choice_composes_and_binds(choice):
    """Every key is a parameter of its target, so that a typo cannot be swallowed."""
    config = composed(*(["model=internvl3_1b"] if choice.startswith("sam2@") else []), choice)
    found = dict(targets(OmegaConf.to_container(config, resolve=False)))
    assert found
    for key, node in found.items():
        signature = inspect.signature(get_object(node["_target_"]))
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        keys = set(node) - HYDRAS_OWN
        signature.bind_partial(**dict.fromkeys(keys))
        if node["_target_"].startswith("vessel."):
            assert inspect.Parameter.VAR_KEYWORD not in kinds, key
        else:
            assert keys <= set(signature.parameters), key


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_wins_over_the_defaults(experiment):
    name = experiment.partition("=")[2]
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n# python -m vessel.train experiment={name}")
    assert composed(experiment).name == yaml.safe_load(text)["name"] == name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_learning_rate_is_that_of_what_training_starts_from(experiment):
    config = composed(experiment)
    assert config.optimizer.lr == (4e-5 if config.weights else 6e-4)


def test_without_an_experiment_the_small_network_trains_from_random_weights():
    bare, tiny = composed("data.root=x"), composed("experiment=tiny", "data.root=x")
    assert list(bare.weights) == []
    for group in ("model", "prompt", "lora", "optimizer", "trainable"):
        assert bare[group] == tiny[group]
    assert bare.trainer.max_epochs == 10


def test_lora_serves_any_data_set_and_any_rank():
    config = composed("experiment=lora_r128")
    assert OmegaConf.is_missing(config.data, "root")
    assert (config.data.phrases, config.lora.r) == (None, 128)
    assert composed("experiment=lora_r64", "lora.r=32").lora.r == 32
    assert composed("experiment=lora_r128", "data=oct1220").data.phrases == ["blood vessel"]


def test_debug_goes_on_top_of_an_experiment():
    alone, above = composed("experiment=debug"), composed("experiment=[lora_r128,debug]")
    assert (above.lora.r, above.data.repeats, above.name) == (128, 10, "debug")
    for config in (alone, above):
        assert (config.trainer.detect_anomaly, config.data.workers) == (True, 0)
        assert config.trainer.limit_train_batches == config.trainer.limit_val_batches == 2


def test_callbacks_are_chosen_one_by_one():
    default, minimal = composed().callbacks, composed("callbacks=minimal").callbacks
    files = {file.stem for file in CONF.glob("callbacks/*.yaml")} - {"default", "minimal"}
    assert set(default) == files > set(minimal)
    assert {"step_seeds", "first_step_check", "non_finite_stop", "checkpoint", "last_checkpoint"} <= set(minimal)
    assert all(minimal[name] == default[name] for name in minimal)
    assert set(composed("callbacks=[minimal,progress]").callbacks) == {*minimal, "progress"}
    assert composed("callbacks.early_stopping=null").callbacks.early_stopping is None


def test_files_of_the_users_own_work_from_any_folder(tmp_path):
    """An experiment, and an augmentation with a transform that vessel does not ship."""
    for group in ("experiment", "data/augmentation"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine/experiment/night.yaml").write_text(
        "# @package _global_\ndefaults:\n  - lora_r64\n  - override /data/augmentation: elastic\n"
        "  - override /trainer: gpu\nname: night\nlora:\n  r: 16\n"
    )
    (tmp_path / "mine/data/augmentation/elastic.yaml").write_text(
        "_target_: vessel.data.transforms.Augmentation\ntransforms:\n"
        "  - _target_: albumentations.ElasticTransform\n    alpha: 30\n    p: 0.5\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run("train", "--config-dir", "../mine", "experiment=night", "data.root=x", "--cfg", "job", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout)
    assert (config.name, config.lora.r, config.trainer.accelerator) == ("night", 16, "gpu")
    [elastic] = instantiate(config.data.augmentation, _convert_="all")._compose.transforms
    assert (type(elastic).__name__, elastic.alpha) == ("ElasticTransform", 30.0)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_search_composes_with_every_launcher(launcher):
    options = ["experiment=tiny", "sweeper=optuna", *([f"launcher={launcher}"] if launcher else [])]
    config = compose("train", options, return_hydra_config=True)
    assert config.hydra.runtime.choices["hydra/launcher"] == LAUNCHERS[launcher]
    sweeper = config.hydra.sweeper
    assert (sweeper.direction, sweeper.n_trials, sweeper.study_name) == ("maximize", 20, "tiny")
    assert (sweeper.sampler._target_, sweeper.sampler.seed) == ("optuna.samplers.TPESampler", 0)
    for key in sweeper.params:
        assert OmegaConf.select(config, key, throw_on_missing=True) is not None


def test_documented_commands_compose():
    commands = list(documented())
    of_readme = [verb for file, verb, _ in commands if file == "README.md"]
    assert set(of_readme) == {"prepare", "train", "evaluate", "predict", "export"}
    assert len(of_readme) == (ROOT / "README.md").read_text().count("python -m vessel.") >= 10
    parser = OverridesParser.create()
    for _, verb, line in commands:
        words = shlex.split(line)
        values = []
        for override in parser.parse_overrides([word for word in words if word != "-m"]):
            assert "-m" in words or not override.is_sweep_override(), line
            key, sweep = override.input_line.partition("=")[0], override.is_sweep_override()
            values += [f"{key}={next(override.sweep_string_iterator())}" if sweep else override.input_line]
        assert composed(*values, primary=verb), line


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "model.language",
        "prompt",
        "lora",
        "loss",
        "optimizer",
        "data",
        "data.augmentation",
        "trainer",
        "callbacks.threshold_sweep",
    ],
)
def test_a_typo_in_a_file_fails_with_its_full_key(key):
    """As in an experiment of the user's own, where Hydra lets a new key pass."""
    config = composed("experiment=tiny", "data.root=somewhere", f"+{key}.typo=1")
    group = "callbacks.threshold_sweep" if key.startswith("callbacks") else key.split(".")[0]
    with pytest.raises(InstantiationException) as caught:
        instantiate(OmegaConf.select(config, group))
    assert re.search(r"unexpected keyword argument .?'typo'", str(caught.value))
    assert f"full_key: {key}\n" in f"{caught.value}\n"


def run(verb: str, *overrides: str, cwd: Path | str = ".") -> subprocess.CompletedProcess:
    return command(f"vessel.{verb}", *overrides, cwd=cwd)


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("prepare", "sourc"),
        ("prepare", "synthetic.patient"),
        ("train", "sed"),
        ("train", "model.language.witdh"),
        ("train", "callbacks.checkpoint.monitr"),
        ("evaluate", "data.rot"),
        ("predict", "treshold"),
        ("export", "dtyp"),
    ],
)
def test_a_typo_on_the_command_line_fails_with_its_full_key(verb, key):
    done = run(verb, f"{key}=1")
    assert done.returncode == 1
    assert key in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("override", ["loss=nine", "experiment=tinny", "lora=[r8"])
def test_an_unknown_choice_fails_without_traceback(override):
    done = run("train", override)
    assert done.returncode == 1
    assert override.partition("=")[2] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("verb", PRIMARIES)
def test_a_new_key_at_the_root_fails_without_traceback(verb, tmp_path):
    """`+` tells Hydra to accept a key; the command still refuses what nothing reads."""
    done = run(verb, "+nonsense=1", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr
