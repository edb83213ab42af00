"""A run that was stopped and goes on computes, to the last bit, what the run without a stop computes."""

import json
from itertools import dropwhile
from pathlib import Path

import pytest
from tests.conftest import TINY_NETWORK
from tests.launching import on_ranks
from tests.weights.layouts import write_sa2va

from vessel.inference.loading import load_model

pytestmark = pytest.mark.slow

# 12 images for training, so an epoch has 6 batches and 3 optimizer steps; the mask loss draws its points at random.
STEPS = (
    "data.batch_size=2", "trainer.accumulate_grad_batches=2",
    "~callbacks.mask_panels", "~callbacks.parameter_table", "~logger.csv",
)  # fmt: skip
DRAWN = ("loss=sa2va", "loss.points=200")
BY_STEPS = (*DRAWN, "trainer.max_steps=7", "trainer.val_check_interval=4")
BY_EPOCHS = (
    *DRAWN, "trainer.max_steps=-1", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=1",
    "trainer.val_check_interval=1.0",
)  # fmt: skip
TWICE_AN_EPOCH = (*BY_EPOCHS, "trainer.val_check_interval=0.5")  # in the middle of an accumulation


def records(folder, rank=0):
    return [json.loads(line) for line in (folder / f"records/rank{rank}.jsonl").read_text().splitlines()]


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("train/loss", "val/loss", "val/dice", "lr-AdamW/pg1")
    return {(line["step"], name): line[name] for line in lines for name in kept if name in line}


def watched(folder, **saves):
    """Overrides that record a run into its folder and save it at these calls of its hooks."""
    tests = "tests.training.resume_ranks"
    calls = [f"+callbacks.save.{hook}={moments}" for hook, moments in saves.items()]
    return [
        f"+callbacks.recorder._target_={tests}.Recorder", f"+callbacks.recorder.folder={folder}/records",
        f"+callbacks.save._target_={tests}.SaveAt", f"+callbacks.save.folder={folder}/saves", *calls,
    ]  # fmt: skip


def after(whole, batches, dropped=()):
    """What the whole run did after so many batches, without what the checkpoint has behind it."""
    trained = [i for i, record in enumerate(whole) if "loss" in record]
    rest = whole[trained[batches - 1] + 1 :] if batches else whole
    return list(dropwhile(lambda record: any(key in record for key in dropped), rest))


@pytest.fixture(scope="module")
def whole(train_tiny, tmp_path_factory):
    """A run without a stop, made once for all its checkpoints."""
    made = {}

    def run(*settings, **saves):
        if settings not in made:
            folder = made[settings] = tmp_path_factory.mktemp("whole")
            train_tiny(folder, *STEPS, *settings, *watched(folder, **saves))
        return made[settings]

    return run


@pytest.fixture
def resume(train_tiny, tmp_path, recwarn):
    def run(checkpoint, *settings):
        train_tiny(tmp_path, *STEPS, *settings, *watched(tmp_path), f"ckpt={checkpoint}")
        assert not [w for w in recwarn if "resumable" in str(w.message) or "interval" in str(w.message)]
        return tmp_path

    return run


def seen(lines):
    """Images served by epoch, in order."""
    epochs = {}
    for record in lines:
        if "ids" in record:
            epochs.setdefault(record["epoch"], []).extend(record["ids"])
    return epochs


def same_as_whole(stopped, whole, batches, dropped=()):
    assert records(stopped) == after(records(whole), batches, dropped)
    ended = [record["ended"] for record in records(whole) if "ended" in record]
    each_once = [len(set(ids)) == len(ids) == 12 for epoch, ids in seen(records(whole)).items() if epoch in ended[:-1]]
    assert each_once
    assert all(each_once)
    told, known = logged(stopped), logged(whole)
    assert {"train/loss", "lr-AdamW/pg1"} <= {name for _, name in told}
    assert {"val/loss", "val/dice"} <= {name for _, name in known}
    assert told.items() <= known.items()
    assert all(step < batches / 2 for step, _ in known.keys() - told.keys())


@pytest.mark.parametrize(
    ("moment", "batches", "dropped"),
    [
        ("train_batch-1", 0, ()),  # back to the start: the first step was not finished
        ("train_batch-4", 4, ()),  # before a validation
        ("validation_batch-1", 4, ()),  # within it
        ("validation-1", 4, ("validated",)),  # after it, as the run's own checkpoints
        ("train_batch-8", 8, ()),
        ("train_batch-6", 6, ("ended",)),
        ("epoch-1", 6, ("ended",)),
        ("train_batch-9", 8, ("validated",)),  # back to the step before
        ("validation-3", 12, ("validated", "ended")),
    ],
)
def test_resumed_by_steps_is_bit_identical(whole, resume, moment, batches, dropped):
    run = whole(*BY_STEPS, train_batch=[1, 4, 6, 8, 9], validation_batch=[1], validation=[1, 3], epoch=[1])
    same_as_whole(resume(run / f"saves/{moment}.ckpt", *BY_STEPS), run, batches, dropped)


@pytest.mark.parametrize(
    ("moment", "batches", "dropped"),
    [
        ("train_batch-3", 2, ()),
        ("train_batch-6", 6, ()),
        ("validation_batch-2", 6, ()),
        ("epoch-1", 6, ("validated", "ended")),
        ("train_batch-8", 8, ()),
    ],
)
def test_resumed_by_epochs_is_bit_identical(whole, resume, moment, batches, dropped):
    run = whole(*BY_EPOCHS, train_batch=[3, 6, 8], validation_batch=[2], epoch=[1])
    same_as_whole(resume(run / f"saves/{moment}.ckpt", *BY_EPOCHS), run, batches, dropped)


