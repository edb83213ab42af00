"""One run in several processes: who starts them, where they write, and how each of their ends is told."""

import errno
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf
from tests.launching import PATIENCE, SEARCH_PATH, SHORT, TRAIN, TWO_RANKS, of_folder, run, started, under_way, wait_for
from tests.trouble import trouble
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from vessel.errors import VesselError
from vessel.processes import signals
from vessel.processes.launch import _alone_in, _requeue, _tell, _torchrun
from vessel.processes.ranks import Rank, device_count, this_rank
from vessel.processes.signals import STOP_CODES


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No rank and no job of SLURM, whatever starts the tests."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "VESSEL_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("devices", "count"), [("1", 1), ("4", 4), ("[0]", 1), ("[2,3]", 2), ("'0,1,2'", 3), ("auto", 1), ("-1", 1)]
)
def test_devices_are_counted_as_lightning_counts_them(devices, count):
    from lightning import Trainer

    trainer = OmegaConf.create(f"{{accelerator: cpu, devices: {devices}}}")
    assert device_count(trainer.devices, trainer.accelerator) == count
    if devices in ("1", "4", "auto"):  # the others are for GPUs
        plain = OmegaConf.to_container(trainer)
        assert Trainer(**plain, logger=False, enable_checkpointing=False, barebones=True).num_devices == count


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, Rank(0, 1, "")),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4"}, Rank(3, 4, "torchrun")),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "VESSEL_PARENT": "7"}, Rank(1, 2, "vessel")),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "5"}, Rank(1, 2, "srun")),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "interactive"}, Rank(0, 1, "")),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, Rank(0, 1, "")),
    ],
)
def test_a_rank_knows_itself(monkeypatch, variables, rank):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_rank() == rank


def test_one_process_trains_in_a_folder(tmp_path):
    code = "from pathlib import Path; from vessel.processes.launch import _alone_in\nwith _alone_in(Path()): print(1)"
    with _alone_in(tmp_path):
        status, output = run("-c", code, cwd=tmp_path)
    assert status == 1
    assert "VesselError: .: another process is training there" in output
    assert run("-c", code, cwd=tmp_path) == (0, "1\n")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, number):
    def lockf(file, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with _alone_in(tmp_path):
        pass
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {tmp_path}: this file system has no locks (")
    assert said.count("\n") == 1
    number = errno.EACCES  # some say this for a lock that another process holds
    with pytest.raises(VesselError, match="another process is training there"), _alone_in(tmp_path):
        pass


def test_a_launch_leaves_nothing_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.getsignal(signal.SIGQUIT)
    failures = _torchrun(1, ("-c", "raise SystemExit(3)"))
    signal.signal(signal.SIGQUIT, before)
    assert failures[0].exitcode == 3
    assert list(tmp_path.iterdir()) == []


def failure(tmp_path, rank, code, note=None, seconds=0.0):
    """What torchrun's agent reports of a rank; `seconds` after the others."""
    file = tmp_path / f"error{rank}.json"
    if note is not None:
        text, told, echo = note
        extra = {"py_callstack": text, "timestamp": str(int(1000 + seconds))}
        facts = {"told": told, "echo": echo, "time": 1000 + seconds}
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}, **facts}))
    found = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(file))
    found.timestamp = int(1000 + seconds)
    return found


ECHO = ("RuntimeError: gloo/pair.cc: Connection closed by peer", False, True)


def test_the_first_own_error_is_told_and_no_echo_of_it(tmp_path, capsys):
    refused = {0: failure(tmp_path, 0, 1, ECHO), 1: failure(tmp_path, 1, 1, ("too large; take less", True, False), 0.5)}
    with pytest.raises(VesselError, match=r"^rank 1: too large; take less$"):
        _tell(refused, tmp_path)
    both = {
        0: failure(tmp_path, 0, 1, ("later", True, False), 0.5),
        1: failure(tmp_path, 1, 1, ("sooner", True, False)),
    }
    with pytest.raises(VesselError, match="rank 1: sooner"):
        _tell(both, tmp_path)
    trace = "Traceback (most recent call last):\n  a line\nZeroDivisionError: a defect\n"
    with pytest.raises(VesselError, match=r"^rank 0: ZeroDivisionError: a defect$"):
        _tell({0: failure(tmp_path, 0, 1, (trace, False, False))}, tmp_path)
    assert trace in capsys.readouterr().err


