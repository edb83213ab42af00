"""The Checklist for AI in Medical Imaging, 2024 update (Tejani et al., Radiology: AI 2024, 6(4), e240300).

Its 44 items by number, with topics in our own words. Facts of the run are filled in; the others are left to the
authors of the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vessel.reporting.blocks import Cell, Table, cell
from vessel.reporting.tables import part_name, plural

ITEMS: Mapping[int, tuple[str, str]] = {
    1: ("Title", "Says that it is a study of AI, and of which kind"),
    2: ("Abstract", "Design, methods, results, conclusions in short"),
    3: ("Introduction", "Background; intended use and role of the method"),
    4: ("Introduction", "Aims and hypotheses"),
    5: ("Study design", "Prospective or retrospective"),
    6: ("Study design", "Goal of the study"),
    7: ("Data", "Where the data come from"),
    8: ("Data", "Who was included and who was not"),
    9: ("Data", "Pre-processing"),
    10: ("Data", "Which subset was used, and why"),
    11: ("Data", "De-identification"),
    12: ("Data", "Missing data"),
    13: ("Data", "How images were acquired"),
    14: ("Reference standard", "How it was made"),
    15: ("Reference standard", "Why this one"),
    16: ("Reference standard", "Who annotated, with which training"),
    17: ("Reference standard", "Annotation of the test images"),
    18: ("Reference standard", "Agreement between and within annotators"),
    19: ("Partitions", "How images were assigned to parts"),
    20: ("Partitions", "What the parts do not share"),
    21: ("Test data", "Intended sample size"),
    22: ("Model", "Description of the network"),
    23: ("Model", "Software and versions"),
    24: ("Model", "Initial weights"),
    25: ("Training", "How it was trained"),
    26: ("Training", "How the final model was chosen"),
    27: ("Training", "Ensembles"),
    28: ("Evaluation", "Metrics"),
    29: ("Evaluation", "Uncertainty and significance"),
    30: ("Evaluation", "Robustness and sensitivity"),
    31: ("Evaluation", "Explainability"),
    32: ("Evaluation", "Evaluation on internal data"),
    33: ("Evaluation", "Testing on external data"),
    34: ("Evaluation", "Registration as a clinical trial"),
    35: ("Results: data", "Patients and images included and excluded"),
    36: ("Results: data", "Demographic and clinical characteristics of the parts"),
    37: ("Results: performance", "Performance with its uncertainty"),
    38: ("Results: performance", "Diagnostic performance and its precision"),
    39: ("Results: performance", "What went wrong"),
    40: ("Discussion", "Limits of the study"),
    41: ("Discussion", "What it means for practice"),
    42: ("Other", "Where the full protocol is"),
    43: ("Other", "Availability of software, model and data"),
    44: ("Other", "Funding"),
}
NETWORKS = {
    "sa2va": "a vision-language network (Sa2VA: InternVL, whose [SEG] token prompts the mask decoder of SAM 2)",
    "sam2_prompt": "SAM 2 with a learned prompt for each phrase instead of a language model",
    "unet": "a U-Net with one output channel a phrase",
}
_AUTHORS = "To be written by the authors."
_PARTED = {
    "patient": "No patient is in two parts.",
    "block": "Parts are blocks of consecutive frames, not patients: patients of the test part were trained on.",
    "frame": "Parts are single frames, not patients: patients, even videos, of the test part were trained on.",
}


def claim_table(report: Mapping[str, Any], limits: Sequence[str]) -> Table:
    """Make a table of all items with the facts of the run about them.

    Args:
        report: the content of metrics.json.
        limits: warnings of the page, for item 40.
    """
    facts = _of_data(report) | _of_network(report) | _of_evaluation(report, limits)
    rows = []
    for number, (section, topic) in ITEMS.items():
        text = facts.get(number)
        filled = cell(text) if text else cell(_AUTHORS, tone="quiet")
        rows.append([cell(number), Cell((topic,), (section,)), filled])
    head = [cell("item"), cell("topic"), cell("from this run")]
    known = sum(1 for number in ITEMS if facts.get(number))
    caption = f"CLAIM, 2024 update: {known} of {len(ITEMS)} items have something from the run, in full or in part"
    return Table(caption, head, rows, left_aligned=True)


def _of_data(report: Mapping[str, Any]) -> dict[int, str]:
    data, unit = report["data"], str(report["unit"])
    n_images = report["n_ok"] + report["n_failed"]
    return {
        7: f"Data set {data['name']}, fingerprint {data['fingerprint']}. Origin and permission: the authors.",
        10: f"{part_name(report).capitalize()}: {n_images} {plural('image', n_images)}.",
        11: "Patients, videos and files carry pseudonyms made on import; the mapping is kept outside the data set, and "
        "images are stored without metadata. Text burnt into pixels has to be checked by the authors.",
        12: "A missing mask is refused when the data set is made; a phrase that an image does not show is declared so. "
        f"{report['n_failed']} {plural('image', report['n_failed'])} could not be processed: listed and not scored.",
        14: "Binary masks at the images' own resolution, kept without loss. How they were drawn: the authors.",
        19: f"By {unit}, written to a file before training (hash {data['split_hash']}).",
        20: _PARTED.get(unit, ""),
        35: f"Scored: {report['n_ok']} {plural('image', report['n_ok'])}"
        + "".join(f", {data[key]} {key.removeprefix('n_')}" for key in ("n_videos", "n_patients") if data.get(key))
        + f". Left out because they failed: {report['n_failed']}. Left out before the data set was made: the authors.",
    }


def _of_network(report: Mapping[str, Any]) -> dict[int, str]:
    manifest = report.get("manifest") or {}
    config = manifest.get("config") or {}
    network = NETWORKS.get(str(report.get("network")), str(report.get("network") or "a network"))
    versions = ", ".join(f"{name} {value}" for name, value in (manifest.get("versions") or {}).items())
    weights = manifest.get("weights") or ()
    sources = "; ".join(f"{one.get('source')} (fingerprint {one.get('fingerprint')})" for one in weights)
    tta = (report.get("decision") or {}).get("tta") or ()
    return {
        1: f"Deep learning: {network}.",
        22: f"{network[0].upper()}{network[1:]}; weights {report['fingerprint']}. Its sizes are in the configuration "
        "of the run, above.",
        23: versions,
        24: f"From {sources}." if sources else ("Random." if config else ""),
        25: _training(config),
        26: f"Weights: {report['fingerprint']}. Threshold: {report['threshold_source']}.",
        27: f"One network; probabilities averaged by test-time augmentation: {', '.join(tta)}."
        if tta
        else "None: one network, one pass.",
    }


def _training(config: Mapping[str, Any]) -> str:
    """Describe the most important settings of the training, where the configuration has them."""
    keys = {
        "seed": ("seed",),
        "learning rate": ("optimizer", "lr"),
        "weight decay": ("optimizer", "weight_decay"),
        "images a step": ("data", "batch_size"),
        "accumulated steps": ("trainer", "accumulate_grad_batches"),
        "most steps": ("trainer", "max_steps"),
        "most epochs": ("trainer", "max_epochs"),
        "LoRA rank": ("lora", "r"),
        "precision": ("trainer", "precision"),
    }
    settings = []
    for label, path in keys.items():
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and value != -1:
            settings.append(f"{label} {value}")
    return f"{'; '.join(settings)}. The rest: configuration of the run, above." if settings else ""


def _of_evaluation(report: Mapping[str, Any], limits: Sequence[str]) -> dict[int, str]:
    titles = ", ".join(metric["title"] for metric in (report.get("metrics") or {}).values())
    dice = ((report.get("summary") or {}).get("all") or {}).get("dice") or {}
    same, unit = report["data"].get("same_as_run"), dice.get("unit")
    on = f"{report['data']['name']}, {part_name(report)}"
    return {
        28: f"{titles}; each with its rule for empty masks, under the table of scores." if titles else "",
        29: f"95 % bootstrap intervals over {unit}s. A mean is taken over the images of a video, the videos of a "
        "patient, then patients."
        if unit
        else "",
        30: "What each choice made on validation changed is in the table of choices." if report.get("searched") else "",
        32: f"{on}: of the data set that the network was trained on." if same else "",
        33: "" if same else f"{on}: not the data set of a training run of vessel.",
        37: "The table of scores, with interval and n beside each mean." if dice else "",
        38: "Precision and recall of pixels are in the table of scores. Per patient: the authors." if dice else "",
        39: "The worst image with its errors, scores of every patient, and the images that failed are in this report.",
        40: " ".join(limits),
        43: f"vessel {((report.get('manifest') or {}).get('versions') or {}).get('vessel', '')}".strip()
        + f"; weights are known by their fingerprint {report['fingerprint']}. Where they and the data can be had: "
        "the authors.",
    }
