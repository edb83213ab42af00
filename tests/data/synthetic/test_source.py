"""Synthetic sources: files as `vessel.prepare` reads them, and masks that agree with the images."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt
from skimage.measure import label
from skimage.morphology import skeletonize

from vessel.data.synthetic.source import _video_names, write_source
from vessel.errors import VesselError

# The home grammar (reference/home_dataset.md): an id in brackets or after underscores, or no id at all.
SERIES = r"_(?P<series>\d+-\d+)_\d+_[0-9a-f]{8}"
SPELLINGS = {
    "A": re.compile(r"(?P<name>[A-Z][a-z]+( [A-Z][a-z]+)+)\((?P<id>\d{10})\)" + SERIES),
    "B": re.compile(r"(?P<name>[A-Z][a-z]+(_[A-Z][a-z]+)+)_(?P<id>\d{10})_" + SERIES),
    "C caret": re.compile(r"(?P<name>[A-Z][a-z]+( [A-Z][a-z]+)+)\^\((?P<id>\d{10})\)" + SERIES),
    "C underscores": re.compile(r"(?P<name>[A-Z][a-z]+(_[A-Z][a-z]+)+)__(?P<id>\d{10})_" + SERIES),
    "D name": re.compile(r"(?P<name>[a-z]+( [a-z]+)+)"),
    "D initials": re.compile(r"(?P<name>[a-z](_[a-z])+)"),
}


def parse(video: str) -> tuple[str, str]:
    """Return the one spelling that fits, and the patient's key."""
    fitting = {spelling: match for spelling, grammar in SPELLINGS.items() if (match := grammar.fullmatch(video))}
    assert len(fitting) == 1, f"{video}: {list(fitting)}"
    ((spelling, match),) = fitting.items()
    return spelling, match.groupdict().get("id") or match["name"]


