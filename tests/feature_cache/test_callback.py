"""Training from cached features equals training without: same losses, same weights, even if files are damaged."""

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import SIZES, TINY_NETWORK
from tests.launching import ROOT, on_ranks

from vessel.batch import FeaturePyramid, Features, collate
from vessel.checkpoints.reading import find_checkpoint, read_checkpoint
from vessel.data.images import read_rgb
from vessel.errors import VesselError
from vessel.model.sa2va import Sa2VA
from vessel.training.callbacks.mask_panels import _image
from vessel.training.datamodule import VesselDataModule

# Two epochs of twelve images each.
FROZEN = (
    "trainable=lora", "lora.r=8", "lora.dropout=0", "data.augmentation=null", "data.batch_size=1",
    "trainer.accumulate_grad_batches=2", "trainer.max_steps=12", "trainer.val_check_interval=12",
)  # fmt: skip
RECORDER = "+callbacks.recorder._target_=tests.training.zero_ranks.Recorder"
DAMAGE = "+callbacks.damage._target_=tests.feature_cache.damage.Damage"
IMAGES = 12 + 4  # of training and validation


def course(run: Path) -> list[dict[str, float]]:
    """Return all that a run logged but times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "train/loss", "train/lm_loss", "val/loss", "val/dice_best", "val/seg_emission")
    return [{name: record[name] for name in names if name in record} for record in records]


def require_same(run: Path, other: Path) -> None:
    """Compare losses of about 8 to 1e-5, and weights that moved by 5e-3 to 2e-5.

    Features of a file lie in another order in memory than those of an encoder, and a convolution of SAM2's decoder
    adds them up in that order.
    """
    ours, theirs = course(run), course(other)
    assert len(ours) == len(theirs) > 12
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    ours, theirs = (read_checkpoint(find_checkpoint(folder, ("last",)))["state_dict"] for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def without(train_tiny, tmp_path_factory):
    """Train the run that all others are to equal."""
    folder = tmp_path_factory.mktemp("without")
    train_tiny(folder, *FROZEN, RECORDER, f"+callbacks.recorder.out={folder}")
    return folder


@pytest.fixture
def encodings(monkeypatch):
    """Count the runs of each encoder in this process."""
    counted: Counter[str] = Counter()
    own = {name: getattr(Sa2VA, name) for name in ("encode_tiles", "encode_frame")}
    for name in own:

        def call(self, images, *, name=name):
            counted[name] += 1
            return own[name](self, images)

        monkeypatch.setattr(Sa2VA, name, call)
    return counted


@pytest.mark.slow
def test_losses_and_weights_are_those_without_a_cache(train_tiny, without, tmp_path, encodings, caplog):
    """Train while it fills, with damaged files, with all features stored, and in the workers of a loader."""
    caplog.set_level(logging.INFO)
    cache = ("cache=features", f"cache.root={tmp_path}/cache")
    train_tiny(tmp_path / "first", *FROZEN, *cache, DAMAGE, f"+callbacks.damage.root={tmp_path}/cache")
    require_same(tmp_path / "first", without)
    assert any("feature cache: 16 images of 0.0451 MB, 0.721 MB in all, 0.721" in line for line in caplog.messages)
    assert sum("was damaged and is removed" in line for line in caplog.messages) == IMAGES / 2
    # One to measure; all; the damaged ones in their steps; and again for the next epoch.
    assert encodings["encode_tiles"] == encodings["encode_frame"] == 1 + IMAGES + IMAGES / 2 + IMAGES / 2

    encodings.clear()
    caplog.clear()
    train_tiny(tmp_path / "second", *FROZEN, *cache, "data.workers=1")
    require_same(tmp_path / "second", without)
    assert encodings["encode_tiles"] == encodings["encode_frame"] == 1
    assert any("0.721 MB in all, 0 MB to be computed" in line for line in caplog.messages)
    panels = [sorted(path.name for path in (run / "panels").iterdir()) for run in (tmp_path / "second", without)]
    assert panels[0] == panels[1] != []


@pytest.mark.slow
def test_endless_augmentation_is_logged_and_validation_is_cached(train_tiny, tmp_path, encodings, caplog):
    caplog.set_level(logging.INFO)
    endless = "data.augmentation={_target_: vessel.data.transforms.Augmentation, transforms: []}"
    options = (*FROZEN, endless, "trainer.max_steps=1")
    train_tiny(tmp_path / "run", *options, "cache=features", f"cache.root={tmp_path}/cache")
    assert any("data/augmentation=quarter_turns would let them be kept" in line for line in caplog.messages)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4
    assert encodings["encode_tiles"] == 1 + 4 + 2


def test_encoders_that_train_and_too_little_room_are_refused(train_tiny, tmp_path):
    cache = ("cache=features", f"cache.root={tmp_path}/cache")
    with pytest.raises(VesselError, match=r"cache=features: .*SAM2.*trainable=lora"):
        train_tiny(tmp_path / "run", *cache)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(VesselError, match=r"0\.7\d+ MB .*0\.5 MB.*cache\.max_gb=1"):
        train_tiny(tmp_path / "run", *FROZEN, *cache, "cache.max_gb=0.0005")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_panel_shows_an_image_whose_frame_is_not_in_the_batch(oct_set, prompt):
    """Check the others too: each has its own panel."""
    data = VesselDataModule(str(oct_set), prompt=prompt, geometry=SIZES.geometry)
    samples = [data.dataset("val")[i] for i in range(3)]
    known = Features(torch.zeros(1, 4, 64), FeaturePyramid(*torch.zeros(3, 1)))
    samples[1] = replace(samples[1], features=known, tiles=samples[1].tiles[:0], frame=torch.empty(3, 0, 0).byte())
    batch = collate(samples, prompt.token_ids.pad)
    for index, frame in enumerate(data.dataset("val").frames[:3]):
        show_progress = _image(SimpleNamespace(datamodule=data), batch, index)
        assert torch.equal(show_progress, torch.from_numpy(read_rgb(data.catalog.root / frame.image)))


# Ranks that hold parts of the encoders -------------------------------------------------------------------------------


@pytest.mark.slow
def test_guard_T10_a_rank_that_misses_features_does_not_wait_for_the_others(without, oct_set, tmp_path):
    """Train two ranks under ZeRO-3, half of the files damaged on the way: losses of every image as of one process."""
    given = [
        "experiment=tiny", f"run={tmp_path}/run", f"data.root={oct_set}", "data.phrases=[lumen,side branch]",
        "data.workers=0", "trainer=zero3", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true",
        "+trainer.strategy.zero={stage3_param_persistence_threshold: 0, sub_group_size: 20000}",
        "trainer.log_every_n_steps=1", "+trainer.enable_progress_bar=false", "~callbacks.progress", *FROZEN,
        "callbacks.mask_panels=null", "trainer.accumulate_grad_batches=1", "trainer.val_check_interval=6", RECORDER,
        f"+callbacks.recorder.out={tmp_path}", "cache=features", f"cache.root={tmp_path}/cache", DAMAGE,
        f"+callbacks.damage.root={tmp_path}/cache", *TINY_NETWORK,
    ]  # fmt: skip
    status, printed = on_ranks(
        2, str(ROOT / "tests/training/zero_ranks.py"), str(tmp_path), "train", *given, cwd=tmp_path
    )
    assert status == 0, printed[-4000:]
    assert printed.count("was damaged and is removed") == IMAGES / 2
    expected = torch.load(without / "rank0.pt")["losses"]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt")["losses"] for rank in range(2)]
    assert len(expected) == 24
    assert ranks[0] | ranks[1] == pytest.approx(expected, abs=1e-5)
