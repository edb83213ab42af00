"""Pullbacks, through the functions of `vessel.predict video=true`."""

import json
import weakref
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import scripted
from tests.golden import WITH_MASKS

from vessel.batch import upsample
from vessel.cli.options import typed
from vessel.data.catalog import Catalog
from vessel.data.inputs import InputImage, find_images
from vessel.data.prompt import QUESTIONS
from vessel.data.transforms import cut_tiles, whole_frame
from vessel.errors import VesselError
from vessel.inference import pullbacks as pullback_module
from vessel.inference.loading import load_model
from vessel.inference.predictor import Failure, Predictor
from vessel.inference.pullbacks import Pullback, find_pullbacks, segment_pullback
from vessel.inference.results import Prediction
from vessel.model.network import normalise
from vessel.model.tracking import Tracker
from vessel.prediction.command import predict
from vessel.prediction.options import PredictOptions

PHRASES = ("lumen", "side branch")


def draw_frames(folder, frames, *, size=(40, 50), seed=0):
    """Write frames of noise under a growing disc: `frame_0.png`, `frame_1.png`, …"""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    for i in range(frames):
        disc = (y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2 < (5 + i) ** 2
        grey = rng.integers(0, 60, size) + 120 * disc
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)).save(folder / f"frame_{i}.png")
    return folder


def found(images):
    return find_pullbacks(str(images), find_images(str(images)))


@pytest.fixture
def options(tmp_path):
    """Options of the command as its configuration gives them; `ckpt=` and `images=` come from the test."""
    from hydra import compose, initialize_config_dir

    from vessel.cli.conf import CONF

    def make(*overrides):
        with initialize_config_dir(CONF, version_base="1.3"):
            given = [f"out={tmp_path / 'out'}", "device=cpu", "video=true", *overrides]
            return typed(compose("predict", given), PredictOptions, "vessel.predict")

    return make


@pytest.fixture
def predictor(tiny_run):
    return Predictor(load_model(str(tiny_run)), device="cpu")


def test_frames_are_in_natural_order_and_each_folder_is_a_pullback(tmp_path):
    names = ("run 10/frame_10.png", "run 10/frame_2.png", "run 2/b1.png", "run 2/B1.jpg", "frame_03.png", "run/1.png")
    draw_frames(tmp_path / "synthetic", 1)
    for name in names:
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(tmp_path / "synthetic/frame_0.png").save(tmp_path / "scans" / name)
    pullbacks = found(tmp_path / "scans")
    assert [p.id for p in pullbacks] == [".", "run", "run 2", "run 10"]
    assert [t.file.name for t in pullbacks[3].frames] == ["frame_2.png", "frame_10.png"]
    assert [t.file.name for t in pullbacks[2].frames] == ["B1.jpg", "b1.png"]


def test_16_bit_frames_share_one_depth(tmp_path):
    for i, bright in enumerate((200, 4000)):
        Image.fromarray(np.full((8, 8), bright, np.uint16)).save(tmp_path / f"{i}.tif")
    [series] = found(tmp_path)
    assert series.depth == 12
    [(_, dark), (_, _)] = pullback_module._read(series)
    assert dark.max() == round(200 * 255 / 4095)  # and not stretched to its own maximum


@pytest.mark.slow
def test_each_video_of_a_data_set_is_a_pullback(oct_set):
    catalog = Catalog.open(oct_set)
    pullbacks = found(oct_set)
    assert {p.id for p in pullbacks} == {frame.video for frame in catalog.frames.values()}
    for one in pullbacks:
        numbers = [catalog.frames[target.id].frame for target in one.frames]
        assert numbers == sorted(numbers)
        assert {catalog.frames[target.id].video for target in one.frames} == {one.id}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MASKS)
@pytest.mark.parametrize("decode", ["generate", "forced"])
def test_golden_pullback_from_images_to_masks(golden_network, monkeypatch, name, decode):
    golden = golden_network(name)
    for module in ("vessel.inference.predictor", "vessel.inference.pullbacks"):
        monkeypatch.setattr(f"{module}.ANSWERS", ("[SEG]",))  # what was recorded, when it is forced
    heard = {}
    monkeypatch.setattr(pullback_module, "Tracker", lambda grounding, p: heard.update(p=p) or Tracker(grounding, p))
    predictor = Predictor(golden.model, device="cpu", decode=decode)
    files = [golden.folder / f"images/pullback_{i}.png" for i in range(7)]
    series = Pullback(".", tuple(InputImage(file.stem, file, file.name) for file in files), None)
    assert QUESTIONS[0].format(phrase="lumen") == "Please segment the lumen in this image."
    frames = list(segment_pullback(predictor, series, ["lumen"]))
    assert {frame.answers for frame in frames} == {("[SEG]<|im_end|>" if decode == "generate" else "[SEG]",)}
    assert all(frame.emitted == (True,) for frame in frames)
    assert torch.allclose(heard["p"], golden.tensors["pullback.seg_embedding"], rtol=1e-4, atol=1e-5)
    for frame, truth in zip(frames, golden.mask("pullback"), strict=True):
        assert ((frame.probabilities[0] > 0.5).numpy() == truth).mean() >= 0.999


