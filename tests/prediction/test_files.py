"""Results are written while others are computed: in order, not too many at once, and with nothing kept silent."""

import numpy as np
import pytest
import torch
from PIL import Image

from vessel.batch import Sample
from vessel.data.inputs import InputImage
from vessel.errors import VesselError
from vessel.inference.decision import Decision
from vessel.inference.predictor import Failure
from vessel.inference.results import Prediction
from vessel.plotting.overlays import overlay
from vessel.prediction.files import WRITERS, ResultFiles

NOTHING = torch.empty(0)


@pytest.fixture
def answers(tmp_path):
    """`answers(sides)`: what the network says about noise of these sides, `0`, `1`, … by name."""

    def make(sides):
        rng = np.random.default_rng(0)
        for number, side in enumerate(sides):
            file = tmp_path / f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)
            sample = Sample("", "", "", ("lumen", "cap"), NOTHING, NOTHING, NOTHING, NOTHING, (side, side))
            maps = torch.from_numpy(rng.random((2, side, side), dtype=np.float32))
            yield Prediction(
                InputImage(str(number), file, file.name), sample, ("one", "two"), tuple(maps), (True, True)
            )

    return make


def test_files_hold_what_the_network_said(answers, tmp_path):
    [answer] = said = list(answers([33]))
    files = ResultFiles(tmp_path / "out", Decision(0.4))
    files.add(said)
    [entry] = files.images
    assert (entry["id"], entry["size"], entry["text"]) == ("0", [33, 33], "one\ntwo")
    masks = []
    for phrase, map_ in zip(("lumen", "cap"), answer.probabilities, strict=True):
        told = entry["phrases"][phrase]
        masks.append(np.asarray(Image.open(tmp_path / "out" / told["mask"])))
        assert np.array_equal(masks[-1], map_.numpy() > 0.4)
        written = np.asarray(Image.open(tmp_path / "out" / told["probability"]))
        assert written.dtype == np.uint16
        assert np.array_equal(written, np.rint(map_.numpy() * np.float32(65535)).astype(np.uint16))
        assert told["area"] == masks[-1].sum()
    drawn = np.asarray(Image.open(tmp_path / "out" / entry["overlay"]))
    assert np.array_equal(drawn, overlay(np.asarray(Image.open(answer.target.file)), np.stack(masks)))


def test_entries_are_in_the_order_of_the_images_and_few_wait(answers, tmp_path):
    files, ahead = ResultFiles(tmp_path / "out", Decision()), []

    def asked():
        # The first image takes the longest by far.
        for number, answer in enumerate(answers([700, *[8] * 20])):
            ahead.append(number - len(files.images))
            yield Failure("bad", "bad.png", "torn") if number == 5 else answer

    files.add(asked())
    assert [entry["id"] for entry in files.images] == [str(number) for number in range(21) if number != 5]
    assert [failure.id for failure in files.failures] == ["bad"]
    assert 1 < max(ahead) <= WRITERS + 1  # the failure is counted, too


def test_what_cannot_be_written_ends_it(answers, tmp_path):
    taken = []

    def asked():
        for answer in answers([8] * 40):
            taken.append(answer.target.file)
            if len(taken) == 3:
                answer.target.file.unlink()
            yield answer

    with pytest.raises(VesselError, match=r"2\.png.*No such file"):
        ResultFiles(tmp_path / "out", Decision()).add(asked())
    assert len(taken) < 10


def test_a_full_disk_is_told_with_the_file(answers, tmp_path, monkeypatch):
    def full(file, content):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device.*probabilities.lumen.0\.png"):
        ResultFiles(tmp_path / "out", Decision()).add(answers([8]))