def test_a_killed_rank_is_told_even_when_others_noticed_sooner(tmp_path):
    """The agent looks at intervals; the others have failed by then."""
    own = ("RuntimeError: something that followed from it", False, False)
    with pytest.raises(VesselError, match=r"rank 1 was killed \(signal 9, SIGKILL\).*memory"):
        _tell({0: failure(tmp_path, 0, 1, own), 1: failure(tmp_path, 1, -9, seconds=0.2)}, tmp_path)
    with pytest.raises(VesselError, match="rank 0: ValueError"):  # the agent killed the other half a minute later
        _tell(
            {0: failure(tmp_path, 0, 1, ("ValueError", False, False)), 1: failure(tmp_path, 1, -9, None, 31)}, tmp_path
        )
    stuck = {0: failure(tmp_path, 0, 1, ECHO), 1: failure(tmp_path, 1, -9, None, 31)}
    with pytest.raises(VesselError, match=r"rank 0: RuntimeError: gloo.*; rank 1 stood still and had to be killed"):
        _tell(stuck, tmp_path)
    with pytest.raises(VesselError, match="rank 1 ended with status 7"):
        _tell({0: failure(tmp_path, 0, -15), 1: failure(tmp_path, 1, 7)}, tmp_path)


@pytest.mark.parametrize(
    ("codes", "status"), [((143, 143), 143), ((-15, 143), 143), ((138, -15), 138), ((-2, 130), 130), ((129, -1), 129)]
)
def test_a_stop_keeps_its_code(tmp_path, codes, status):
    with pytest.raises(SystemExit) as stop:
        _tell({rank: failure(tmp_path, rank, code, seconds=rank) for rank, code in enumerate(codes)}, tmp_path)
    assert stop.value.code == status


def test_a_job_of_slurm_is_requeued_by_the_first_rank(tmp_path, monkeypatch, capsys):
    _requeue([signal.SIG_DFL], Rank())  # no job, nothing happens
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    for index in (0, 1):
        with pytest.raises(SystemExit) as stop:
            _requeue([signal.SIG_DFL], Rank(index, 2, "srun"))
        assert stop.value.code == 0
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(SystemExit):
        _requeue([signal.SIG_DFL], Rank())
    assert (tmp_path / "asked").read_text() == "requeue 4711\nrequeue 40_2\n"
    tool.write_text("#!/bin/sh\nexit 1\n")
    _requeue([signal.SIG_DFL], Rank())
    assert "was not requeued" in capsys.readouterr().err


