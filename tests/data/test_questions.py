"""Free questions, and the regions they point at."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vessel.batch import InputGeometry, collate
from vessel.data.masks import write_mask
from vessel.data.questions import check_question, question_sample, read_regions
from vessel.errors import VesselError

VIEWS = InputGeometry(tile_size=56, tokens_per_tile=4, max_tiles=4, frame_size=64)
PUBLIC = InputGeometry(tile_size=448, tokens_per_tile=256, max_tiles=12, frame_size=1024)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners(*all_positions):
    """Regions on the 2 x 2 features of a tile."""
    regions = torch.zeros(len(all_positions), 2, 2, dtype=torch.bool)
    for region, positions in zip(regions, all_positions, strict=True):
        region.view(-1)[list(positions)] = True
    return regions


def test_a_question_ends_where_the_answer_begins(prompt):
    sample = question_sample(picture(60, 60), "Describe this image.", prompt, VIEWS)
    text = prompt.decode(sample.input_ids.tolist())
    assert text.endswith("</img>\nDescribe this image.<|im_end|>\n<|im_start|>assistant\n")
    assert (sample.labels == -100).all()
    assert (sample.phrases, sample.size, sample.regions) == ((), (60, 60), None)
    assert (sample.input_ids == prompt.token_ids.image).sum() == len(sample.tiles) * 4


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("Segment it. [SEG]", r"^question=.*' .*\[SEG\]"),
        ("<IMG_CONTEXT> what?", "^question=.*' .*<IMG_CONTEXT>"),
        ("<image>", "^question='<image>'"),
        (" ?", r"^question=' \?'"),
        ("<image> and <image>, which?", "<image> once"),
    ],
)
def test_questions_that_would_break_the_prompt(prompt, question, message):
    with pytest.raises(VesselError, match=message):
        check_question(question, prompt)


def test_a_question_as_it_stands_in_public_examples(prompt):
    check_question("<image>\nCould you please give me a description? Please respond with segmentation masks.", prompt)


@pytest.fixture
def masks(tmp_path):
    """Return a function that writes the regions of `scan 1/b.jpg`."""

    def write(*regions):
        (tmp_path / "scan 1").mkdir()
        for i, region in enumerate(regions, 1):
            write_mask(tmp_path / f"scan 1/b_{i}.png", region)
        return tmp_path

    return write


def test_regions_are_the_nearest_pixels_of_their_masks(masks):
    """Of 48 x 64 pixels every third row and every fourth column, from the first on."""
    first, second = np.zeros((2, 48, 64), bool)
    first[3:10, 4:9] = True
    second[47, 63] = True
    second[45, 60] = True
    regions = read_regions(masks(first, second), "scan 1/b.jpg", (48, 64), PUBLIC)
    assert regions.shape == (2, 16, 16)
    assert regions[0].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2], [3, 1], [3, 2]]
    assert regions[1].nonzero().tolist() == [[15, 15]]


def test_regions_that_will_not_do(masks, tmp_path):
    small, whole = np.zeros((48, 64), bool), np.ones((48, 64), bool)
    small[1, 1] = True
    folder = masks(whole, small)
    with pytest.raises(VesselError, match=r"mask_prompts/scan 1/b_2\.png: .* 16 x 16 "):
        read_regions(folder, "scan 1/b.jpg", (48, 64), PUBLIC)
    with pytest.raises(VesselError, match=r"mask_prompts/scan 1/c_1\.png"):
        read_regions(folder, "scan 1/c.jpg", (48, 64), PUBLIC)
    with pytest.raises(VesselError, match=r"mask_prompts/scan 1/b_1\.png: .*10x10") as error:
        read_regions(folder, "scan 1/b.jpg", (10, 10), PUBLIC)
    assert str(tmp_path) not in str(error.value)
    Image.new("L", (64, 48), 7).save(folder / "scan 1/b_1.png")
    with pytest.raises(VesselError, match=r"mask_prompts/scan 1/b_1\.png: .*\b7\b"):
        read_regions(folder, "scan 1/b.jpg", (48, 64), PUBLIC)


def test_a_region_is_its_features_of_the_thumbnail_once_more(plan, prompt):
    """Five tiles of four features; the regions take from the last tile, which shows the whole image."""
    network = plan().build().eval()
    sample = question_sample(picture(112, 112), "What is region2?", prompt, VIEWS, regions=corners([0, 3], [1]))
    assert len(sample.tiles) == 5
    assert "region1<vp><IMG_CONTEXT><IMG_CONTEXT></vp>, region2<vp>" in prompt.decode(sample.input_ids.tolist())
    with torch.no_grad():
        embeddings = network.embed(sample.input_ids[None], network.encode_tiles(sample.tiles), [sample.regions])
    images = embeddings[sample.input_ids[None] == prompt.token_ids.image]
    assert len(images) == 5 * 4 + 3
    assert torch.equal(images[20:], images[16:20][[0, 3, 1]])
    assert not torch.equal(images[20:], images[:4][[0, 3, 1]])


def test_regions_of_a_batch_are_those_of_each_image(plan, prompt):
    network = plan().build().eval()
    samples = [
        question_sample(picture(112, 112, 1), "What is region1?", prompt, VIEWS, regions=corners([1, 2])),
        question_sample(picture(50, 50, 2), "What is region2?", prompt, VIEWS, regions=corners([0], [2, 3])),
    ]
    batch = collate(samples, prompt.token_ids.pad).to("cpu")
    with torch.no_grad():
        together = network.embed(batch.input_ids, network.encode_tiles(batch.tiles), batch.regions)
        for row, sample in zip(together, samples, strict=True):
            alone = network.embed(sample.input_ids[None], network.encode_tiles(sample.tiles), [sample.regions])[0]
            assert torch.allclose(row[: len(alone)], alone, atol=1e-6)


def test_guard_T2_regions_must_be_those_of_the_prompt(plan, prompt):
    network = plan().build().eval()
    sample = question_sample(picture(50, 50), "What is region1?", prompt, VIEWS, regions=corners([0, 3]))
    for other in (None, [corners([0])], [corners([0, 3], [1])]):
        with pytest.raises(VesselError, match=r"\b6 image.* features"):
            network.embed(sample.input_ids[None], network.encode_tiles(sample.tiles), other)


def test_samples_with_and_without_regions_do_not_mix(prompt):
    sample = question_sample(picture(50, 50), "What is region1?", prompt, VIEWS, regions=corners([0]))
    with pytest.raises(ValueError, match="regions"):
        collate([sample, replace(sample, regions=None)], prompt.token_ids.pad)