@pytest.mark.parametrize(
    ("moment", "batches", "known"),
    [("validation-1", 2, True), ("validation_batch-1", 2, False), ("validation-3", 8, True)],
)
def test_a_validation_within_an_accumulation_goes_back_to_its_start(whole, resume, moment, batches, known):
    """The step before is computed again, the validation only where it had not come to its end."""
    run = whole(*TWICE_AN_EPOCH, validation=[1, 3], validation_batch=[1])
    stopped = resume(run / f"saves/{moment}.ckpt", *TWICE_AN_EPOCH)
    expected = after(records(run), batches)
    if known:
        done = next(i for i, record in enumerate(expected) if "validated" in record)
        del expected[done]
    assert records(stopped) == expected
    assert logged(stopped).items() <= logged(run).items()


@pytest.fixture(scope="module")
def adapters(tiny_run, tmp_path_factory):
    """LoRA with dropout on weights that are loaded, and images loaded by workers."""
    folder = tmp_path_factory.mktemp("base") / "public"
    write_sa2va(folder, load_model(str(tiny_run)).network)
    started = (f"weights=[{folder}]", "prompt=small")
    return (*started, "lora.r=8", "lora.dropout=0.3", "trainable=lora", "data.workers=2", *BY_STEPS)


def test_dropout_and_workers_are_the_same_after_a_resume(whole, resume, adapters):
    run = whole(*adapters, train_batch=[8])
    same_as_whole(resume(run / "saves/train_batch-8.ckpt", *adapters), run, 8)


def test_a_run_that_ended_is_made_longer(train_tiny, whole, resume, tmp_path):
    """From its own last checkpoint, written when it had stopped within an epoch."""
    constant = (*BY_STEPS, "optimizer.warmup=0.0", "+optimizer.final=1.0")
    run, half = whole(*constant), tmp_path / "half"
    train_tiny(half, *STEPS, *constant, *watched(half), "trainer.max_steps=5")
    same_as_whole(resume(half, *constant), run, 10)


# Batches of one image: then each image has a loss of its own, however many ranks there are.
SINGLES = ("data.batch_size=1", "data.workers=1", "trainer.max_steps=6", "trainer.val_check_interval=12")


def on_two_ranks(data, folder, *overrides, engine="ddp"):
    """Train on two processes, as `torchrun` starts them; four images a step."""
    settings = [
        "experiment=tiny", f"trainer={engine}", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.precision=32-true", f"run={folder}", f"hydra.run.dir={folder}", f"data.root={data}",
        "data.phrases=[lumen,side branch]", "trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false",
        "~callbacks.progress", *TINY_NETWORK, *STEPS, *SINGLES, *watched(folder), *overrides,
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    status, told = on_ranks(2, str(Path(__file__).with_name("resume_ranks.py")), *settings, cwd=folder)
    assert status == 0, told[-4000:]
    assert "resumable" not in told
    return folder


@pytest.fixture(scope="module", params=["ddp", "zero3"])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def two_ranks(engine, oct_set, tmp_path_factory):
    save = "+callbacks.save.train_batch=[4]"
    return on_two_ranks(oct_set, tmp_path_factory.mktemp(engine), *DRAWN, save, engine=engine)


def test_two_ranks_go_on_bit_identically(two_ranks, engine, oct_set, tmp_path):
    on_two_ranks(oct_set, tmp_path, *DRAWN, f"ckpt={two_ranks}/saves/train_batch-4.ckpt", engine=engine)
    for rank in range(2):
        assert records(tmp_path, rank) == after(records(two_ranks, rank), 4)
    assert logged(tmp_path).items() <= logged(two_ranks).items()


def test_guard_T4_T5_two_ranks_share_each_epoch(two_ranks):
    first, second = (seen(records(two_ranks, rank)) for rank in range(2))
    for epoch in (0, 1):
        assert len(first[epoch]) == len(second[epoch]) == 6
        assert len({*first[epoch], *second[epoch]}) == 12
    lines = [json.loads(line) for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    assert [line["throughput/global_batch"] for line in lines if "throughput/global_batch" in line] == [4]


def test_another_number_of_ranks_goes_on_with_the_same_images(train_tiny, whole, resume, oct_set, tmp_path):
    """One rank, then two, then one: each image's loss is that of one rank throughout, but for rounding."""
    alone = (*SINGLES, "trainer.accumulate_grad_batches=4")
    one = whole(*alone, train_batch=[4])
    two = on_two_ranks(
        oct_set, tmp_path / "two", f"ckpt={one}/saves/train_batch-4.ckpt",
        "+callbacks.save.train_batch=[6]",
    )  # fmt: skip
    again = resume(two / "saves/train_batch-6.ckpt", *alone)
    expected = {(r["epoch"], i): float.fromhex(r["loss"]) for r in records(one) for i in r.get("ids", ())}
    runs = {"two": [*records(two), *records(two, rank=1)], "again": records(again)}
    for run, batches in (("two", 5 * 4), ("again", 2 * 4)):
        losses = {(r["epoch"], i): float.fromhex(r["loss"]) for r in runs[run] for i in r.get("ids", ())}
        assert len(losses) == batches
        assert losses == pytest.approx({key: expected[key] for key in losses}, rel=1e-4)
