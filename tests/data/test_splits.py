"""Splits that do not leak, and refusals of those that would."""

from dataclasses import replace
from itertools import chain, combinations

import pytest

from vessel.data.catalog import Frame, Split, check_split
from vessel.data.splits import make_split
from vessel.errors import VesselError


def frames(*counts, videos=1):
    """One patient per count, its frames dealt to its videos."""
    return [
        Frame(f"p{p}_v{v}_{n:06d}", "", 8, 8, f"p{p}", f"p{p}_v{v}", n, {}, f"{p} {v} {n}")
        for p, count in enumerate(counts)
        for v in range(videos)
        for n in range(v, count, videos)
    ]


def patients(ids):
    return {i.split("_")[0] for i in ids}


@pytest.mark.parametrize("counts", [(10, 10, 10), (24,) * 8, (20, 60, 40, 33, 160, 35, 28, 90, 30, 40)])
def test_guard_D9_patients_stay_whole(counts):
    split = make_split(frames(*counts))
    assert all(split.parts.values())
    for one, other in combinations(split.parts.values(), 2):
        assert not patients(one) & patients(other)
    assert sorted(chain(*split.parts.values())) == sorted(f.id for f in frames(*counts))
    assert check_split(frames(*counts), split) == []


def test_fractions_are_of_images():
    split = make_split(frames(*(20 + 7 * (k % 11) for k in range(32))))
    total = sum(map(len, split.parts.values()))
    fractions = [len(split.parts[name]) / total for name in ("train", "val", "test")]
    assert fractions == pytest.approx([0.7, 0.15, 0.15], abs=0.03)


def test_seed_decides():
    many = frames(*range(10, 40))
    assert make_split(many, seed=0) == make_split(many, seed=0)
    assert make_split(many, seed=0).hash == make_split(many, seed=0).hash
    assert make_split(many, seed=0).parts["test"] != make_split(many, seed=1).parts["test"]


def test_folds_divide_train_and_val_by_patient():
    many = frames(*range(10, 26))
    split = make_split(many, folds=5)
    assert len(split.folds) == 5
    pool = sorted(split.parts["train"] + split.parts["val"])
    assert sorted(chain(*(fold["val"] for fold in split.folds))) == pool
    for fold in split.folds:
        assert sorted(fold["train"] + fold["val"]) == pool
        assert not patients(fold["train"]) & patients(fold["val"])
    sizes = [len(fold["val"]) for fold in split.folds]
    assert max(sizes) - min(sizes) <= 15


def test_no_more_folds_than_patients():
    assert len(make_split(frames(5, 5, 5, 5), folds=5).folds) == 3
    assert make_split(frames(5, 5, 5), folds=0).folds == ()


@pytest.mark.parametrize("counts", [(90,), (40, 40)])
def test_guard_D9_too_few_patients_are_refused_with_the_alternatives(counts):
    with pytest.raises(VesselError, match=rf"{len(counts)} .*split=block.*split=frame"):
        make_split(frames(*counts))


def test_guard_D9_blocks_are_contiguous_and_apart():
    split = make_split(frames(93), unit="block", gap=2)
    runs = {name: [int(i[-6:]) for i in ids] for name, ids in split.parts.items()}
    assert runs == {"train": list(range(63)), "val": list(range(65, 78)), "test": list(range(80, 93))}
    assert "nothing about new patients" in split.note
    assert split.gap == 2


def test_block_folds_keep_the_gap_and_leave_the_test_block_alone():
    split = make_split(frames(93), unit="block", gap=2, folds=4)
    assert len(split.folds) == 4
    for fold in split.folds:
        val, train = ({int(i[-6:]) for i in fold[name]} for name in ("val", "train"))
        assert min(abs(a - b) for a in val for b in train) == 3
        assert max(val | train) < 78


def test_short_videos_train_whole_and_too_short_ones_are_refused():
    split = make_split(frames(40, 5), unit="block", gap=2)
    assert {i for i in split.parts["train"] if i.startswith("p1")} == {f"p1_v0_{n:06d}" for n in range(5)}
    with pytest.raises(VesselError, match="gap"):
        make_split(frames(5, 6), unit="block", gap=2)


def test_guard_D9_frames_only_by_name_and_then_noted():
    split = make_split(frames(20), unit="frame", folds=3)
    assert {name: len(ids) for name, ids in split.parts.items()} == {"train": 14, "val": 3, "test": 3}
    assert "far too good" in split.note
    assert len(split.folds) == 3


def leak(split: Split, **parts):
    return replace(split, parts={**split.parts, **parts})


def test_guard_D9_a_patient_in_two_parts_is_found():
    many = frames(10, 10, 10)
    split = make_split(many)
    moved = split.parts["test"][0]
    leaky = leak(split, test=split.parts["test"][1:], val=(*split.parts["val"], moved))
    assert check_split(many, leaky) == [f"patient {moved[:2]} in both val and test"]


def test_identical_images_in_two_parts_are_found():
    many = frames(10, 10, 10)
    split = make_split(many)
    one, two = split.parts["train"][0], split.parts["test"][0]
    copied = [replace(f, sha256="same") if f.id in {one, two} else f for f in many]
    assert check_split(copied, split) == [f"identical images {one} and {two} in both train and test"]


def test_unknown_and_repeated_frames_are_found():
    many = frames(10, 10, 10)
    split = make_split(many, folds=0)
    assert "unknown frames: ghost" in check_split(many, leak(split, test=("ghost",)))[0]
    assert "occur twice" in check_split([*many, many[0]], split)[0]


def test_a_leaking_fold_is_found():
    many = frames(10, 10, 10, 10)
    split = make_split(many, folds=3)
    fold = split.folds[0]
    leaky = replace(split, folds=({**fold, "val": (*fold["val"], split.parts["test"][0])},))
    assert all(sentence.startswith("fold 0: ") for sentence in check_split(many, leaky))
    assert check_split(many, leaky)