def embeddings(predictor, ids, tiles):
    """Return the embeddings of the `[SEG]` of a conversation, [N, C]."""
    network = predictor.network
    embeddings = network.embed(ids[None], network.encode_tiles(tiles))
    hidden = network.mllm.model.language_model(inputs_embeds=embeddings).last_hidden_state[0]
    return network.text_hidden_fcs(hidden[ids == predictor.prompt.token_ids.seg])


@pytest.mark.slow
def test_masks_are_those_of_one_conversation_and_one_memory(predictor, tmp_path):
    [series] = found(draw_frames(tmp_path, 9))
    answers = list(segment_pullback(predictor, series, PHRASES))
    images = [np.asarray(Image.open(target.file)) for target in series.frames]
    network, prompt, geometry = predictor.network, predictor.prompt, predictor.geometry
    questions = [QUESTIONS[0].format(phrase=phrase) for phrase in PHRASES]
    ids, _ = prompt.conversation(questions, ["Sure, [SEG]."] * 2, geometry.tokens_per_tile, frames=5)
    tiles = torch.cat([cut_tiles(image, geometry) for image in images[:5]])
    with torch.inference_mode():
        tracker = Tracker(network.grounding, embeddings(predictor, ids, tiles))
        for answer, image in zip(answers, images, strict=True):
            seen = network.grounding.encode(normalise(whole_frame(image, geometry)[None]))
            expected = upsample(tracker.step(seen), geometry.frame_size, image.shape[:2]).sigmoid()
            assert torch.allclose(torch.stack(answer.probabilities), expected, atol=1e-5)
            assert answer.sample.phrases == PHRASES


@pytest.mark.slow
def test_frames_are_read_as_they_are_needed_and_let_go(predictor, tmp_path, monkeypatch):
    """Counted, not timed: how many were read before each result, and how many are still held."""
    [series] = found(draw_frames(tmp_path, 30))
    alive, read = weakref.WeakSet(), []

    class Picture(np.ndarray):  # a plain array cannot be hashed, which the count needs
        __hash__ = object.__hash__

    def reading(file, **options):
        image = real(file, **options).view(Picture)
        alive.add(image)
        read.append(file)
        return image

    real = pullback_module.read_rgb
    monkeypatch.setattr(pullback_module, "read_rgb", reading)
    counts = []
    for answer in segment_pullback(predictor, series, PHRASES):
        counts.append((len(read), len(alive)))
        del answer
    assert [n for n, _ in counts] == [5] * 5 + list(range(6, 31))
    assert max(held for _, held in counts) <= 7


@pytest.mark.slow
def test_rows_files_and_film_of_two_pullbacks(options, tiny_run, tmp_path):
    scans = tmp_path / "scans"
    draw_frames(scans / "first", 12, size=(41, 50))
    draw_frames(scans / "second", 1)
    results = predict(options(f"ckpt={tiny_run}", f"images={scans}"))
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert [image["id"] for image in results["images"]] == [f"first/frame_{i}" for i in range(12)] + ["second/frame_0"]
    assert results["pullbacks"] == [
        {"id": "first", "frames": 12, "film": "overlays/first/film.mp4"},
        {"id": "second", "frames": 1, "film": "overlays/second/film.mp4"},
    ]
    for image in results["images"]:
        for phrase in PHRASES:
            entry = image["phrases"][phrase]
            mask, value = (np.asarray(Image.open(out / entry[kind])) for kind in ("mask", "probability"))
            decided = np.abs(value / 65535 - results["threshold"]) > 1 / 65535
            assert np.array_equal(mask[decided], (value / 65535 > results["threshold"])[decided])
    with av.open(str(out / "overlays/first/film.mp4")) as film:
        assert film.streams.video[0].codec_context.name == "h264"
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert [picture.shape for picture in pictures] == [(42, 50, 3)] * 12  # an odd side repeats its last line
    for picture, image in zip(pictures, results["images"], strict=False):
        drawn = np.asarray(Image.open(out / image["overlay"])).astype(float)
        assert np.abs(picture[:41] - drawn).mean() < 12


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["unreadable", "of another size"])
def test_guard_I1_a_pullback_with_a_bad_frame_fails_whole_and_the_others_go_on(options, tiny_run, tmp_path, broken):
    scans = tmp_path / "scans"
    draw_frames(scans / "good", 3)
    bad = draw_frames(scans / "bad", 9) / "frame_7.png"
    if broken == "unreadable":
        bad.write_bytes(bad.read_bytes()[:300])
    else:
        Image.new("RGB", (30, 40)).save(bad)
    results = predict(options(f"ckpt={tiny_run}", f"images={scans}"))
    assert [one["id"] for one in results["pullbacks"]] == ["good"]
    assert (results["n_ok"], results["n_failed"]) == (3, 1)
    [failure] = results["failures"]
    assert (failure["id"], failure["file"]) == ("bad", "bad/frame_0.png … bad/frame_8.png")
    said = "cannot be read as an image" if broken == "unreadable" else "30 x 40 pixels, but bad/frame_0.png has 50 x 40"
    assert failure["reason"].startswith("bad/frame_7.png: ")
    assert said in failure["reason"]
    assert not [file for file in (tmp_path / "out").rglob("bad/**/*") if file.is_file()]


