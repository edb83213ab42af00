"""The run folder that `resume=` finds before Hydra starts, and the stamp that all ranks agree on."""

import fcntl
import json
import os
import shlex
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tests.launching import command

from vessel.cli.argv import complete_argv
from vessel.errors import VesselError
from vessel.paths import hydra_option, hydra_quoted
from vessel.processes.ranks import Rank, agree_on_stamp

GIVEN = ("experiment=tiny", "data.root=data", "name=night")
KEPT = "hydra.output_subdir=null"  # the record of the run stays as it is


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """Hide the ranks and the job of SLURM that may start the tests, and work in an empty folder."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "VESSEL_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    GlobalHydra.instance().clear()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def added_words(monkeypatch):
    """Return a function that returns the words that `complete_argv` adds to a command line."""

    def run(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["vessel.train", *options])
        complete_argv()
        assert not GlobalHydra.instance().is_initialized()
        return [word for word in sys.argv[1:] if word not in options]

    return run


@pytest.fixture
def begun(added_words):
    """Return a function that writes a run which began some seconds ago, as Hydra records it."""
    from hydra import compose, initialize_config_dir

    from vessel.cli.conf import CONF

    def begin(folder: str, *options: str, ago: float, saved: bool = True) -> Path:
        with initialize_config_dir(CONF, version_base="1.3"):
            config = compose("train", [*GIVEN, *options])
        record = Path("outputs/night") / folder / ".hydra"
        record.mkdir(parents=True)
        OmegaConf.save(config, record / "config.yaml")
        OmegaConf.save(OmegaConf.create([*GIVEN, *options]), record / "overrides.yaml")
        os.utime(record / "config.yaml", (time.time() - ago,) * 2)
        (record.parent / "checkpoints").mkdir()
        (record.parent / "checkpoints" / ("last-000002.ckpt" if saved else ".last-000002.ckpt.part")).touch()
        return record.parent

    return begin


def test_the_newest_run_of_the_same_settings_goes_on(added_words, begun, capsys):
    begun("a", ago=300)
    begun("b", ago=200)
    begun("c", "optimizer.lr=0.5", ago=100)
    assert added_words(*GIVEN, "resume=auto") == ["hydra.run.dir='outputs/night/b'", KEPT]
    assert capsys.readouterr().out == "resume=auto: goes on in outputs/night/b\n"
    assert added_words(*GIVEN, "resume=auto", "optimizer.lr=0.5") == ["hydra.run.dir='outputs/night/c'", KEPT]


def test_a_run_with_a_checkpoint_goes_on_before_a_newer_one_without(added_words, begun, capsys):
    begun("c", ago=100, saved=False)
    begun("b", ago=200, saved=False)
    assert added_words(*GIVEN, "resume=auto")[0] == "hydra.run.dir='outputs/night/c'"
    assert capsys.readouterr().out == "resume=auto: starts again in outputs/night/c, which has no checkpoint\n"
    begun("a", ago=300)
    assert added_words(*GIVEN, "resume=auto")[0] == "hydra.run.dir='outputs/night/a'"
    assert capsys.readouterr().out == "resume=auto: goes on in outputs/night/a\n"


@pytest.mark.parametrize("text", ["", "- a\n- list\n", "key: [1,\n", "\0\0\0", "name: ${a"])
def test_a_record_that_cannot_be_read_is_passed_over(added_words, begun, capsys, text):
    begun("a", ago=300)
    run = begun("b", ago=200)
    (run / ".hydra/config.yaml").write_text(text)
    assert added_words(*GIVEN, "resume=auto")[0] == "hydra.run.dir='outputs/night/a'"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("resume=auto: outputs/night/b is skipped: outputs/night/b/.hydra/config.yaml ")
    assert second == "resume=auto: goes on in outputs/night/a"
    with pytest.raises(VesselError, match=r"config\.yaml .*hydra\.run\.dir='outputs/night/b'"):
        added_words(f"resume={run}")


@pytest.mark.parametrize(
    "option",
    ["trainer=cpu", "trainer.devices=4", "trainer.strategy=ddp", "trainer.strategy={stage: 2}", "trainer.max_steps=7",
     "+trainer.enable_progress_bar=false", "logger=tensorboard", "~callbacks.progress", "data.workers=3", "force=true",
     "gpu_gb=48", "activation_checkpointing=true"],
)  # fmt: skip
def test_how_a_run_runs_may_change(added_words, begun, option):
    begun("a", ago=300)
    assert added_words(*GIVEN, option, "resume=auto") == ["hydra.run.dir='outputs/night/a'", KEPT]


@pytest.mark.parametrize(
    ("option", "difference"),
    [("data.batch_size=7", "data.batch_size=7"), ("seed=5", "seed=5 (there 0)"), ("lora.r=8", "lora.r=8"),
     ("weights=[base]", "weights=['base'] (there [])"), ("ckpt=some", "ckpt=some (there None)"),
     ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=2 (there 1)"),
     ("trainer=gpu", "trainer.precision=bf16-mixed"), ("trainer.gradient_clip_val=null", "clip_val=None (there 1.0)")],
)  # fmt: skip
def test_what_a_run_computes_may_not(added_words, begun, capsys, option, difference):
    begun("a", ago=300)
    assert added_words(*GIVEN, option, "resume=auto") == []
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("resume=auto: a new run begins; the newest, outputs/night/a, has other settings: ")
    assert difference in line
    assert line.endswith(": resume=outputs/night/a")


def test_without_any_run_one_begins(added_words, capsys):
    assert added_words(*GIVEN, "resume=auto") == []
    assert capsys.readouterr().out == ""


def test_a_named_run_goes_on_with_its_own_options(added_words, begun, capsys):
    run = begun("a", "seed=5", "optimizer.lr=0.5", ago=300)
    added = added_words(f"resume={run}", "optimizer.lr=0.5")
    assert added == [*GIVEN, "seed=5", f"hydra.run.dir='{run}'", KEPT]
    assert sys.argv.index("seed=5") < sys.argv.index(f"resume={run}"), "what is given now may undo an own option"
    begun("it's b", "+callbacks.trouble.x=1", ago=200)
    assert added_words("resume='outputs/night/it\\'s b'", "~callbacks.trouble")[-2:] == [
        "hydra.run.dir='outputs/night/it\\'s b'",
        KEPT,
    ]
    assert capsys.readouterr().out == ""
    added_words(f"resume={run}", "optimizer.lr=0.1")
    assert "other settings than it had: optimizer.lr=0.1 (there 0.5)" in capsys.readouterr().out
    with pytest.raises(VesselError, match=r"^resume=outputs/night: .*ckpt="):
        added_words("resume=outputs/night")


@pytest.mark.parametrize(
    "options",
    [("--help",), ("--cfg", "job"), ("-m", "lora.r=0,8", "hydra.sweep.dir=here"), ("hydra.run.dir=here",)],
    ids=lambda options: options[0],
)
def test_nothing_is_settled_where_there_is_nothing_to(added_words, begun, capsys, options):
    begun("a", ago=300)
    assert added_words(*options, *GIVEN, "resume=auto") == []
    assert added_words(*GIVEN, "resume=null") == []
    assert capsys.readouterr().out == ""


def test_a_sweep_goes_on_in_its_own_folder_only(added_words, begun, capsys):
    run = begun("a", ago=300)
    for options in ((), ("lora.r=0,8", "optimizer.lr=interval(1e-5,1e-3)"), ("launcher=slurm",)):
        assert added_words("-m", *GIVEN, *options, "resume=auto") == []
        assert "hydra.sweep.dir=outputs/<name>/sweep_<time>" in capsys.readouterr().out
    for options in (("-m", "lora.r=0,8"), ("hydra.run.dir=there",)):
        with pytest.raises(VesselError, match=rf"^resume=outputs/night/a .* {options[0][:9]}.*resume=auto"):
            added_words(*options, *GIVEN, f"resume={run}")


def test_an_experiment_may_say_where_it_goes_on(added_words, begun, tmp_path):
    """In its YAML, found by --config-dir; what is on the command line goes before."""
    run = begun("a", "seed=5", ago=300)
    (tmp_path / "mine/experiment").mkdir(parents=True)
    experiment = tmp_path / "mine/experiment/again.yaml"
    given = ("--config-dir", "mine", "experiment=again", *GIVEN[1:])
    begins = "# @package _global_\ndefaults:\n  - tiny\n"
    for resume in ("auto", run):
        experiment.write_text(f"{begins}seed: 5\nresume: {resume}\n")
        assert added_words(*given)[-2:] == [f"hydra.run.dir='{run}'", KEPT]
        assert added_words(*given, "resume=null") == []
    with pytest.raises(VesselError, match=r" -m, .*resume=auto"):
        added_words("-m", *given, "lora.r=0,8")


def test_a_named_run_has_its_config_dir_with_it(added_words, tmp_path):
    """As Hydra records it; the line of a run that was stopped names the folder only."""
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/again.yaml").write_text("# @package _global_\ndefaults:\n  - tiny\nseed: 5\n")
    done = command("vessel.train", "--config-dir", "mine", "experiment=again", "trainer.num_nodes=2")
    assert "num_nodes=2: start it with" in done.stderr
    [run] = tmp_path.glob("outputs/*/*")
    added = added_words(f"resume={run}")
    assert added[:4] == ["experiment=again", "trainer.num_nodes=2", f"hydra.run.dir={str(run)!r}", KEPT]
    assert added[-2:] == ["--config-dir", str(tmp_path / "mine")]


def test_a_job_of_a_sweep_goes_on_when_it_is_named(added_words, tmp_path):
    command("vessel.train", "-m", *GIVEN, "lora.r=0,8", "trainer.num_nodes=2")
    [run] = tmp_path.glob("outputs/night/sweep_*/1")
    added = added_words(hydra_option("resume", run))
    assert set(added) == {*GIVEN, "lora.r=8", "trainer.num_nodes=2", f"hydra.run.dir='{os.path.relpath(run)}'", KEPT}


def test_a_refused_command_leaves_the_record_as_it_was(begun):
    """Refused by the lock, which this process holds; later `resume=auto` would compare with the refused settings."""
    run = begun("a", ago=300)
    record = {file: file.read_text() for file in (run / ".hydra").iterdir()}
    with (run / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = command("vessel.train", f"resume={run}", "optimizer.lr=0.7")
    assert done.returncode == 1
    assert "another process is training there" in done.stderr
    assert {file: file.read_text() for file in (run / ".hydra").iterdir()} == record


def test_options_stay_in_one_row(added_words, begun, monkeypatch):
    """Hydra's parser takes no override after a flag that follows overrides."""
    begun("a", ago=300)
    added_words(*GIVEN, "resume=auto", "--config-name", "train")
    assert sys.argv[4:] == ["resume=auto", "hydra.run.dir='outputs/night/a'", KEPT, "--config-name", "train"]