def images(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def mask(folder: Path, phrase: str, image: Path) -> NDArray[np.bool_]:
    opened = Image.open(folder / "masks" / phrase / f"{image.stem}_mask.png")
    assert opened.mode == "1"
    # numpy reads a 1-bit image as booleans that hold 255, which compiled code may trip over.
    return np.asarray(opened.convert("L")) > 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def oct_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oct") / "source"
    write_source(folder, patients=6, frames=4, size=96)
    return folder


@pytest.fixture(scope="module")
def tree_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree") / "source"
    write_source(folder, kind="tree", patients=2, frames=9, size=256)
    return folder


@pytest.mark.parametrize("kind", ["oct", "tree"])
def test_same_arguments_same_bytes_other_seed_other_pixels(tmp_path: Path, kind: str) -> None:
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        write_source(tmp_path / name, kind=kind, patients=1, frames=2, size=64, seed=seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    for one, other in zip(images(tmp_path / "first"), images(tmp_path / "third"), strict=True):
        assert not np.array_equal(pixels(one), pixels(other))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_names_follow_the_home_grammar_in_every_spelling(oct_source: Path) -> None:
    videos: dict[str, set[int]] = defaultdict(set)
    for image in images(oct_source):
        video, number = re.fullmatch(r"(.+)_frame_(\d{6})", image.stem).groups()
        videos[video].add(int(number))
    patients: dict[str, list[str]] = defaultdict(list)
    for video in videos:
        spelling, key = parse(video)
        patients[key].append(spelling)
    assert sorted(map(sorted, patients.values())) == [
        ["A"], ["A", "B"], ["B", "C underscores"], ["C caret"], ["D initials"], ["D name"],
    ]  # fmt: skip
    assert sorted(map(len, videos.values())) == [1, 1, 3, 3, 4, 4, 4, 4]
    steps = {b - a for numbers in map(sorted, videos.values()) for a, b in pairwise(numbers)}
    assert len(steps) > 1, "videos are sampled unevenly"


def test_all_patients_have_names_of_their_own_and_one_key_each() -> None:
    keys = [{parse(video)[1] for video in _video_names(patient, seed=5)} for patient in range(120)]
    assert {len(of_patient) for of_patient in keys} == {1}
    assert len(set.union(*keys)) == 120


def test_oct_lumen_is_in_every_frame_and_other_phrases_come_and_go(oct_source: Path) -> None:
    counts = {folder.name: len(list(folder.iterdir())) for folder in (oct_source / "masks").iterdir()}
    assert set(counts) == {"lumen", "side_branch", "lipid_core"}
    assert counts["lumen"] == len(images(oct_source)) == 24
    assert 3 < counts["side_branch"] < 21
    assert 3 < counts["lipid_core"] < 21


def test_oct_lumen_is_dark_its_wall_bright_and_it_holds_the_catheter(oct_source: Path) -> None:
    for image in images(oct_source):
        red = pixels(image)[..., 0].astype(float)
        lumen = mask(oct_source, "lumen", image)
        outside = distance_transform_edt(~lumen)
        wall = (outside > 1) & (outside < 6)
        y, x = np.mgrid[:96, :96] - 47.5
        off_catheter = np.hypot(y, x) > 14
        assert lumen[47:49, 47:49].all()
        assert label(lumen).max() == 1
        assert np.median(red[wall]) > 2.5 * np.median(red[lumen & off_catheter])
        assert red[np.hypot(y, x) > 49].max() == 0, "black outside the field of view"


def test_oct_structures_lie_where_their_masks_are(oct_source: Path) -> None:
    for image in images(oct_source):
        red, lumen = pixels(image)[..., 0].astype(float), mask(oct_source, "lumen", image)
        if (oct_source / "masks" / "side_branch" / f"{image.stem}_mask.png").exists():
            branch = mask(oct_source, "side_branch", image)
            assert not (branch & lumen).any()
            assert np.median(red[branch]) < 60, "an opening is as dark as the lumen"
            assert label(branch | lumen).max() == 1, "and leads out of it"
        if (oct_source / "masks" / "lipid_core" / f"{image.stem}_mask.png").exists():
            core = mask(oct_source, "lipid_core", image)
            between = distance_transform_edt(~core)
            cap = (between > 1) & (between < 3) & ~lumen & (distance_transform_edt(~lumen) < 4)
            inside = binary_erosion(core)
            assert not (core & lumen).any()
            if inside.sum() > 10:
                assert np.mean(red[inside]) < 0.6 * np.mean(red[cap]), "dark behind a bright cap"


def test_oct_neighbours_resemble_each_other_and_patients_differ(oct_source: Path) -> None:
    def dice(one: Path, other: Path) -> float:
        a, b = (mask(oct_source, "lumen", image) for image in (one, other))
        return 2 * (a & b).sum() / (a.sum() + b.sum())

    videos: dict[str, list[Path]] = defaultdict(list)
    for image in images(oct_source):
        videos[image.stem.split("_frame_")[0]].append(image)
    within = [dice(a, b) for video in videos.values() for a, b in pairwise(video)]
    firsts = [video[0] for video in videos.values()]
    between = [dice(a, b) for i, a in enumerate(firsts) for b in firsts[:i]]
    assert min(within) > 0.9
    assert np.mean(between) < 0.85


def test_tree_is_darker_than_its_surroundings_and_covers_about_six_percent(tree_source: Path) -> None:
    shares = []
    for image in images(tree_source):
        grey, tree = pixels(image).astype(float), mask(tree_source, "blood_vessel", image)
        assert grey.ndim == 2
        outside = distance_transform_edt(~tree)
        trunk = distance_transform_edt(tree) > 2
        # Contrast is least in the last frames, where fresh blood follows.
        assert np.mean(grey[trunk]) < 0.9 * np.mean(grey[(outside > 3) & (outside < 12)])
        shares.append(tree.mean())
    assert 0.03 < np.mean(shares) < 0.09
    assert shares[0] < 0.7 * max(shares), "the contrast medium has yet to fill the tree"


def test_tree_has_branches_one_or_two_pixels_wide(tree_source: Path) -> None:
    tree = mask(tree_source, "blood_vessel", images(tree_source)[4])
    centre_line = skeletonize(tree)
    half_width = distance_transform_edt(tree)[centre_line]
    assert (half_width <= 1).mean() > 0.2
    assert half_width.max() > 3
    assert label(tree, connectivity=2).max() <= 3, "thin branches are not torn; one may leave the frame and return"


@pytest.mark.parametrize("bad", [{"kind": "mri"}, {"patients": 0}, {"patients": 121}, {"frames": 0}, {"size": 8}])
def test_arguments_out_of_range_are_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    [(name, value)] = bad.items()
    with pytest.raises(VesselError, match=f"{name}.*{value}"):
        write_source(tmp_path / "source", **bad)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(VesselError, match=re.escape(str(tmp_path))):
        write_source(tmp_path, patients=1, frames=1, size=64)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
