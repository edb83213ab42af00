"""`vessel.predict`, through its function and once as a user runs it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bench.stream import measure
from PIL import Image
from tests.conftest import scripted
from tests.launching import command

from vessel.data.images import read_rgb
from vessel.data.inputs import InputImage, find_images
from vessel.errors import VesselError
from vessel.inference.cleanup import Cleanup
from vessel.inference.decision import DECISION_FILE, CleanupOptions, Decision, StoredDecision
from vessel.inference.loading import load_model
from vessel.inference.options import NetworkOptions
from vessel.inference.predictor import Predictor
from vessel.inference.pullbacks import Pullback
from vessel.inference.samples import phrase_sample_loader
from vessel.prediction.command import _merged, _workers, predict
from vessel.prediction.options import PredictOptions
from vessel.publishing.verification import network_results

pytestmark = pytest.mark.slow


@pytest.fixture
def scans(tmp_path):
    """Pictures of every kind a user has, two of them of one stem."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "scans"
    for name, shape in {"a/x 1.png": (40, 50, 3), "b/x 1.png": (30, 30), "ä.jpg": (33, 44, 3)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    Image.fromarray(rng.integers(0, 4096, (20, 24), dtype=np.uint16)).save(folder / "deep.tif")
    return folder


@pytest.fixture
def options(tiny_run, scans, tmp_path):
    def make(**changes):
        defaults = {
            "ckpt": str(tiny_run), "images": str(scans), "out": str(tmp_path / "out"), "phrases": None, "split": None,
            "question": None, "mask_prompts": None, "video": False, "decode": "forced", "max_new_tokens": 24,
            "decision": None, "threshold": "auto", "hysteresis": "auto", "cleanup": CleanupOptions(), "tta": "auto",
            "overwrite": False, "batch_size": 2, "workers": 0, "device": "cpu", "devices": 1,
            "network": NetworkOptions("auto", None, None, None),
        }  # fmt: skip
        return PredictOptions(**defaults | changes)

    return make


def test_files_and_results(options, tmp_path):
    results = predict(options())
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert (results["n_ok"], results["n_failed"], results["failures"]) == (4, 0, [])
    assert {image["id"] for image in results["images"]} == {"a/x 1", "b/x 1", "ä", "deep"}
    for image in results["images"]:
        assert image["text"].count("[SEG]") == 2
        assert Image.open(out / image["overlay"]).size == tuple(reversed(image["size"]))
        for phrase, entry in image["phrases"].items():
            mask = Image.open(out / entry["mask"])
            assert mask.mode == "1"
            probability = np.asarray(Image.open(out / entry["probability"]))
            assert probability.dtype == np.uint16
            value = probability / 65535
            decided = np.abs(value - results["threshold"]) > 1 / 65535  # the file is rounded to 16 bits
            assert decided.mean() > 0.99
            assert np.array_equal(np.asarray(mask)[decided], (value > results["threshold"])[decided])
            assert entry["area"] == np.asarray(mask).sum()
            assert entry["mask"] == f"masks/{phrase.replace(' ', '_')}/{image['id']}.png"


def test_guard_I8_results_say_which_weights_made_them(options, tiny_run):

    results = predict(options())
    assert results["run"] == "tiny"
    assert results["fingerprint"] == load_model(str(tiny_run)).manifest.fingerprint != ""
    assert results["threshold"] == load_model(str(tiny_run)).threshold


def test_guard_I5_masks_follow_the_threshold_because_probabilities_are_kept(options):
    def areas(threshold):
        results = predict(options(threshold=threshold, overwrite=True))
        return sum(entry["area"] for image in results["images"] for entry in image["phrases"].values())

    probabilities = predict(options(overwrite=True))["images"][0]["phrases"]["lumen"]["probability"]
    values = np.asarray(Image.open(options().target / probabilities)) / 65535
    low, high = float(values.min()), float(values.max())
    assert low < high
    assert areas(max(0.01, low)) > areas(float(np.median(values))) > areas(min(0.99, high))


def test_clean_up_changes_masks_only(options):
    before = predict(options(threshold=0.5))["images"][0]["phrases"]["lumen"]
    kept = (options().target / before["probability"]).read_bytes()
    none = CleanupOptions(min_size=10**6)
    after = predict(options(threshold=0.5, cleanup=none, overwrite=True))["images"][0]["phrases"]["lumen"]
    assert after["area"] == 0
    assert (options().target / after["probability"]).read_bytes() == kept


def test_guard_I1_a_bad_image_is_counted_named_and_has_no_files(options, scans, tmp_path):
    (scans / "bad.png").write_bytes(b"no picture")
    results = predict(options())
    assert (results["n_ok"], results["n_failed"]) == (4, 1)
    assert results["failures"][0]["file"] == "bad.png"
    assert str(scans) not in json.dumps(results)
    assert not list((tmp_path / "out").rglob("bad*"))


def test_when_every_image_fails_the_command_fails(options, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(VesselError, match="none of 1 images"):
        predict(options(images=str(tmp_path / "bad.png")))
    assert json.loads((tmp_path / "out/results.json").read_text())["n_failed"] == 1


def test_an_answer_without_seg_is_said_and_leaves_no_mask(options, tmp_path):
    results = predict(options(decode="generate"))
    entries = [entry for image in results["images"] for entry in image["phrases"].values()]
    missing = [entry for entry in entries if entry["mask"] is None]
    assert results["n_without_mask"] == len(missing) > 0
    assert all(entry["reason"] == "no [SEG] in the answer" and entry["area"] is None for entry in missing)
    assert len(list((tmp_path / "out/masks").rglob("*.png"))) == len(entries) - len(missing)


@pytest.fixture
def saying(monkeypatch):
    """`saying(ckpt, words)`: the loaded network then answers these texts, each image of a batch its own."""

    def say(ckpt, words):
        from vessel.inference.loading import load_model

        model = load_model(ckpt)
        scripted(model.network, *(model.prompt.tokenizer(text).input_ids for text in words))
        monkeypatch.setattr("vessel.prediction.command.load_model", lambda *_, **__: model)

    return say


def test_a_question_is_answered_with_text_and_masks(options, saying, tiny_run, scans, capsys):
    (scans / "deep.tif").unlink()
    words = ["A lumen, [SEG], and a branch, [SEG].<|im_end|>", "No vessel.<|im_end|>", "[SEG]<|im_end|>"]
    saying(str(tiny_run), words)
    results = predict(options(question="Describe this image. Then segment the lumen.", decode="generate", batch_size=4))
    images = results["images"]
    assert results["question"] == "Describe this image. Then segment the lumen."
    assert [image["text"] for image in images] == words
    assert [list(image["phrases"]) for image in images] == [["seg_1", "seg_2"], [], ["seg_1"]]
    assert results["n_without_mask"] == 1
    for image in images:
        assert (options().target / image["overlay"]).is_file()
        for name, entry in image["phrases"].items():
            assert entry["mask"] == f"masks/{name}/{image['id']}.png"
            assert np.asarray(Image.open(options().target / entry["mask"])).sum() == entry["area"]
    told = capsys.readouterr().out
    assert all(text in told for text in (*words, "1 times: no [SEG] in the answer"))


def test_regions_are_named_by_image(options, saying, tiny_run, scans, tmp_path):
    saying(str(tiny_run), ["[SEG]<|im_end|>"])
    (tmp_path / "regions/a").mkdir(parents=True)
    Image.fromarray(np.ones((40, 50), bool)).save(tmp_path / "regions/a/x 1_1.png")
    question = {"question": "Segment region1.", "mask_prompts": str(tmp_path / "regions"), "decode": "generate"}
    results = predict(options(**question))
    assert [image["file"] for image in results["images"]] == ["a/x 1.png"]
    assert {failure["file"] for failure in results["failures"]} == {"b/x 1.png", "ä.jpg", "deep.tif"}
    assert all("no such mask" in failure["reason"] for failure in results["failures"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "What?"}, "decode=generate"),
        ({"question": "What?", "decode": "generate", "phrases": ["lumen"]}, "exclude each other"),
        ({"question": "[SEG]?", "decode": "generate"}, r"holds \[SEG\]"),
        ({"question": "", "decode": "generate"}, "question=''"),
        ({"mask_prompts": "regions"}, "without question="),
        ({"question": "What?", "decode": "generate", "mask_prompts": "nowhere"}, "name a folder of masks"),
        ({"decode": "generate", "max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_questions_that_make_no_sense(options, changes, message, tmp_path):
    with pytest.raises(VesselError, match=message):
        predict(options(**changes))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def searched(options, tiny_run, scans, tmp_path):
    """As if `vessel.evaluate search=true` had chosen, for the weights of a copy of the run; draws part of a scan."""
    run = tmp_path / "searched"
    shutil.copytree(tiny_run, run)
    manifest = load_model(str(run)).manifest
    values = network_results(load_model(str(run)), {"x 1": read_rgb(scans / "a/x 1.png")}).probabilities["x 1"][0]
    low, high = (float(value) for value in np.quantile(values, [0.3, 0.6]))
    decision = Decision(high, low, Cleanup(opening=1, min_size=30), ("flip_lr",))
    data = manifest.data["fingerprint"], manifest.data["split_hash"]
    StoredDecision(manifest.fingerprint, decision, *data).write(run / DECISION_FILE)
    return decision, lambda **changes: predict(options(ckpt=str(run), overwrite=True, **changes))


def test_guard_I6_what_validation_chose_is_applied(searched, tiny_run, tmp_path):
    decision, run_it = searched
    results = run_it()
    assert Decision.from_json(results["decision"]) == decision
    assert results["decision_source"] == "searched on validation"
    targets, model = find_images(str(tmp_path / "scans"))[:1], load_model(str(tiny_run))
    load = phrase_sample_loader(targets, model.manifest.phrases, model)
    [mean] = Predictor(model, device="cpu", tta=("flip_lr",)).predict(targets, load)
    probability, entry = mean.probabilities[0].numpy(), results["images"][0]["phrases"]["lumen"]
    mask = np.asarray(Image.open(tmp_path / "out" / entry["mask"]))
    assert np.allclose(np.asarray(Image.open(tmp_path / "out" / entry["probability"])) / 65535, probability, atol=1e-4)
    assert np.array_equal(mask, decision(probability))
    assert not np.array_equal(mask, probability > decision.threshold)
    assert 0 < mask.sum() < mask.size


def test_the_user_overrules_validation_and_results_say_so(searched):
    decision, run_it = searched
    results = run_it(threshold=0.3, tta=[], cleanup=CleanupOptions(min_size=0))
    assert Decision.from_json(results["decision"]) == Decision(0.3, cleanup=Cleanup(opening=1))
    assert results["decision_source"] == f"the user's; validation: {decision}, searched on validation"


def test_views_that_validation_chose_are_left_away_where_the_network_speaks(searched):
    _, run_it = searched
    results = run_it(decode="generate")
    assert results["decision"]["tta"] == []
    assert "decode=generate uses the image alone" in results["decision_source"]
    with pytest.raises(VesselError, match="tta= with decode=generate"):
        run_it(decode="generate", tta=["flip_lr"])
    with pytest.raises(VesselError, match="tta= with video=true"):
        run_it(video=True, tta=["flip_lr"])


def test_a_new_phrase_is_asked_with_a_warning(options, capsys):
    results = predict(options(phrases=["Guide_wire"]))
    assert list(results["images"][0]["phrases"]) == ["guide wire"]
    assert "never trained on guide wire" in capsys.readouterr().out


def test_two_processes_give_what_one_gives(options, scans, tmp_path):
    (scans / "b/bad.png").write_bytes(b"no picture")
    alone = predict(options(batch_size=1))  # sums in another order would round otherwise
    shared = predict(options(batch_size=1, devices=2, out=str(tmp_path / "shared")))
    assert shared == alone
    assert (shared["n_ok"], shared["n_failed"]) == (4, 1)
    assert json.loads((tmp_path / "shared/results.json").read_text(encoding="utf-8")) == alone
    files = {file.relative_to(tmp_path / "out"): file for file in (tmp_path / "out").rglob("*.png")}
    assert len(files) == 4 * 5
    assert all((tmp_path / "shared" / name).read_bytes() == file.read_bytes() for name, file in files.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "at least one"),
        ({"devices": 3, "device": "auto"}, "torch finds 2"),
        ({"devices": 2, "network": NetworkOptions("auto", "auto", None, None)}, "takes them all"),
    ],
)
def test_devices_that_make_no_sense(options, monkeypatch, changes, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(VesselError, match=message):
        predict(options(**changes))


def test_results_of_shares_are_in_the_order_of_what_was_asked():
    frames = [InputImage(f"{folder}/{name}", Path(), name) for folder in "ab" for name in "21"]
    shown = [Pullback(folder, tuple(frame for frame in frames if frame.id[0] == folder), None) for folder in "ab"]
    shown.append(Pullback("c", (), None))

    def share(pullbacks, failures):
        images = [{"id": frame.id} for pullback in pullbacks for frame in pullback.frames]
        whole, bad = ([{"id": one.id} for one in listed] for listed in (pullbacks, failures))
        counts = {"n_ok": len(images), "n_failed": len(bad), "n_without_mask": 1}
        return {**counts, "run": "r", "images": images, "pullbacks": whole, "failures": bad}

    merged = _merged([share(shown[1::-1], []), share([], shown[2:])], shown)
    assert [image["id"] for image in merged["images"]] == ["a/2", "a/1", "b/2", "b/1"]
    assert [one["id"] for one in merged["pullbacks"]] == ["a", "b"]
    assert [one["id"] for one in merged["failures"]] == ["c"]
    assert (merged["n_ok"], merged["n_failed"], merged["n_without_mask"], merged["run"]) == (4, 1, 2, "r")


@pytest.mark.parametrize(
    ("asked", "images", "free", "workers"),
    [
        (2, 15, 2**30, 0),
        (2, 16, 2**30, 1),
        (2, 1000, 2**30, 2),
        (9, 1000, 2**30, 9),
        (2, 1000, 850_000, 1),  # 13 images and 8
        (2, 1000, 440_000, 0),
        (2, 99, 0, 0),
    ],
)
def test_loaders_start_where_they_gain_and_find_room(options, tiny_run, monkeypatch, asked, images, free, workers):
    """An image is 3 x (2 x 56 x 56 + 64 x 64) bytes here; two batches of four wait for each loader, 13 elsewhere."""
    model = load_model(str(tiny_run))
    geometry = replace(model.geometry, max_tiles=1)
    predictor = SimpleNamespace(geometry=geometry, augmented=())
    monkeypatch.setattr("vessel.prediction.command.SHARED_MEMORY", tiny_run)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    assert _workers(options(workers=asked, batch_size=4), images, predictor) == workers


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_images(tiny_run, tmp_path):
    """A result of 512 x 512 pixels and two phrases takes 2 MB, those of 60 images 120 MB.

    The first prediction of a process is not counted: what the allocator keeps of it is not given back.
    """
    y, x = np.mgrid[:512, :512]
    for i in range(4):
        disc = (y - 256) ** 2 + (x - 256) ** 2 < (60 + 40 * i) ** 2
        Image.fromarray((180 * disc).astype(np.uint8)).save(tmp_path / f"{i}.png")
    _, few, many = measure(tiny_run, tmp_path, "20", "20", "80")
    assert (few["frames"], many["frames"]) == (20, 80)
    assert many["peak_bytes"] - few["peak_bytes"] < 60e6


def test_images_of_a_data_set(options, oct_set):
    results = predict(options(images=str(oct_set), split="test"))
    assert results["n_ok"] == 4
    assert results["images"][0]["file"] == f"images/{results['images'][0]['id']}.png"


def test_guard_I10_results_are_not_written_over(options, scans, tmp_path):
    predict(options())
    with pytest.raises(VesselError, match="overwrite=true"):
        predict(options())
    (scans / "deep.tif").unlink()
    assert predict(options(overwrite=True))["n_ok"] == 3
    assert not list((tmp_path / "out").rglob("deep*"))


def test_other_peoples_files_are_safe(options, scans):
    with pytest.raises(VesselError, match="holds more than results"):
        predict(options(out=str(scans), overwrite=True))
    assert len([f for f in scans.rglob("*") if f.is_file()]) == 4


@pytest.mark.parametrize("threshold", ["best", 0, 1.0, -0.2, None])
def test_thresholds_that_make_no_sense(options, threshold):
    with pytest.raises(VesselError, match="threshold="):
        predict(options(threshold=threshold))


def test_two_phrases_never_share_a_folder(options):
    with pytest.raises(VesselError, match="share a folder"):
        predict(options(phrases=["a+b", "a-b", "a*b"]))


def test_what_is_no_trained_network_is_refused(options, scans):
    with pytest.raises(VesselError, match="neither a run nor an export"):
        predict(options(ckpt=str(scans)))


def run(cwd, *arguments):
    return command("vessel.predict", *arguments, cwd=cwd)


def test_as_a_user_runs_it(tiny_run, scans, tmp_path):
    arguments = (
        f"ckpt={tiny_run}",
        "images=scans",
        "phrases=[lumen]",
        "threshold=0.3",
        "cleanup.min_size=5",
        "device=cpu",
    )
    done = run(tmp_path, *arguments, "out=masks here")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "masks here/results.json").read_text())["n_ok"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("images=scans", "out=x"), "ckpt= is missing"),
        (("ckpt=scans", "images=scans", "out=x", "cleanup.min_size=few"), "cleanup.min_size"),
    ],
)
def test_mistakes_are_told_without_a_traceback(scans, tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
