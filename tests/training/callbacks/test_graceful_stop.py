"""Signals during training: one process in this one, two ranks in processes of their own."""

import errno
import json
import os
import pty
import signal
import subprocess
import time

import pytest
from tests.launching import SHORT, TRAIN, TWO_RANKS, of_folder, run, started, under_way, wait_for
from tests.trouble import trouble

from vessel.paths import hydra_option
from vessel.processes.signals import STOP_CODES
from vessel.training.callbacks.graceful_stop import GracefulStop, _Terminal

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _own_handlers():
    """Restore the handlers: a process that stops keeps its own until it has ended, and this one goes on."""
    kept = {s: signal.getsignal(s) for s in STOP_CODES}
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


def records(run_folder, name):
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def checkpoints(run_folder):
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGUSR2", 138), ("SIGHUP", 129)]
)
def test_a_signal_stops_after_the_step_with_a_checkpoint(train_tiny, tmp_path, capfd, name, code):
    with pytest.raises(SystemExit) as stop:
        train_tiny(tmp_path, "trainer.val_check_interval=3", *trouble(name, rank=0))
    assert stop.value.code == code
    saved = f"saved {os.path.relpath(tmp_path)}/checkpoints/last-000002.ckpt; go on with: python -m vessel.train "
    assert f"{saved}{hydra_option('resume', tmp_path)}\n" in capfd.readouterr().out
    assert checkpoints(tmp_path) == ["last-000002.ckpt"]
    assert sorted(records(tmp_path, "train/loss")) == [0, 1], "the step in which the signal came is logged too"


def test_a_signal_after_the_last_step_is_not_lost(train_tiny, tmp_path):
    """Else a sweep would begin its next job."""
    with pytest.raises(SystemExit) as stop:
        train_tiny(tmp_path, *trouble("SIGTERM", rank=0, step=4))
    assert stop.value.code == 143
    assert "last-000004.ckpt" in checkpoints(tmp_path)


def test_a_signal_while_ranks_agree_at_the_end_is_not_lost(monkeypatch):
    stop = GracefulStop()

    def agreed(trainer):
        stop._receive(signal.SIGTERM, None)
        return 0

    monkeypatch.setattr(stop, "_agreed", agreed)
    with pytest.raises(SystemExit, match="143"):
        stop.on_train_end(None, None)


def test_no_step_is_left_half_accumulated(train_tiny, tmp_path):
    """Of two batches of a step, the signal comes with the first."""
    options = ("trainer.accumulate_grad_batches=2", "data.batch_size=1", "trainer.val_check_interval=6")
    with pytest.raises(SystemExit):
        train_tiny(tmp_path, *options, *trouble("SIGTERM", rank=0))
    assert checkpoints(tmp_path) == ["last-000002.ckpt"]


@pytest.mark.parametrize("validation", [False, True], ids=["before validation", "during it"])
def test_a_validation_that_was_due_is_made_up_for(train_tiny, tmp_path, validation):
    where = {"rank": 0, "step": 2 if validation else 1, "validation": validation}
    options = ("seed=3", "optimizer.warmup=0.0", "+optimizer.final=1.0")
    train_tiny(tmp_path / "whole", *options)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", *options, *trouble("SIGTERM", **where))
    assert checkpoints(tmp_path / "run") == ["last-000002.ckpt"]
    assert records(tmp_path / "run", "val/dice_best") == {}
    train_tiny(tmp_path / "run", *options, "resume=auto")
    for metric in ("train/loss", "val/loss", "val/dice_best"):
        assert records(tmp_path / "run", metric) == records(tmp_path / "whole", metric), metric
    assert (tmp_path / "run/metrics.jsonl").read_text().count("val/dice_best") == 2, "no validation is done twice"


def test_a_run_that_ends_gives_the_signals_back(train_tiny, tmp_path):
    before = {s: signal.getsignal(s) for s in STOP_CODES}
    train_tiny(tmp_path, "trainer.max_steps=1", "trainer.val_check_interval=1")
    assert {s: signal.getsignal(s) for s in before} == before
    with pytest.raises(ZeroDivisionError):
        train_tiny(tmp_path / "failed", *trouble("fail", rank=0))
    assert {s: signal.getsignal(s) for s in before} == before


