import socket

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)

from vessel.errors import VesselError
from vessel.metrics.overlap import OVERLAP_METRICS, Counts, OverlapSweep, count, dice, iou, precision, recall

THRESHOLDS = [0.1, 0.3, 0.5, 0.9]


def random_image(seed: int, phrases: int = 2, size: tuple[int, int] = (9, 7)):
    generator = torch.Generator().manual_seed(seed)
    # Tenths, so that many probabilities lie exactly on a threshold.
    probabilities = torch.randint(0, 11, (phrases, *size), generator=generator).float() / 10
    return probabilities, torch.rand(phrases, *size, generator=generator) > 0.6


def add(sweep: OverlapSweep, seed: int, *, phrases=("lumen", "cap"), patient="pa") -> None:
    probabilities, masks = random_image(seed, len(phrases))
    sweep.update([probabilities], [masks], ids=[f"i{seed}"], patients=[patient], phrases=[phrases])


def naive_dice(probability, mask, threshold) -> float:
    predicted = probability > threshold
    return 2 * int((predicted & mask).sum()) / int(predicted.sum() + mask.sum())


def test_count_equals_one_pass_a_threshold():
    probabilities, masks = random_image(0, phrases=3)
    counts = count(probabilities, masks, torch.tensor(THRESHOLDS))
    for t, threshold in enumerate(THRESHOLDS):
        predicted = probabilities > torch.tensor(threshold)
        assert torch.equal(counts.tp[t], (predicted & masks).sum((1, 2)))
        assert torch.equal(counts.fp[t], (predicted & ~masks).sum((1, 2)))
        assert torch.equal(counts.fn[t], (~predicted & masks).sum((1, 2)))
    assert counts.tp.shape == (4, 3)
    assert counts.tp.dtype == torch.int64


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(dice, binary_f1_score), (iou, binary_jaccard_index), (precision, binary_precision), (recall, binary_recall)],
)
def test_scores_equal_torchmetrics(ours, theirs):
    probabilities, masks = random_image(1, phrases=1)
    scores = ours(count(probabilities, masks, torch.tensor(THRESHOLDS)))
    expected = [float(theirs((probabilities > torch.tensor(t)).int(), masks.int())) for t in THRESHOLDS]
    assert scores[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mask", "prediction", "expected"),
    [
        ([0, 0], [0, 0], (1, 1, 1, 1)),
        ([0, 0], [1, 0], (0, 0, 0, 1)),
        ([1, 0], [0, 0], (0, 0, 1, 0)),
        ([1, 0], [1, 1], (2 / 3, 1 / 2, 1 / 2, 1)),
    ],
)
def test_guard_D12_empty_masks_follow_the_stated_rule(mask, prediction, expected):
    counts = count(torch.tensor([[prediction]]).float(), torch.tensor([[mask]]).bool(), torch.tensor([0.5]))
    assert [float(metric(counts)) for metric in OVERLAP_METRICS.values()] == pytest.approx(list(expected))


def test_guard_I5_scores_move_with_the_threshold():
    sweep = OverlapSweep(THRESHOLDS)
    add(sweep, 0)
    scores = sweep.compute()
    assert all(len(set(scores[name].tolist())) > 1 for name in OVERLAP_METRICS)
    assert scores["recall"].tolist() == sorted(scores["recall"].tolist(), reverse=True)


def test_means_over_images_patients_and_phrases():
    sweep = OverlapSweep([0.3])
    layout = {0: ("pa", ("lumen", "cap")), 1: ("pa", ("lumen",)), 2: ("pb", ("lumen", "cap"))}
    of_image, of_phrase = {}, {"lumen": [], "cap": []}
    for seed, (patient, phrases) in layout.items():
        add(sweep, seed, patient=patient, phrases=phrases)
        probabilities, masks = random_image(seed, len(phrases))
        values = [naive_dice(p, m, torch.tensor(0.3)) for p, m in zip(probabilities, masks, strict=True)]
        of_image[seed] = sum(values) / len(values)
        for phrase, value in zip(phrases, values, strict=True):
            of_phrase[phrase].append(value)
    scores = sweep.compute()
    assert float(scores["dice"]) == pytest.approx(sum(of_image.values()) / 3)
    assert float(scores["dice_patient"]) == pytest.approx(((of_image[0] + of_image[1]) / 2 + of_image[2]) / 2)
    assert float(scores["dice/lumen"]) == pytest.approx(sum(of_phrase["lumen"]) / 3)
    assert float(scores["dice/cap"]) == pytest.approx(sum(of_phrase["cap"]) / 2)


def test_a_repeated_image_counts_once():
    once, twice = OverlapSweep([0.3]), OverlapSweep([0.3])
    for seed in (0, 1):
        add(once, seed, patient="Zoë\n2")
        add(twice, seed, patient="Zoë\n2")
    add(twice, 0, patient="Zoë\n2")
    assert once.compute() == twice.compute()


def test_works_in_a_metric_collection_and_resets():
    metrics = MetricCollection({"overlap": OverlapSweep()}, prefix="val/").clone()
    probabilities, masks = random_image(0)
    metrics.update([probabilities], [masks], ids=["i"], patients=["p"], phrases=[["lumen", "cap"]])
    assert {"val/dice", "val/iou_patient", "val/dice/lumen", "val/recall/cap"} <= metrics.compute().keys()
    metrics.reset()
    with pytest.warns(UserWarning, match="``update``"):
        assert metrics["overlap"].compute() == {}


def test_a_map_that_is_not_finite_is_refused_and_named():
    probabilities, masks = random_image(0)
    probabilities[0, 0, 0] = float("nan")
    with pytest.raises(VesselError, match=r"image i7: .*non-finite"):
        OverlapSweep().update([probabilities], [masks], ids=["i7"], patients=["p"], phrases=[["a", "b"]])


def test_wrong_shapes_and_thresholds_are_refused():
    with pytest.raises(ValueError, match="masks"):
        count(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.tensor([0.5]))
    for thresholds in ([], [0.5, 0.3], [0.3, 0.3]):
        with pytest.raises(VesselError, match="ascending"):
            OverlapSweep(thresholds)


def test_scores_keep_the_shape_of_the_counts():
    zero = torch.zeros(4, 3, dtype=torch.int64)
    assert dice(Counts(zero, zero, zero)).shape == (4, 3)


def _score_on_a_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sweep = OverlapSweep(THRESHOLDS)
    for seed in [(0, 1, 2), (3, 0)][rank]:  # of unequal length, and image 0 twice
        add(sweep, seed, patient=f"p{seed % 2}", phrases=("lumen", "cap") if seed < 3 else ("épicarde",))
    torch.save(sweep.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree_with_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_score_on_a_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = OverlapSweep(THRESHOLDS)
    for seed in range(4):
        add(alone, seed, patient=f"p{seed % 2}", phrases=("lumen", "cap") if seed < 3 else ("épicarde",))
    expected = alone.compute()
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], value)