def test_a_mistake_in_other_options_is_left_to_hydra(added_words, begun):
    begun("a", ago=300)
    assert added_words("experiment=tinny", "name=night", "resume=auto") == []
    assert added_words(*GIVEN, "optimizer.lrr=1", "resume=auto") == []


def test_a_requeued_job_goes_on(added_words, begun, monkeypatch):
    begun("a", ago=300)
    assert added_words(*GIVEN) == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert added_words(*GIVEN) == ["resume=auto", "hydra.run.dir='outputs/night/a'", KEPT]
    assert added_words(*GIVEN, "resume=null") == []


def test_other_ranks_write_no_log_file_and_no_settings(added_words, monkeypatch):
    job = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert added_words(*GIVEN) == ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
    assert os.environ.pop("VESSEL_STAMP") == "slurm_4711_0"
    with pytest.raises(VesselError, match=r"^-m .*srun"):
        added_words("-m", *GIVEN)


def test_ranks_of_torchrun_agree_by_the_store_of_its_agent(monkeypatch):
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    stamps = [agree_on_stamp(Rank(index, 3, "torchrun")) for index in (0, 1, 2)]
    assert len(set(stamps)) == 1
    assert time.strptime(stamps[0], "%Y-%m-%d_%H-%M-%S")


@pytest.mark.parametrize("name", ["plain/run", "with blank, comma=equals", "it's", "back\\slash"])
def test_any_folder_can_be_given_to_hydra(name):
    [override] = OverridesParser.create().parse_overrides([f"hydra.run.dir={hydra_quoted(Path(name))}"])
    value = override.value()
    assert getattr(value, "text", value) == name
    [typed] = shlex.split(hydra_option("resume", Path(name)))
    [override] = OverridesParser.create().parse_overrides([typed])
    value = override.value()
    assert getattr(value, "text", value) == name


def test_configuration_is_printed_and_nothing_else(tmp_path):
    """`resume=auto` would otherwise search for runs, and print what it found."""
    done = command("vessel.train", *GIVEN, "resume=auto", "--cfg", "job", "--package", "optimizer")
    assert done.returncode == 0, done.stderr
    assert "resume" not in done.stdout
    assert json.loads(json.dumps(OmegaConf.to_container(OmegaConf.create(done.stdout))))
