"""The bench of true sizes goes its whole way at a tiny one, and loses nothing to a failure."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from bench.gpu import __main__ as gpu
from bench.gpu import chapters, prediction
from bench.gpu import trial as trials
from bench.gpu.report import report
from bench.gpu.trial import Trial
from bench.pieces import HEAD, LOSSES, pieces, step_loss
from bench.stopwatch import in_turns, matrix_rate
from tests.conftest import SIZES

from vessel.losses import NativeLoss
from vessel.memory_plan.engine import Engine
from vessel.memory_plan.plan import Images, Setup
from vessel.model.lora import Lora

CPU = torch.device("cpu")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Take a network that is smaller still than tiny."""
    setup = Setup(SIZES, Lora(r=8), "lora", NativeLoss(), Engine(), images=Images((64, 64)))
    monkeypatch.setattr(trials, "recipe", lambda name: setup)


def trial(device="cpu", **changes):
    fields = {"rounds": 1, "largest": 2, "until": time.monotonic() + 600, **changes}
    return Trial("tiny", torch.device(device), **fields)


@pytest.mark.slow
def test_without_a_gpu_it_prints_its_plan_and_writes_nothing(empty_folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main("size=tiny")
    printed = capsys.readouterr().out
    assert "nothing is measured" in printed
    assert re.search(r"tiny: training takes \d+\.\d GB with a batch of one", printed)
    assert "| language model | 0.00 + 0.00 |" in printed
    assert list(empty_folder.iterdir()) == []


def test_what_does_not_exist_is_named(empty_folder):
    with pytest.raises(SystemExit, match=r"'sise' .*size, device"):
        gpu.main("sise=tiny")
    with pytest.raises(SystemExit, match=r"device=tpu: "):
        gpu.main("device=tpu")
    with pytest.raises(SystemExit, match=r"conf/model .*huge$"):
        gpu.main("size=tiny,huge", "device=cpu")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_chapter_is_measured_and_reported(device, small, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(prediction, "IMAGES", 2)
    monkeypatch.setattr(prediction, "PHRASES", (2,))
    written = []
    chapters.measure(trial(device), lambda found: written.append(json.dumps(found)))
    assert len(written) == len(chapters.CHAPTERS)
    found = json.loads(written[-1])
    assert not [printed for printed in found.values() if "left_out" in printed]
    modes = [(row["mode"], row["batch"]) for row in found["training"]]
    assert modes == [(mode, n) for n in (1, 2) for mode in ("product", "reference", "product, cached features")]
    assert all(row["samples_per_second"] > 0 and len(row["seconds"]) == 1 for row in found["training"])
    assert found["parts"]["seconds"].keys() == found["operations"].keys()
    operators = [row["seconds"] for row in found["profile"]["operators"]]
    assert operators == sorted(operators, reverse=True)
    assert {(row["decode"], row["mode"]) for row in found["prediction"]} == {
        (decode, mode) for decode in ("forced", "generate") for mode in ("product", "reference")
    }
    page = "\n".join(report({"tiny": found}))
    for title in ("training", "training, checkpointing", "training, compiled", "prediction"):
        assert f"| {title} | " in page
    done = sum(found["operations"]["language model"]) * found["parts"]["batch"]
    share = done / found["parts"]["seconds"]["language model"]["both"] / found["machine"]["matrix_rate"]
    assert f"The language model does {share:.0%} of the matrix rate." in page
    assert all(row["operator"] in page for row in found["profile"]["operators"][:3])


def test_a_chapter_that_fails_takes_no_other_with_it(monkeypatch, capsys):
    def breaks(_trial):
        raise ValueError("a fault")

    def needs_more(_trial):
        raise torch.OutOfMemoryError("CUDA out of memory")

    chapters_of_test = {"broken": breaks, "large": needs_more, "good": lambda trial: trial.largest}
    monkeypatch.setattr(chapters, "CHAPTERS", chapters_of_test)
    written = []
    with pytest.raises(RuntimeError, match=r"tiny: broken"):
        chapters.measure(trial(), lambda found: written.append(dict(found)))
    assert written[-1] == {
        "model": "tiny",
        "broken": {"left_out": "it failed with ValueError"},
        "large": {"left_out": "the memory was too small"},
        "good": 2,
    }
    assert "a fault" in capsys.readouterr().err
    assert "large: left out, the memory was too small." in report({"tiny": written[-1]})


def test_the_measurements_are_reported_without_known_operations_too():
    row = {"mode": "product", "batch": 2, "seconds": [0.5], "samples_per_second": 4.0, "peak_gb": 1.5}
    parts = {"batch": 2, "seconds": {"language model": {"forward": 0.1, "both": 0.3}}}
    lines = report({"tiny": {"operations": {"left_out": "it failed"}, "training": [row], "parts": parts}})
    assert "| product | 2 | 4.00 | 1.5 | unknown |" in lines
    assert "| language model | 100.0 | 300.0 | 100% | 0.00 | unknown |" in lines


def test_nothing_begins_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(chapters, "CHAPTERS", {"good": lambda _trial: 1})
    written = []
    chapters.measure(trial(until=time.monotonic() - 1), written.append)
    assert written[-1]["good"] == {"left_out": "the time was over"}


def test_a_size_whose_process_dies_loses_neither_its_results_nor_the_others(empty_folder, monkeypatch, capsys):
    process = empty_folder / "process"  # in place of Python, called with -m bench.gpu one SIZE FILE
    process.write_text('#!/bin/sh\n[ $4 = internvl3_1b ] || echo "{\\"model\\": \\"$4\\"}" > "$5"\n[ $4 = tiny ]\n')
    process.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(process))
    with pytest.raises(SystemExit, match=r"^bench\.gpu: "):
        gpu.main("size=internvl3_1b,internvl3_2b,tiny", "device=cpu")
    ended = "the process ended with status 1"
    assert json.loads(Path("outputs/bench/gpu_rehearsal.json").read_text()) == {
        "internvl3_1b": {"model": "internvl3_1b", "ended": ended},
        "internvl3_2b": {"model": "internvl3_2b", "ended": ended},
        "tiny": {"model": "tiny"},
    }
    assert sorted(p.name for p in Path("outputs/bench").iterdir()) == ["gpu_rehearsal.json", "gpu_rehearsal.md"]
    assert capsys.readouterr().out.count(f"Not complete: {ended}.") == 2


def test_what_does_not_fit_is_left_out_and_the_others_run_in_turns():
    order = []

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {"a": lambda: order.append("a"), "large": too_large, "b": lambda: order.append("b")}
    times = in_turns(runs, CPU, rounds=2)
    assert order == ["a", "b", "a", "b", "a", "b"]  # the first of each warms up
    assert times.keys() == {"a", "b"}
    assert len(times["a"].seconds) == 2


def test_batches_grow_without_what_did_not_fit_the_last_one(small, monkeypatch):
    sizes, plain = [], chapters.reference.losses

    def too_large_for_two(network, batch, loss_function):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(network, batch, loss_function)

    monkeypatch.setattr(chapters.reference, "losses", too_large_for_two)
    one = trial(largest=4)
    rows = chapters.CHAPTERS["training, checkpointing"](one)
    modes = [("product", 1), ("reference", 1), ("product", 2), ("product", 4)]
    assert [(row["mode"], row["batch"]) for row in rows] == modes
    assert sizes == [1, 1, 2]


def test_another_error_than_of_memory_is_not_hidden():
    def breaks():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        in_turns({"a": breaks}, CPU, rounds=1)


def test_the_matrix_rate_is_that_of_a_processor():
    assert 1e7 < matrix_rate(CPU) < 1e15


def test_parts_have_the_losses_of_the_step(plan, make_batch):
    network, batch, loss_function = plan().build(), make_batch([["lumen"], ["lumen", "cap"]]), NativeLoss()
    parts = pieces(network, batch, loss_function)
    whole = step_loss(network, batch, loss_function)
    torch.testing.assert_close(parts[LOSSES]() + loss_function.lm_weight * parts[HEAD](), whole)
