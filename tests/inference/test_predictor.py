"""A trained network that is asked: failures, batches, and answers given or generated."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import scripted

from vessel.batch import collate
from vessel.data.dataset import make_sample
from vessel.data.inputs import find_images
from vessel.data.masks import write_mask
from vessel.data.prompt import ANSWERS
from vessel.data.questions import question_sample
from vessel.errors import VesselError
from vessel.inference.loading import load_model
from vessel.inference.options import choose_device
from vessel.inference.predictor import Failure, Predictor
from vessel.inference.results import Prediction
from vessel.inference.samples import phrase_sample_loader, question_sample_loader
from vessel.losses import lm_loss

pytestmark = pytest.mark.slow  # a trained run takes seconds
PHRASES = ("lumen", "side branch")


@pytest.fixture
def model(tiny_run):
    return load_model(str(tiny_run))


@pytest.fixture
def scans(tmp_path):
    """Five noisy pictures, the third of them cut short."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(tmp_path / f"scan {i}.png")
    cut = tmp_path / "scan 2.png"
    cut.write_bytes(cut.read_bytes()[:900])
    return tmp_path


def ask(model, scans, *, batch_size=2, workers=0, **options):
    targets = find_images(str(scans))
    predictor = Predictor(model, device="cpu", **options)
    load = phrase_sample_loader(targets, PHRASES, model)
    return list(predictor.predict(targets, load, batch_size=batch_size, workers=workers))


def test_probabilities_have_the_size_of_the_image(model, scans):
    answers = ask(model, scans)
    good = [a for a in answers if isinstance(a, Prediction)]
    assert [a.target.id for a in good] == ["scan 0", "scan 1", "scan 3", "scan 4"]
    for answer, height in zip(good, (40, 41, 43, 44), strict=True):
        assert [p.shape for p in answer.probabilities] == [(height, 50)] * 2
        assert all(0 <= p.min() <= p.max() <= 1 for p in answer.probabilities)
        assert answer.answers == (ANSWERS[0],) * 2


def test_guard_I1_an_unreadable_image_is_a_failure_and_the_others_go_on(model, scans):
    answers = ask(model, scans)
    [failure] = [a for a in answers if isinstance(a, Failure)]
    assert answers.index(failure) == 2
    assert (failure.id, failure.file) == ("scan 2", "scan 2.png")
    assert "cannot be read as an image" in failure.reason
    assert str(scans) not in failure.reason


def test_batches_and_workers_change_nothing(model, scans):
    one, many = ask(model, scans, batch_size=1), ask(model, scans, batch_size=4, workers=1)
    assert [type(a) for a in one] == [type(a) for a in many]
    for a, b in zip(one, many, strict=True):
        if isinstance(a, Prediction):
            assert torch.allclose(torch.stack(a.probabilities), torch.stack(b.probabilities), atol=1e-5)


def test_same_probabilities_as_the_network_gives(model, scans):
    target = find_images(str(scans))[0]
    image = np.asarray(Image.open(target.file))
    batch = collate([make_sample(image, PHRASES, model.prompt, model.geometry)], model.prompt.token_ids.pad)
    with torch.no_grad():
        logits = model.network(batch).mask_logits[:, None]
    side = model.geometry.frame_size
    full = torch.nn.functional.interpolate(logits, (side, side), mode="bilinear")
    expected = torch.nn.functional.interpolate(full, image.shape[:2], mode="bilinear")[:, 0].sigmoid()
    answer = ask(model, scans)[0]
    assert torch.allclose(torch.stack(answer.probabilities), expected, atol=1e-6)


def test_guard_I7_a_batch_too_large_for_the_memory_is_asked_image_by_image(model, scans):
    def small_memory(_, arguments):
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.network.register_forward_pre_hook(small_memory)
    assert [type(a) for a in ask(model, scans, batch_size=4)].count(Prediction) == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_guard_I7_out_of_memory_is_a_failure_and_no_score(model, scans, error):
    def no_memory(_, arguments):
        if arguments[0].sizes[-1] == (40, 50):
            raise error

    model.network.register_forward_pre_hook(no_memory)
    answers = ask(model, scans, batch_size=1)
    assert isinstance(answers[0], Failure)
    assert "out of memory" in answers[0].reason
    assert isinstance(answers[1], Prediction)


