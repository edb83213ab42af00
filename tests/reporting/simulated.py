"""Results folders as `vessel.evaluate` writes them, made of synthetic frames and probabilities by the real metrics."""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter

from vessel.data.synthetic.anatomy import draw_pullback
from vessel.data.synthetic.oct import render
from vessel.evaluation.results import rows_hash, seal
from vessel.inference.decision import Decision
from vessel.metrics.calibration import Reliability
from vessel.metrics.scores import METRICS, score
from vessel.metrics.summary import ImageScore, per_patient, summarise, write_per_image_csv
from vessel.plotting.panels import panel_figure

PHRASES = ("lumen", "side branch", "lipid core")
SPACING = (0.02, 0.02)
DECISION = Decision(threshold=0.35)
SEARCHED = [
    {"option": "threshold", "value": 0.35, "gain": 0.0121, "low": 0.0032, "high": 0.0204, "adopted": True},
    {"option": "tta", "value": ["flip_horizontal"], "gain": 0.0004, "low": -0.001, "high": 0.002, "adopted": False},
]


def frames(patients=7, videos=2, each=3, *, size=64, seed=0):
    """Yield (patient, video, id, image, masks) of synthetic pullbacks."""
    for patient in range(patients):
        for video in range(1 + patient % videos):
            rng = np.random.default_rng([seed, patient, video])
            pullback = draw_pullback(rng, 12.0)
            name = f"p{0x7F3A91C2 + 7919 * patient:08x}"
            for index in range(each):
                image, masks = render(pullback, 12.0 * (index + 0.5) / each, size, rng)
                yield name, f"{name}_v{video + 1}", f"{name}_v{video + 1}_{index:06d}", image, masks


def probability_of(mask, rng, skill):
    """Simulate a network of this skill: probabilities by the signed distance to the border, misplaced and blurred."""
    size = len(mask)
    outside = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, size / 9.0)
    signed = distance_transform_edt(mask) - outside
    wobble = gaussian_filter(rng.standard_normal(mask.shape), size / 14)
    logits = signed / (size / 60) + (1 - skill) * 7 * wobble / wobble.std() - 0.4
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def write_results(
    folder: Path,
    *,
    run="lora_r128",
    network="sa2va",
    patients=7,
    phrases=PHRASES,
    skill=0.9,
    size=64,
    real=False,
    **changes,
) -> dict:
    """A whole results folder; `changes` replace keys of metrics.json. Returns its content."""
    rng = np.random.default_rng(0)
    rows, reliability, drawn = [], defaultdict(Reliability), {}
    for patient, video, name, image, masks in frames(patients, size=size):
        true_masks = np.stack([masks.get(phrase, np.zeros(image.shape[:2], bool)) for phrase in phrases])
        own = skill - 0.04 * (int(patient[1:], 16) % 5)
        maps = np.stack([probability_of(mask, rng, own - 0.06 * i) for i, mask in enumerate(true_masks)])
        drawn[name] = image, true_masks, maps
        for phrase, mask, probability in zip(phrases, true_masks, maps, strict=True):
            scores = score(probability, DECISION(probability), mask, spacing=SPACING, tolerance=0.04)
            rows.append(ImageScore(name, patient, video, phrase, bool(mask.any()), scores))
            for of in (phrase, "all"):
                reliability[of].add(probability, mask)
    folder.mkdir(parents=True, exist_ok=True)
    write_per_image_csv(folder / "per_image.csv", rows)
    by_metric = {metric: per_patient(rows, metric) for metric in METRICS}
    report = {
        **_facts(phrases, len({row.id for row in rows}), patients, run, network),
        "summary": summarise(rows),
        "patients": {of: {m: found[of] for m, found in by_metric.items()} for of in ("all", *phrases)},
        "reliability": {of: one.bins() for of, one in reliability.items()},
        "curve": _curve(),
        "rows_hash": rows_hash(folder / "per_image.csv"),
        "panels": _draw(folder, rows, drawn, real),
    }
    report |= changes
    report["hash"] = seal(report)
    (folder / "metrics.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    return report


def _facts(phrases, images, patients, run, network):
    digest = hashlib.sha256(run.encode()).hexdigest()
    use = {"time": "2026-11-21T10:00:00+00:00", "fingerprint": digest, "decision": DECISION.to_json()}
    data = {"name": "synthetic_oct", "fingerprint": "7f84eb2d3c10", "split_hash": "c0ffee00"}
    counts = {"n_images": 6 * images, "n_patients": 5 * patients, "n_videos": 8 * patients}
    return {
        "run": run, "source": f"outputs/{run}/2026-11-20/checkpoints/best.ckpt", "network": network,
        "fingerprint": digest, "created": "2026-11-21T10:00:00+00:00", "data": {**data, "same_as_run": True, **counts},
        "split": "test", "unit": "patient", "fold": None, "phrases": list(phrases), "note": "",
        "decision": DECISION.to_json(), "threshold": DECISION.threshold, "threshold_source": "searched on validation",
        "searched": SEARCHED, "pixel_spacing": list(SPACING), "length_unit": "mm", "tolerance": 0.04,
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()}, "n_ok": images, "n_failed": 1,
        "failures": [{"id": "p7f3a91c2_v1_000099", "file": "images/p7f3a91c2_v1_000099.png", "reason": "cut short"}],
        "seg_missing": 0.0, "test_uses": [use], "manifest": _manifest(phrases, digest, run, data),
    }  # fmt: skip