def test_submitits_own_handler_is_asked_first(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(SystemExit, match="77"):
        _requeue([signals._leave, lambda signum, frame: sys.exit(77)], Rank())


def test_signals_before_training_leave_at_once(tmp_path):
    wait = "print(1, flush=True); time.sleep(60)"
    code = f"import time; from vessel.processes.signals import leave_on_signals; leave_on_signals(); {wait}"
    for signum, status in STOP_CODES.items():
        with started("-c", code, cwd=tmp_path) as process:
            process.stdout.readline()
            process.send_signal(signum)
            assert process.communicate(timeout=30)[0] == ""
        assert process.returncode == status


def test_nohup_is_respected(tmp_path):
    code = (
        "import time; from vessel.processes.signals import leave_on_signals; leave_on_signals(); print(1, flush=True)"
    )
    command = ["nohup", sys.executable, "-c", f"{code}; time.sleep(60)"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143


def test_a_rank_does_not_outlive_its_parent(tmp_path):
    code = "from vessel.processes.ranks import die_with_parent; die_with_parent(); print(1, flush=True); time.sleep(60)"
    rank = f"import time; {code}"
    parent = (
        "import os, subprocess, sys; os.environ['VESSEL_PARENT'] = str(os.getpid());"
        f"subprocess.run([sys.executable, '-c', {rank!r}])"
    )
    with started("-c", parent, cwd=tmp_path) as process:
        process.stdout.readline()
        assert len(of_folder(tmp_path)) == 2
        process.kill()
        assert wait_for(lambda: not of_folder(tmp_path), seconds=10)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("VesselError('too large; take less')", "error: rank 1: too large; take less\n"),
        (
            "RuntimeError('gloo/pair.cc: Connection closed by peer')",
            "error: rank 1: waited in vain for another rank (",
        ),
        ("ZeroDivisionError('a defect')", "ZeroDivisionError: a defect\n"),
    ],
)
@pytest.mark.parametrize("started_by", ["torchrun", "vessel"])
def test_a_failed_rank_notes_its_error_and_ends_at_once(tmp_path, started_by, error, told):
    code = (
        "import atexit, pathlib, time; atexit.register(time.sleep, 60)\n"
        "from vessel.errors import VesselError; from vessel.processes.ranks import Rank, told_by_rank\n"
        f"with told_by_rank(Rank(1, 2, {started_by!r}), pathlib.Path('run')):\n"
        f"    print('a line of this rank'); raise {error}\n"
    )
    status, output = run("-c", code, cwd=tmp_path, env={"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    assert status == 1
    assert told in output if started_by == "torchrun" else output == "", "the parent tells it"
    assert (tmp_path / "run/ranks/1.log").read_text() == "a line of this rank\n"
    reported = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    with pytest.raises(VesselError, match=r"^rank 1: .*(too large; take less|closed by peer|a defect)"):
        _tell({1: reported}, tmp_path)


@pytest.mark.slow
def test_two_ranks_share_one_run_folder_and_speak_once(oct_set, tmp_path):
    status, output = run(*TRAIN, *SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=two", cwd=tmp_path)
    assert status == 0, output
    [folder] = (tmp_path / "outputs/two").iterdir()
    assert output.count("\nrun: outputs/two/") == output.count("global batch:") == 1
    assert {path.name for path in folder.glob("checkpoints/*")} >= {"last-000004.ckpt"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [0, 1, 2, 3]
    best = max(line["val/dice_best"] for line in lines if "val/dice_best" in line)
    assert json.loads((folder / "result.json").read_text())["best"] == pytest.approx(best)
    assert (folder / "train.log").read_text().count("global batch: 4 samples x 2 ranks") == 1
    settings = (folder / ".hydra/overrides.yaml").read_text()
    assert "trainer.devices=2" in settings, "the folder has the command that was given, not that of a rank"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("SIGKILL", "error: rank 1 was killed (signal 9, SIGKILL)"),
        ("refuse", "error: rank 1: a bad image; look at it\n"),
    ],
)
def test_a_rank_that_dies_takes_the_run_down_with_its_own_error(oct_set, tmp_path, what, told):
    begun = time.monotonic()
    command = (*TRAIN, *SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=short", "trainer.max_steps=500")
    status, output = run(*command, "trainer.val_check_interval=500", *trouble(what), cwd=tmp_path)
    assert status == 1
    assert told in output
    assert output.rstrip().rpartition("\n")[2].startswith(told.rstrip()), "its error is the last line"
    assert "Traceback" not in output, "no echo of the other rank"
    assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_run_in_time(oct_set, tmp_path):
    timeout = (
        "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, "
        "timeout: {_target_: datetime.timedelta, seconds: 6}}"
    )
    command = (*TRAIN, *SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=still", timeout)
    status, output = run(*command, *trouble("hang"), cwd=tmp_path)
    assert status == 1
    assert output.rstrip().rpartition("\n")[2].startswith("error: rank 0: ")
    assert "imed out" in output


@pytest.mark.slow
def test_nothing_is_left_of_a_run_whose_parent_is_killed(oct_set, tmp_path):
    command = (*TRAIN, *SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=night", "trainer.max_steps=500")
    with started(*command, "trainer.val_check_interval=400", *trouble("slow"), cwd=tmp_path) as process:
        assert wait_for(under_way("night", tmp_path, 1)), process.communicate(timeout=1)
        ranks = {pid for pid in of_folder(tmp_path) if "vessel.train" in psutil.Process(pid).cmdline()} - {process.pid}
        assert len(ranks) == 2
        process.kill()
        assert wait_for(lambda: not of_folder(tmp_path), seconds=20)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["one", "two"])
def test_a_terminal_that_is_closed_stops_the_run(oct_set, tmp_path, ranks):
    """The kernel sends SIGHUP, and writing to the terminal fails from then on; the progress bar writes all the time."""
    options = [option for option in SHORT if option != "~callbacks.progress"]
    place = (f"data.root={oct_set}", "name=ssh", "trainer.max_steps=500", "trainer.val_check_interval=400")
    command = (*TRAIN, *options, "trainer=cpu", *ranks, *place, *trouble("slow", rank=-1))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(
            sys.executable,
            [sys.executable, *command],
            {**os.environ, "PYTHONPATH": SEARCH_PATH, "OMP_NUM_THREADS": "1"},
        )
    try:
        assert wait_for(lambda: os.read(terminal, 4096) and under_way("ssh", tmp_path, 1)())
        os.close(terminal)
        assert wait_for(lambda: not of_folder(tmp_path), seconds=60)
    finally:
        for left in of_folder(tmp_path):
            os.kill(left, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 129
    assert len(list(tmp_path.glob("outputs/ssh/*/checkpoints/last-*.ckpt"))) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(commands, cwd):
    """Run two processes at the same time; their status and output."""
    (first, one), (second, two) = commands
    with started(*first, cwd=cwd, env=one) as a, started(*second, cwd=cwd, env=two) as b:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in (a, b)]
    return list(zip((a.returncode, b.returncode), outputs, strict=True))


@pytest.mark.slow
def test_two_nodes_of_torchrun_share_one_run_folder(oct_set, tmp_path):
    options = (*SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=nodes", "trainer.devices=1", "trainer.num_nodes=2")
    place = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--nproc-per-node=1")
    nodes = [(("-m", "torch.distributed.run", *place, f"--node-rank={node}", *TRAIN, *options), {}) for node in (0, 1)]
    (first, output), (second, quiet) = together(nodes, tmp_path)
    assert (first, second) == (0, 0), output + quiet
    assert len(list((tmp_path / "outputs/nodes").iterdir())) == 1
    assert output.count("\nrun: outputs/nodes/") == 1
    # torchrun of the second node may complain that the store of the first, which ended before it, is gone.
    assert "global batch" in output
    assert "global batch" not in quiet
    assert "run: " not in quiet


@pytest.mark.slow
def test_tasks_of_srun_share_one_run_folder(oct_set, tmp_path):
    options = (*TRAIN, *SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=tasks")
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "night", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [(options, {**job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}) for task in (0, 1)]
    (first, output), (second, quiet) = together(tasks, tmp_path)
    assert (first, second) == (0, 0), output + quiet
    assert [path.name for path in (tmp_path / "outputs/tasks").iterdir()] == ["slurm_4711_0"]
    assert quiet == ""


@pytest.mark.slow
def test_ranks_that_were_started_otherwise_than_configured_are_refused(oct_set, tmp_path):
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *TRAIN)
    status, output = run(*two, *SHORT, f"data.root={oct_set}", "trainer=cpu", cwd=tmp_path)
    assert status == 1
    assert "torchrun started 2 ranks, but trainer.devices=1" in output
    status, output = run(*two, "-m", *SHORT, f"data.root={oct_set}", "lora.r=0,8", cwd=tmp_path)
    assert "leave torchrun out" in output
    status, output = run(*TRAIN, *SHORT, f"data.root={oct_set}", "trainer.num_nodes=2", cwd=tmp_path)
    assert (status, output.count("error: trainer.num_nodes=2: start it with srun, or")) == (1, 1)


@pytest.mark.slow
def test_jobs_of_a_sweep_have_several_ranks_one_job_after_another(oct_set, tmp_path):
    jobs = ("name=sweep", "lora.r=0,8", *trouble("refuse", rank="${lora.r}"))  # r=0: rank 0 of the first job
    status, output = run(*TRAIN, "-m", *SHORT, *TWO_RANKS, f"data.root={oct_set}", *jobs, cwd=tmp_path)
    assert status == 1
    assert output.count("error: rank 0: a bad image; look at it") == 1
    [sweep] = (tmp_path / "outputs/sweep").iterdir()
    first, second = (json.loads((sweep / job / "job.json").read_text()) for job in "01")
    assert (first["error"], first["dice"]) == ("rank 0: a bad image; look at it", None)
    assert second["error"] == ""
    assert 0 < second["dice"] < 1
    assert 0 < second["threshold"] < 1


@pytest.mark.slow
def test_a_signal_ends_a_sweep_not_only_its_job(oct_set, tmp_path):
    jobs = ("name=sweep", "lora.r=0,8", *trouble("SIGTERM", rank=0))
    status, output = run(*TRAIN, "-m", *SHORT, f"data.root={oct_set}", "trainer=cpu", *jobs, cwd=tmp_path)
    assert status == 143, output
    [sweep] = (tmp_path / "outputs/sweep").iterdir()
    assert (sweep / "0/checkpoints/last-000002.ckpt").is_file()
    assert not Path(sweep / "1").exists()