def test_guard_I1_values_that_are_not_finite_are_a_failure(model, scans):
    with torch.no_grad():
        model.network.text_hidden_fcs[0].bias[0] = float("nan")
    assert all("not finite" in a.reason for a in ask(model, scans) if a.id != "scan 2")


def test_other_errors_are_not_swallowed(model, scans):
    def broken(*_):
        raise RuntimeError("a defect")

    model.network.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a defect"):
        ask(model, scans)


def test_an_interrupt_passes(model, scans):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Predictor(model, device="cpu").predict(find_images(str(scans)), interrupted))


def test_an_answer_without_seg_has_no_mask(model, scans):
    """Four steps teach nobody to speak."""
    said = ask(model, scans, decode="generate", max_new_tokens=24)
    answers = [a for a in said if isinstance(a, Prediction)]
    assert len(answers) == 4
    for answer in answers:
        for text, probability, emitted in zip(answer.answers, answer.probabilities, answer.emitted, strict=True):
            assert (probability is not None) == ("[SEG]" in text)
            assert emitted <= ("[SEG]" in text)


@pytest.fixture
def speaking(model, scans):
    """The network of the run after it has learnt the standard answer by heart."""
    image = np.asarray(Image.open(scans / "scan 0.png"))
    sample = make_sample(image, PHRASES, model.prompt, model.geometry)
    batch = collate([sample], model.prompt.token_ids.pad)
    network = model.network.train()
    optimizer = torch.optim.Adam((p for p in network.mllm.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(60):
        output = network(batch)
        loss = lm_loss(output.lm_logits, output.lm_targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return replace(model, network=network.eval())


def test_the_same_words_give_the_same_masks(speaking, scans):
    taught, said = ask(speaking, scans), ask(speaking, scans, decode="generate", batch_size=3)
    for a, b in zip(taught, said, strict=True):
        if isinstance(a, Prediction):
            assert a.answers == ("Sure, [SEG].",) * 2
            assert b.answers == ("Sure, [SEG].<|im_end|>",) * 2
            assert b.emitted == (True, True)
            assert torch.allclose(torch.stack(a.probabilities), torch.stack(b.probabilities), atol=1e-5)


def always_seg(model, images):
    """Make a network answer every question with `[SEG]` alone, in batches of so many images at most."""
    tokens = model.prompt.token_ids
    scripted(model.network, *(cycle([tokens.seg, tokens.eos]) for _ in range(images)))


@pytest.mark.parametrize("decode", ["forced", "generate"])
def test_an_image_is_encoded_once_whatever_the_phrases(model, scans, decode):
    always_seg(model, 3)
    seen, drawn = [], []
    vision, frames = model.network.mllm.model.vision_tower, model.network.grounding.image_encoder
    vision.register_forward_hook(lambda _, __, output: seen.append(len(output.last_hidden_state)))
    frames.register_forward_hook(lambda _, images, __: drawn.append(len(images[0])))
    targets = [target for target in find_images(str(scans)) if target.id != "scan 2"]
    predictor = Predictor(model, device="cpu", decode=decode)
    for phrases in (PHRASES, (*PHRASES, "cap", "wire")):
        answers = list(predictor.predict(targets, phrase_sample_loader(targets, phrases, model), batch_size=3))
        assert [len(answer.probabilities) for answer in answers] == [len(phrases)] * 4
    assert seen == drawn == [3, 1] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("decode", ["forced", "generate"])
def test_a_gpu_draws_what_the_cpu_draws(model, scans, decode):
    always_seg(model, 2)
    targets = find_images(str(scans))
    maps = []
    for device in ("cpu", "cuda"):
        predictor = Predictor(model, device=device, decode=decode)
        answers = list(predictor.predict(targets, phrase_sample_loader(targets, PHRASES, model), batch_size=2))
        maps.append([torch.stack(answer.probabilities) for answer in answers if isinstance(answer, Prediction)])
    assert len(maps[0]) == 4
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(*maps, strict=True))  # bf16


def test_guard_I3_a_network_in_parts_says_and_draws_the_same(model, scans):
    options = {"decode": "generate", "max_new_tokens": 6}
    always_seg(model, 2)
    whole = ask(model, scans, **options)
    parts = ask(model, scans, device_map={"mllm": "cpu", "text_hidden_fcs": "cpu", "grounding": "cpu"}, **options)
    for a, b in zip(whole, parts, strict=True):
        if isinstance(a, Prediction):
            assert a.answers == b.answers == ("[SEG]<|im_end|>",) * 2
            assert all(torch.equal(x, y) for x, y in zip(a.probabilities, b.probabilities, strict=True))


def test_guard_I7_answers_too_long_for_the_memory_are_asked_for_image_by_image(model, scans):
    def small_memory(_, __, given):
        if len(given["inputs_embeds"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    always_seg(model, 1)
    model.network.mllm.model.language_model.register_forward_pre_hook(small_memory, with_kwargs=True)
    answers = ask(model, scans, decode="generate", batch_size=4)
    assert [type(answer) for answer in answers] == [Prediction, Prediction, Failure, Prediction, Prediction]
    assert all(answer.emitted == (True, True) for answer in answers if isinstance(answer, Prediction))


def ask_freely(model, scans, question, answers, *, regions=None):
    """Return the results of a question when the network answers these words, image by image."""
    hook = scripted(model.network, *(model.prompt.tokenizer(answer).input_ids for answer in answers))
    targets = [target for target in find_images(str(scans)) if target.id != "scan 2"][: len(answers)]
    predictor = Predictor(model, device="cpu", decode="generate")
    found = list(
        predictor.predict(targets, question_sample_loader(targets, question, model, regions=regions), batch_size=4)
    )
    hook.remove()
    return found


def test_a_free_answer_has_a_mask_for_each_seg(model, scans):
    words = [
        "A lumen [SEG] with two branches, [SEG] and [SEG].<|im_end|>",
        "Nothing.<|im_end|>",
        " It: [SEG]<|im_end|>",
    ]
    answers = ask_freely(model, scans, "Describe this image. Then segment the lumen.", words)
    assert [answer.answers for answer in answers] == [(text.strip(),) for text in words]
    assert [answer.sample.phrases for answer in answers] == [("seg_1", "seg_2", "seg_3"), (), ("seg_1",)]
    assert [len(answer.probabilities) for answer in answers] == [3, 0, 1]
    assert all(p.shape == answer.sample.size for answer in answers for p in answer.probabilities)
    first, second, third = answers[0].probabilities
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_masks_of_a_free_answer_are_those_of_its_words_imposed(model, scans):
    question, words = "Where is the lumen?", "Look: [SEG]."
    [answer] = ask_freely(model, scans, question, [f"{words}<|im_end|>"])
    image = np.asarray(Image.open(scans / "scan 0.png"))
    prompt, geometry = model.prompt, model.geometry
    ids, labels = prompt.conversation([question], [words], geometry.tokens_per_tile)
    asked = question_sample(image, question, prompt, geometry)
    batch = collate([replace(asked, phrases=("it",), input_ids=ids, labels=labels)], prompt.token_ids.pad)
    with torch.no_grad():
        [imposed] = model.network.probabilities(model.network(batch), batch)
    assert torch.allclose(answer.probabilities[0], imposed[0], atol=1e-5)


def test_what_a_question_points_at_changes_the_mask(model, scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")

    def answer(rows):
        mask = np.zeros((40, 50), bool)
        mask[rows] = True
        write_mask(folder / "scan 0_1.png", mask)
        return ask_freely(model, scans, "Segment region1.", ["[SEG].<|im_end|>"], regions=folder)[0]

    top, bottom = answer(slice(0, 20)), answer(slice(20, 40))
    assert top.answers == bottom.answers == ("[SEG].<|im_end|>",)
    assert not torch.equal(top.probabilities[0], bottom.probabilities[0])
    (folder / "scan 0_1.png").unlink()
    [failure] = ask_freely(model, scans, "Segment region1.", ["[SEG].<|im_end|>"], regions=folder)
    assert "scan 0_1.png: no such mask" in failure.reason
    assert str(folder) not in failure.reason


def test_options_that_do_not_exist():
    with pytest.raises(VesselError, match="device=tpu"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(VesselError, match="no GPU"):
            choose_device("cuda")


def test_an_unknown_decoder_and_an_empty_batch_are_refused(model, scans):
    with pytest.raises(VesselError, match="decode=sampled"):
        Predictor(model, decode="sampled")
    with pytest.raises(VesselError, match="max_new_tokens=0"):
        Predictor(model, max_new_tokens=0)
    with pytest.raises(VesselError, match="batch_size=0"):
        ask(model, scans, batch_size=0)


EVERY_KIND = ("flip_lr", "turn_90", "scale_0.8", "scale_1.25")


def test_views_are_made_before_the_cut_and_averaged_on_the_pixels_of_the_image(model, scans):
    """Against each view written to a file and asked for alone."""
    [own] = ask(model, scans / "scan 0.png")
    image = np.asarray(Image.open(scans / "scan 0.png"))
    total, count = own.probabilities[0].double().numpy().copy(), np.ones((40, 50))
    alone = {
        "flip_lr": (image[:, ::-1], lambda p: p[:, ::-1]),
        "turn_90": (np.rot90(image), lambda p: np.rot90(p, -1)),
        "scale_0.8": (np.pad(image, ((5, 5), (6, 6), (0, 0)), mode="symmetric"), lambda p: p[5:-5, 6:-6]),
    }
    for name, (pixels, back) in alone.items():
        file = scans / f"{name}.png"
        Image.fromarray(np.ascontiguousarray(pixels)).save(file)
        total += back(ask(model, file)[0].probabilities[0].numpy())
        count += 1
    Image.fromarray(image[4:36, 5:45]).save(scans / "inner.png")
    total[4:36, 5:45] += ask(model, scans / "inner.png")[0].probabilities[0].numpy()
    count[4:36, 5:45] += 1
    for batch_size in (1, 3, 8):
        [mean] = ask(model, scans / "scan 0.png", batch_size=batch_size, tta=EVERY_KIND)
        assert np.allclose(mean.probabilities[0].numpy(), total / count, atol=1e-5)
        assert (mean.emitted, mean.sample.size) == (own.emitted, (40, 50))
    assert not np.allclose(own.probabilities[0].numpy(), total / count, atol=1e-5)


def test_views_never_make_a_pass_larger_than_the_batch(model, scans):
    sizes = []
    model.network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    ask(model, scans, batch_size=2, tta=EVERY_KIND)
    assert sizes == [2, 2, 1] * 4


def test_guard_I1_with_views_failures_stay_failures(model, scans):
    def no_memory(_, arguments):
        if (50, 40) in arguments[0].sizes:  # the turned view of the first image
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.network.register_forward_pre_hook(no_memory)
    answers = ask(model, scans, workers=1, tta=("flip_lr", "turn_90"))
    assert [type(answer) for answer in answers] == [Failure, Prediction, Failure, Prediction, Prediction]
    assert answers[0].reason.startswith("out of memory")
    assert "cannot be read as an image" in answers[2].reason


def test_views_need_a_given_answer(model):
    with pytest.raises(VesselError, match="tta= with decode=generate"):
        Predictor(model, device="cpu", decode="generate", tta=("flip_lr",))
    with pytest.raises(VesselError, match="turn_45 is none"):
        Predictor(model, device="cpu", tta=("turn_45",))