def _manifest(phrases, digest, run, data):
    config = {
        "name": run, "seed": 0, "optimizer": {"lr": 4e-5, "weight_decay": 0.05}, "lora": {"r": 128},
        "data": {"root": "(a local folder)", "batch_size": 1}, "trainer": {"max_epochs": 1, "max_steps": -1},
    }  # fmt: skip
    base = {"source": "ByteDance/Sa2VA-InternVL3-8B", "kind": "sa2va", "revision": "0a1b2c3d", "fingerprint": "5eed"}
    return {
        "name": run, "config": config, "data": data, "phrases": list(phrases), "prompt": "sa2va", "weights": [base],
        "parent": None, "threshold": 0.35, "fingerprint": digest, "created": "2026-11-20T18:00:00+00:00",
        "versions": {"python": "3.11.7", "vessel": "0.1.0", "torch": "2.15.0"},
    }  # fmt: skip


def _curve():
    """The shape that validation usually has: recall falls, precision rises, Dice has its best in between."""
    thresholds = np.round(np.arange(0.05, 0.96, 0.05), 2)
    precision, recall = 0.55 + 0.42 * thresholds, 0.97 - 0.5 * thresholds**1.6
    dice = 2 * precision * recall / (precision + recall)
    curve = {"threshold": thresholds, "dice": dice, "iou": dice / (2 - dice), "precision": precision, "recall": recall}
    return {name: values.tolist() for name, values in curve.items()}


def _draw(folder, rows, drawn, real):
    """Panels; unless `real`, of a few pixels, as Matplotlib takes a second for each."""
    (folder / "panels").mkdir(exist_ok=True)
    dice = defaultdict(dict)
    for row in rows:
        dice[row.id][row.phrase] = row.scores.dice
    means = {name: float(np.mean(list(values.values()))) for name, values in dice.items()}
    ranked = sorted(means, key=means.get)
    chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0], "first_1": next(iter(means))}
    for kind, name in chosen.items():
        image, true_masks, maps = drawn[name]
        file = folder / f"panels/{kind}_{name}.png"
        if real:
            labels = [f"{phrase} · Dice {value:.3f}" for phrase, value in dice[name].items()]
            panel_figure(image, true_masks, maps, threshold=DECISION.threshold, labels=labels, title=name).savefig(file)
        else:
            Image.fromarray(image[:8, :8]).save(file)
    return [
        {"file": f"panels/{kind}_{name}.png", "id": name, "kind": kind, "dice": means[name]}
        for kind, name in chosen.items()
    ]
