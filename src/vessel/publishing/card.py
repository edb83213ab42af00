"""The model card of an export: what its manifest and its evaluation say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from vessel.inference.decision import Decision
from vessel.runs.manifest import Manifest

_LIBRARIES = {"sa2va": "transformers", "native": "vessel", "adapter": "peft"}
_COUNTS = ("n_images", "n_videos", "n_patients")
HOW_TO_GET_CODE = (
    "To load it with the public code, put that code's .py files (modeling_sa2va_chat.py and those beside it, from the "
    "hub folder of a Sa2VA with the same language model) beside config.json, or export again with remote_code=FOLDER"
)


@dataclass(frozen=True)
class CardContent:
    """The contents of a model card.

    Attributes:
        manifest: of the export, without places of this machine.
        layout, dtype: of its tensors.
        bases: hub ids of what the training started from.
        has_code: the public code lies beside its config.json.
        evaluation: report of `vessel.evaluate` on the test part with these very weights; None where there is none.
        remarks: sentences on how to load it.
    """

    manifest: Manifest
    layout: str
    dtype: str
    bases: Sequence[str]
    has_code: bool
    evaluation: Mapping[str, Any] | None
    remarks: Sequence[str] = ()


def model_card(content: CardContent) -> str:
    """README.md with the front matter of the hub."""
    manifest = content.manifest
    front = ModelCardData(
        library_name=_LIBRARIES[content.layout],
        pipeline_tag="image-segmentation",
        tags=["image-segmentation", "medical", "sa2va", "vessel"],
        base_model=list(content.bases) or None,
    )
    what = (
        f"A Sa2VA network trained by vessel to segment: {', '.join(manifest.phrases)}."
        if manifest.phrases
        else "A public Sa2VA network in another form; vessel did not train it."
    )
    parts = [
        f"---\n{front.to_yaml()}\n---\n# {manifest.name}\n\n{what}",
        _provenance(content),
        *([_evaluation(content), _use(manifest)] if manifest.phrases else ()),
        _loading(content),
    ]
    return "\n\n".join(parts) + "\n"


def _provenance(content: CardContent) -> str:
    manifest, data = content.manifest, content.manifest.data
    parent = (manifest.parent or {}).get("fingerprint")
    merged = "" if parent is None else f", made from checkpoint `{parent}`"
    unnamed = "a local folder" if manifest.config.get("weights") else "none, random"
    rows = [
        ("base weights", ", ".join(content.bases) or unnamed),
        ("weights", f"{content.layout}, {content.dtype}, fingerprint `{manifest.fingerprint}`{merged}"),
        ("made", manifest.created),
    ]
    if manifest.phrases:
        counts = ", ".join(
            f"{data[key]} {key.removeprefix('n_')}" for key in ("n_images", "n_patients", "n_videos") if key in data
        )
        fold = "" if data.get("fold") is None else f", fold {data['fold']} of it"
        rows = [
            ("data", f"{data.get('name')} ({counts}), fingerprint `{str(data.get('fingerprint'))[:16]}`"),
            ("split", f"by {data.get('unit')}, hash `{str(data.get('split_hash'))[:16]}`{fold}"),
            ("threshold on probabilities", _decision(manifest)),
            *rows,
        ]
    return "## What it is\n\n" + _table(("", ""), rows)


def _decision(manifest: Manifest) -> str:
    if manifest.decision is not None:
        return f"{Decision.from_json(manifest.decision)}; searched on the validation part"
    chosen = manifest.threshold
    return "none chosen, 0.5 is taken" if chosen is None else f"{chosen:.2f}, chosen on the validation part"


def _evaluation(content: CardContent) -> str:
    report = content.evaluation
    if report is None or not report["summary"]:
        return (
            "## Evaluation\n\nNo evaluation of these weights was at hand when this was written: how well it does is "
            "not known. `python -m vessel.evaluate` makes one."
        )
    rows = [
        (phrase, _title(report, score), f"{value['mean']:.3f}", _interval(value), *(str(value[n]) for n in _COUNTS))
        for phrase, scores in report["summary"].items()
        for score, value in scores.items()
        if value["mean"] is not None
    ]
    unit = report["summary"]["all"]["dice"]["unit"]
    told = [
        f"The {report['split']} part of {report['data']['name']} at threshold {report['threshold']:.2f}: "
        f"{report['n_ok']} images scored, {report['n_failed']} failed. Means are taken over the images of a video, "
        f"then over videos, then over patients. Intervals: bootstrap over {unit}s.",
        _table(("phrase", "score", "mean", "95 % interval", "images", "videos", "patients"), rows),
    ]
    return "\n\n".join(["## Evaluation", *told, *([report["note"]] if report["note"] else [])])


def _title(report: Mapping[str, Any], score: str) -> str:
    metric = report["metrics"][score]
    return f"{metric['title']}, {report['length_unit']}" if metric["unit"] == "length" else metric["title"]


def _interval(value: Mapping[str, Any]) -> str:
    return "none, a single one" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"


def _use(manifest: Manifest) -> str:
    phrases, data = ", ".join(manifest.phrases), manifest.data
    limits = [
        "For research. Nothing here says that it is fit for clinical use, and nobody should be treated by its masks.",
        f"It was trained on one data set of {data.get('n_patients')} patients. On images of another device, hospital "
        "or vessel it has to be evaluated first.",
        f"It was taught these phrases: {phrases}. What it draws for others is not known.",
        "Probabilities are not calibrated; a mask is what lies above the threshold.",
        *([str(data["note"])] if data.get("note") else []),
    ]
    listed = "\n".join(f"- {limit}" for limit in limits)
    return (
        f"## Intended use\n\nMasks of {phrases} in images like those it was trained on, for research on such images."
        f"\n\n## Limits\n\n{listed}"
    )


def _loading(content: CardContent) -> str:
    base = "" if content.layout != "adapter" else " network.base=[BASE]"
    ours = f"python -m vessel.predict ckpt=THIS_FOLDER images=FOLDER out=DIR{base}"
    phrase = (*content.manifest.phrases, "blood vessel")[0]
    parts = [f"## How to load\n\n```sh\n{ours}\n```"]
    if content.layout == "adapter":
        parts.append(
            "`adapter_model.safetensors` is what peft's `PeftModel.from_pretrained(language_model, THIS_FOLDER)` reads "
            "into the language model of the base (transformers' `Qwen2ForCausalLM`, or `LlamaForCausalLM` for "
            "InternLM2); `non_lora.safetensors` has the other trained tensors under their public names."
        )
    elif content.layout == "native":
        parts.append("The tensors have vessel's own names; `layout=sa2va` of vessel.export writes the public ones.")
    elif content.has_code:
        parts.append(
            "Or with the public code, whose files lie beside `config.json` and whose masks are cut at 0.5:\n\n"
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
            f'text = "<image>\\nPlease segment the {phrase} in this image."\n'
            "model.predict_forward(image=image, text=text, tokenizer=tokenizer)\n```"
        )
    else:
        parts.append(f"{HOW_TO_GET_CODE}.")
    return "\n\n".join([*parts, *content.remarks])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