@pytest.mark.slow
def test_when_every_pullback_fails_the_command_fails(options, tiny_run, tmp_path):
    (draw_frames(tmp_path / "scans", 2) / "frame_1.png").write_bytes(b"no picture")
    with pytest.raises(VesselError, match=r"frame_1\.png"):
        predict(options(f"ckpt={tiny_run}", f"images={tmp_path / 'scans'}"))
    assert [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()] == ["results.json"]


@pytest.mark.slow
def test_guard_I7_out_of_memory_fails_the_pullback(predictor, tmp_path):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    [series] = found(draw_frames(tmp_path, 7))
    predictor.network.grounding.memory_attention.register_forward_pre_hook(no_memory)
    *good, last = segment_pullback(predictor, series, PHRASES)
    assert all(isinstance(answer, Prediction) for answer in good)
    assert len(good) == 5  # the prompted frames need no memory
    assert last == Failure(".", "frame_0.png … frame_6.png", "out of memory on cpu")


@pytest.mark.slow
def test_guard_I1_values_that_are_not_finite_fail_the_pullback(predictor, tmp_path):
    [series] = found(draw_frames(tmp_path, 3))
    with torch.no_grad():
        predictor.network.text_hidden_fcs[0].bias[0] = float("nan")
    [failure] = segment_pullback(predictor, series, PHRASES)
    assert "not finite" in failure.reason


@pytest.mark.slow
def test_other_errors_are_not_swallowed(predictor, tmp_path):
    def broken(*_):
        raise RuntimeError("defect")

    predictor.network.grounding.memory_encoder.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match=r"^defect$"):
        list(segment_pullback(predictor, found(draw_frames(tmp_path, 2))[0], PHRASES))


@pytest.mark.slow
def test_the_network_may_answer_itself(tiny_run, tmp_path):
    """Four steps teach nobody to speak: what is checked is that masks belong to the `[SEG]` that were said."""
    [series] = found(draw_frames(tmp_path, 6))
    predictor = Predictor(load_model(str(tiny_run)), device="cpu", decode="generate", max_new_tokens=12)
    asked = list(segment_pullback(predictor, series, PHRASES))
    assert len(asked) == 6
    for answer in asked:
        for text, probability in zip(answer.answers, answer.probabilities, strict=True):
            assert (probability is not None) == ("[SEG]" in text)


@pytest.mark.slow
def test_of_an_answer_the_first_seg_is_followed(predictor, tmp_path, monkeypatch):
    [series] = found(draw_frames(tmp_path, 2))
    said = "two [SEG] [SEG]<|im_end|>" + "none<|im_end|>" + "one [SEG]<|im_end|>"
    scripted(predictor.network, predictor.prompt.tokenizer(said, add_special_tokens=False).input_ids)
    monkeypatch.setattr(pullback_module, "Tracker", lambda grounding, p: heard.update(p=p) or Tracker(grounding, p))
    heard = {}
    predictor.decode = "generate"
    answer, _ = segment_pullback(predictor, series, ["lumen", "cap", "wire"])
    assert [probability is None for probability in answer.probabilities] == [False, True, False]
    with torch.inference_mode():
        meant = embeddings(predictor, answer.sample.input_ids, answer.sample.tiles)
    assert len(meant) == 3
    assert torch.allclose(heard["p"], meant[[0, 2]], atol=1e-5)


@pytest.mark.slow
def test_a_wide_frame_is_one_tile_too(predictor, tmp_path):
    """As the public code shows videos; a wide image would be several tiles and a thumbnail."""
    [series] = found(draw_frames(tmp_path, 6, size=(40, 100)))
    predictor.geometry = replace(predictor.geometry, max_tiles=6)
    assert [len(answer.sample.tiles) for answer in segment_pullback(predictor, series, PHRASES)] == [5] * 6


@pytest.mark.slow
def test_a_free_question_follows_each_seg_of_its_answer(predictor, tmp_path):
    [series] = found(draw_frames(tmp_path, 6))
    words = predictor.prompt.tokenizer("both [SEG] and [SEG]<|im_end|>", add_special_tokens=False).input_ids
    scripted(predictor.network, words)
    predictor.decode = "generate"
    answers = list(segment_pullback(predictor, series, (), question="What is here?"))
    assert [answer.sample.phrases for answer in answers] == [("seg_1", "seg_2")] * 6
    assert answers[5].answers == ("both [SEG] and [SEG]<|im_end|>",)
    assert not torch.allclose(*answers[0].probabilities, atol=1e-6)


def test_regions_of_one_image_have_no_place_in_a_pullback(options, tmp_path):
    with pytest.raises(VesselError, match="mask_prompts="):
        predict(options("ckpt=x", f"images={draw_frames(tmp_path / 's', 1)}", f"mask_prompts={tmp_path}"))
