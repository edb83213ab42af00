"""The model card: valid for the hub, and nothing in it that nobody measured."""

import json
from dataclasses import asdict, replace

import pytest
from huggingface_hub import ModelCard

from vessel.inference.decision import Decision
from vessel.metrics.scores import METRICS, Scores
from vessel.metrics.summary import ImageScore, summarise
from vessel.publishing.card import CardContent, model_card
from vessel.runs.manifest import Manifest

MANIFEST = Manifest(
    name="oct",
    config={"weights": [{"source": "hf://owner/Sa2VA-8B"}]},
    data={
        "name": "oct1220", "fingerprint": "d" * 64, "split_hash": "e" * 64, "unit": "patient",
        "note": "Blocks are near.", "n_images": 20, "n_patients": 5, "n_videos": 7, "fold": None,
    },
    phrases=("lumen", "side branch"),
    prompt="qwen_chat",
    parent={"name": "oct", "fingerprint": "abc"},
    threshold=0.3125,
    fingerprint="0123abc",
    versions={},
)  # fmt: skip
ROWS = [
    ImageScore(f"i{i}", f"p{i % 2}", f"v{i % 2}", phrase, True, Scores(dice, *[0.5] * 5, 4.25, 0.5, 1, None))
    for i, dice in enumerate((0.7, 0.8, 0.9, 0.6))
    for phrase in MANIFEST.phrases
]
REPORT = {
    "data": {"name": "oct1220"}, "split": "test", "threshold": 0.3125, "n_ok": 4, "n_failed": 1,
    "note": "Few patients.", "length_unit": "mm", "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
    "summary": json.loads(json.dumps(summarise(ROWS))),
}  # fmt: skip
FACTS = CardContent(MANIFEST, "sa2va", "bf16", ["owner/Sa2VA-8B"], has_code=True, evaluation=REPORT)


@pytest.mark.parametrize("layout", ["sa2va", "native", "adapter"])
def test_the_hub_reads_its_front_matter(layout):
    card = ModelCard(model_card(replace(FACTS, layout=layout)))
    assert card.data.base_model == ["owner/Sa2VA-8B"]
    assert card.data.pipeline_tag == "image-segmentation"
    assert {"sa2va", "medical"} <= set(card.data.tags)
    assert card.text.startswith("# oct\n")


def test_it_says_what_manifest_and_evaluation_say():
    text = model_card(FACTS)
    scores = REPORT["summary"]["lumen"]["dice"]
    for fact in (
        "lumen, side branch", "20 images, 5 patients, 7 videos", "by patient", "0.31, chosen on the validation part",
        "`0123abc`", "`abc`", "Blocks are near.", "Few patients.", "4 images scored, 1 failed",
        "bootstrap over patients",
        f"| lumen | Dice | 0.750 | {scores['low']:.3f} to {scores['high']:.3f} | 4 | 2 | 2 |",
        "| lumen | HD95, mm | 4.250 | 4.250 to 4.250 | 4 | 2 | 2 |",
        "For research",
    ):  # fmt: skip
        assert fact in text, fact
    assert text.count("| Dice |") == 3
    assert "alibration error" not in text  # no probability was scored, so nothing is claimed
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## What it is", "## Evaluation", "## Intended use", "## Limits", "## How to load"
    ]  # fmt: skip


def test_it_tells_the_whole_decision_of_validation():
    decision = Decision(0.4, 0.2, tta=("flip_lr",)).to_json()
    text = model_card(replace(FACTS, manifest=replace(MANIFEST, decision=decision)))
    told = "threshold 0.40, hysteresis from 0.20, mean over the image and flip_lr; searched on the validation part"
    assert f"| threshold on probabilities | {told} |" in text


def test_without_an_evaluation_it_says_so():
    text = model_card(replace(FACTS, evaluation=None))
    assert "No evaluation of these weights was at hand" in text
    assert "Dice" not in text


def test_how_to_load_depends_on_what_is_there():
    assert "trust_remote_code=True" in model_card(FACTS)
    without = model_card(replace(FACTS, has_code=False))
    assert "trust_remote_code" not in without
    assert "remote_code=FOLDER" in without
    adapter = model_card(replace(FACTS, layout="adapter"))
    assert "PeftModel.from_pretrained" in adapter
    assert "network.base=[BASE]" in adapter
    assert "The public code builds the large SAM2 only." in model_card(
        replace(FACTS, remarks=["The public code builds the large SAM2 only."])
    )


def test_of_random_or_local_weights_no_base_is_claimed():
    local = replace(FACTS, bases=[])
    assert ModelCard(model_card(local)).data.base_model is None
    assert "| base weights | a local folder |" in model_card(local)
    scratch = replace(local, manifest=replace(MANIFEST, config={"weights": []}))
    assert "| base weights | none, random |" in model_card(scratch)