def test_without_a_last_checkpoint_nothing_is_saved(train_tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_tiny(tmp_path, "~callbacks.last_checkpoint", *trouble("SIGTERM", rank=0, step=0))
    assert "nothing was saved" in capsys.readouterr().out


def test_ranks_agree_when_only_one_received_the_signal(oct_set, tmp_path):
    """The other rank would wait for ever in the next step, had they not agreed."""
    options = (*SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=one", "trainer.val_check_interval=3")
    status, output = run(*TRAIN, *options, *trouble("SIGUSR1"), cwd=tmp_path)
    assert status == 138, output
    [folder] = (tmp_path / "outputs/one").iterdir()
    assert output.count("stopped by SIGUSR1 after step 2") == 1
    assert checkpoints(folder) == ["last-000002.ckpt"]


def test_ctrl_c_saves_and_ends_every_rank(oct_set, tmp_path):
    options = (*SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=night", "trainer.max_steps=500", *trouble("slow"))
    with started(*TRAIN, *options, "trainer.val_check_interval=400", cwd=tmp_path) as process:
        assert wait_for(under_way("night", tmp_path, 1)), process.communicate(timeout=1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate(timeout=120)[0]
        assert wait_for(lambda: not of_folder(tmp_path), seconds=10)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    [folder] = (tmp_path / "outputs/night").iterdir()
    assert len(checkpoints(folder)) == 1


def test_a_second_ctrl_c_waits_for_nothing(oct_set, tmp_path):
    """One rank stands still, so that the first cannot end the step."""
    options = (*SHORT, *TWO_RANKS, f"data.root={oct_set}", "name=still", *trouble("hang", step=2))
    with started(*TRAIN, *options, "trainer.val_check_interval=4", cwd=tmp_path) as process:
        assert wait_for(under_way("still", tmp_path, 1)), process.communicate(timeout=1)
        time.sleep(3)  # into the step that one rank does not take
        os.killpg(process.pid, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=15)[0]
        assert wait_for(lambda: not of_folder(tmp_path), seconds=10)
    assert process.returncode == 130, output
    assert "Traceback" not in output


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_spares_the_loaders_workers(oct_set, tmp_path, signum):
    """Terminals and schedulers signal every process; without its workers the step could not end. Those of the
    validation wait for their next turn then, and the process must not wait for them."""
    options = (*SHORT, "trainer=cpu", f"data.root={oct_set}", "name=alone", "trainer.max_steps=500", "data.workers=1")
    with started(*TRAIN, *options, "trainer.val_check_interval=1", *trouble("slow"), cwd=tmp_path) as process:
        assert wait_for(under_way("alone", tmp_path, 1)), process.communicate(timeout=1)
        os.killpg(process.pid, signum)
        output = process.communicate(timeout=120)[0]
        assert wait_for(lambda: not of_folder(tmp_path), seconds=10), "a worker is left behind"
    assert process.returncode == 128 + signum, output
    assert "Traceback" not in output
    [folder] = (tmp_path / "outputs/alone").iterdir()
    assert sum(name.startswith("last") for name in checkpoints(folder)) == 1


def test_a_terminal_that_closes_while_it_is_written_to_does_not_end_the_run():
    """The write fails before the handler of the signal has run."""
    master, slave = pty.openpty()
    stream = open(slave, "w")  # noqa: SIM115  # closed below, which fails
    terminal = _Terminal(stream)
    terminal.write("epoch 1")
    terminal.flush()
    assert os.read(master, 100) == b"epoch 1"
    os.close(master)
    stream.write("epoch 2")
    with pytest.raises(OSError) as closed:  # noqa: PT011  # the number of the error is what is tested
        stream.flush()
    assert closed.value.errno == errno.EIO
    terminal.write("epoch 3")
    terminal.flush()
    with pytest.raises(OSError) as closed:  # noqa: PT011
        stream.close()
    assert closed.value.errno == errno.EIO
