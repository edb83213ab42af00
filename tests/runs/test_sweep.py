import csv
import json
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.launching import command
from tests.wandb_offline import records

from vessel.runs.sweep import Job, _print, best_job, best_threshold, read_jobs, write_summary

CONF = Path(__file__).parents[2] / "conf"

# A Hydra app as vessel.train is one, without a network: Dice is 1 - |log10(lr) + 3| / 10.
APP = """
import json, math, pathlib, hydra
from hydra.core.hydra_config import HydraConfig
from vessel.cli.exits import report_errors
from vessel.errors import VesselError

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config):
    with report_errors():
        if config.optimizer.lr > 1:
            raise VesselError("optimizer.lr: too large; take less")
        if config.optimizer.lr < 0:
            raise ZeroDivisionError("a defect")
        dice = 1 - abs(math.log10(config.optimizer.lr) + 3) / 10
        line = json.dumps({"val/dice_best": dice, "val/threshold": 0.35})
        pathlib.Path(HydraConfig.get().runtime.output_dir, "metrics.jsonl").write_text(line)
        return dice

main()
"""
CONFIG = """
defaults: [_self_, {sweeper: null}, {launcher: null}]
name: toy
optimizer: {lr: 1e-3, weight_decay: 0.1}
loss: {dice_weight: 0.5}
hydra:
  sweep: {dir: "outputs/${name}/sweep_${now:%H-%M-%S-%f}", subdir: "${hydra.job.num}"}
  callbacks: {summary: {_target_: vessel.runs.sweep.SweepSummary}}
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/train.yaml").write_text(CONFIG)
    for group in ("sweeper", "launcher"):
        shutil.copytree(CONF / group, tmp_path / "conf" / group)

    def start(*options):
        command = [sys.executable, "app.py", "-m", *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    return start


def sweeps(folder):
    return sorted((folder / "outputs").glob("*/sweep_*"))


def job(number, dice, **facts):
    return Job(number, ("experiment=tiny", f"lora.r={number}"), dice, 0.5, f"outputs/s/{number}", **facts)


def test_best_job_is_the_first_with_the_highest_dice():
    assert best_job([job(0, None), job(1, 0.5), job(2, 0.7), job(3, 0.7)]) == job(2, 0.7)
    assert best_job([job(0, 0.0), job(1, None)]) == job(0, 0.0)
    assert best_job([job(0, None)]) is None


def test_threshold_is_that_of_the_best_validation(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert best_threshold(file) is None
    lines = [
        {"step": 0, "train/loss": 3.0},
        {"step": 5, "val/dice_best": 0.2, "val/threshold": 0.1},
        {"step": 9, "val/dice_best": 0.8, "val/threshold": 0.4},
        {"step": 14, "val/dice_best": None, "val/threshold": 0.6},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    assert best_threshold(file) is None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_threshold(file) == 0.4


def test_summary_files_show_what_sets_jobs_apart(tmp_path):
    write_summary([job(8, 0.91234), job(16, None), job(64, None, error="out of memory | GPU 0\nlonger")], tmp_path)
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["overrides"] for row in rows] == ["lora.r=8", "lora.r=16", "lora.r=64"]
    assert [row["val/dice_best"] for row in rows] == ["0.9123", "not validated", "failed: out of memory | GPU 0"]
    text = (tmp_path / "summary.md").read_text().splitlines()
    assert text[2] == "| 8 | lora.r=8 | 0.9123 | 0.50 | outputs/s/8 |"
    assert r"out of memory \| GPU 0" in text[4]
    assert text[-1] == "best: job 8, val/dice_best 0.9123, outputs/s/8; 1 of 3 jobs failed"


def test_a_grid_ends_with_its_table(app, tmp_path):
    done = app("optimizer.lr=0.1,0.001")
    assert done.returncode == 0, done.stderr
    [sweep] = sweeps(tmp_path)
    first, second = read_jobs(sweep)
    assert (first.overrides, second.overrides) == (("optimizer.lr=0.1",), ("optimizer.lr=0.001",))
    assert (first.dice, second.dice) == (pytest.approx(0.8), 1.0)
    assert second.threshold == 0.35
    assert second.folder == f"{sweep.relative_to(tmp_path)}/1"
    assert f"best: job 1, val/dice_best 1.0000, {second.folder}" in done.stdout
    assert (sweep / "summary.csv").is_file()


def test_failed_jobs_are_listed_and_stop_no_other(app, tmp_path):
    done = app("optimizer.lr=10,-1,0.001")
    assert done.returncode == 1
    assert done.stderr.count("error: optimizer.lr: too large; take less") == 1
    assert "ZeroDivisionError: a defect" in done.stderr
    assert "VesselError" not in done.stderr
    assert "best: job 2, val/dice_best 1.0000" in done.stdout
    errors = [job.error for job in read_jobs(sweeps(tmp_path)[0])]
    assert errors == ["optimizer.lr: too large; take less", "a defect", ""]


def test_a_sweep_over_folds_says_how_to_pool_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folds = [replace(job(number, 0.9), overrides=(f"data.fold={number}",)) for number in range(2)]
    _print(folds, tmp_path / "outputs/cv")
    assert "2 folds; pooled results: python -m vessel.evaluate folds=outputs/cv" in capsys.readouterr().out
    _print([job(8, 0.9), job(16, 0.8)], tmp_path / "outputs/cv")
    assert "folds" not in capsys.readouterr().out


def test_a_single_run_is_no_sweep(app, tmp_path):
    command = [sys.executable, "app.py", "optimizer.lr=10", "hydra.run.dir=one"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "error: optimizer.lr: too large; take less\n")
    assert not list(tmp_path.rglob("job.json"))


def test_a_search_goes_on_where_it_stopped(app, tmp_path):
    for _ in range(2):
        done = app("sweeper=optuna", "hydra.sweeper.n_trials=3")
        assert done.returncode == 0, done.stderr
    rates = [job.overrides for sweep in sweeps(tmp_path) for job in read_jobs(sweep)]
    assert len(rates) == len(set(rates)) == 6, "the second sitting repeats none of the first"
    with sqlite3.connect(tmp_path / "outputs/toy/optuna.db") as study:
        assert study.execute("select number, state from trials order by number").fetchall() == [
            (number, "COMPLETE") for number in range(6)
        ]
        [[highest]] = study.execute("select max(value) from trial_values")
    assert highest == max(job.dice for sweep in sweeps(tmp_path) for job in read_jobs(sweep))


def test_a_search_whose_first_trial_fails_stops(app, tmp_path):
    done = app("sweeper=optuna", "optimizer.lr=-1")
    assert done.returncode == 1
    assert "the first trial of the search has no result" in done.stderr
    assert "best: none; 1 of 1 jobs failed" in done.stdout
    assert len(read_jobs(sweeps(tmp_path)[0])) == 1


def test_jobs_of_submitit_are_summed_up_like_others(app, tmp_path):
    """In processes of their own, as on a cluster."""
    done = app("optimizer.lr=10,0.001", "launcher=local")
    assert done.returncode == 1, done.stderr
    first, second = read_jobs(sweeps(tmp_path)[0])
    assert (first.error, second.dice) == ("optimizer.lr: too large; take less", 1.0)
    assert "best: job 1, val/dice_best 1.0000" in done.stdout


def test_a_search_gives_its_trials_to_a_launcher(app, tmp_path):
    done = app("sweeper=optuna", "launcher=local", "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stderr
    assert [job.error for job in read_jobs(sweeps(tmp_path)[0])] == ["", ""]


def test_slurm_is_asked_for_what_the_configuration_says():
    from hydra import compose, initialize_config_dir
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=tiny", "launcher=slurm"], return_hydra_config=True)
    assert config.resume == "auto", "a job that was requeued goes on"
    launcher = dict(config.hydra.launcher)
    assert launcher.pop("_target_").endswith("SlurmLauncher")
    times = launcher.pop("max_num_timeout")
    launcher["time"] = launcher.pop("timeout_min")
    launcher["job_name"], launcher["mem"] = launcher.pop("name"), launcher.pop("mem_gb")
    launcher["ntasks_per_node"] = launcher.pop("tasks_per_node")
    launcher.pop("submitit_folder")
    script = _make_sbatch_string(command="train", folder="jobs", **launcher)
    for line in ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=4", "--time=1440", "--signal=USR2@300"):
        assert f"#SBATCH {line}\n" in script
    assert times > 0, "else submitit does not requeue what ran out of time"


@pytest.mark.slow
def test_training_sweep_has_a_wandb_run_per_job_in_one_group(tmp_path):
    def vessel(verb, *options):
        return command(f"vessel.{verb}", *options, cwd=tmp_path)

    size = ("synthetic.patients=3", "synthetic.frames=2", "synthetic.size=64")
    assert vessel("prepare", "source=synthetic", "out=data", *size).returncode == 0
    short = ("trainer.max_steps=1", "trainer.val_check_interval=1", "data.workers=0")
    done = vessel("train", "-m", "experiment=tiny", "data.root=data", "logger=wandb", "lora.r=8,16", *short)
    assert done.returncode == 0, done.stderr
    [sweep] = sweeps(tmp_path)
    jobs = read_jobs(sweep)
    assert [job.overrides[3] for job in jobs] == ["lora.r=8", "lora.r=16"]
    assert all(job.dice is not None and 0 < job.threshold < 1 for job in jobs)
    groups = [
        record.run.run_group
        for job in jobs
        for file in (tmp_path / job.folder).rglob("*.wandb")
        for record in records(file)
        if record.WhichOneof("record_type") == "run"
    ]
    assert groups == [sweep.name, sweep.name]
