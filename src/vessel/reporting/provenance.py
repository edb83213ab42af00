"""Report blocks on the origin of the numbers: failures, decision, data, weights, run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vessel.reporting.blocks import Block, Cell, Code, Details, Number, Table, Text, cell, facts_table
from vessel.reporting.claim_checklist import NETWORKS
from vessel.reporting.tables import POOLED, part_name, spacing_text


def failure_blocks(report: Mapping[str, Any]) -> list[Block]:
    """List the images that could not be processed, with the reason."""
    failures = report.get("failures") or ()
    if not failures:
        return [Text((f"None: all {report['n_ok']} images were processed.",))]
    head = [cell("image"), cell("file"), cell("reason")]
    rows = [[cell(one["id"]), cell(one["file"]), cell(one["reason"])] for one in failures]
    n, total = report["n_failed"], report["n_ok"] + report["n_failed"]
    caption = f"{n} of {total} images could not be processed and are in no score"
    table = Table(caption, head, rows, left_aligned=True)
    return [table] if len(rows) <= 20 else [Text((f"{caption}.",)), Details("All of them", [table])]


def decision_blocks(report: Mapping[str, Any], mark: str) -> list[Block]:
    """Describe threshold and post-processing, and the choices that the search tried."""
    decision = report.get("decision") or {}
    cleanup = decision.get("cleanup") or {}
    steps = [f"{name.replace('_', ' ')} {value}" for name, value in cleanup.items() if value and value is not True]
    steps += [name.replace("_", " ") for name, value in cleanup.items() if value is True]
    facts = [
        ("threshold", "of each fold" if report["threshold"] is None else f"{report['threshold']:.2f}"),
        ("chosen", str(report["threshold_source"])),
        ("hysteresis", _hysteresis(decision.get("hysteresis"))),
        ("clean-up", ", ".join(steps) or "none"),
        ("test-time augmentation", ", ".join(decision.get("tta") or ()) or "the image alone"),
    ]
    blocks: list[Block] = [facts_table("Threshold and post-processing, chosen before this evaluation", facts)]
    if searched := report.get("searched"):
        tried = _generic("Choices on validation, in the order in which they were tried", searched, mark)
        blocks.append(Details("Choices that were tried on validation, with their effect", [tried]))
    return blocks


def _hysteresis(low: float | None) -> str:
    return "none" if low is None else f"pixels above {low:.2f} that connect to one above the threshold"


def _generic(caption: str, entries: Sequence[Mapping[str, Any]], mark: str = "") -> Table:
    """Make a table with the columns that its entries have."""
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    rows = [[_any_cell(entry.get(column)) for column in columns] for entry in entries]
    head = [cell(column.replace("_", " ")) for column in columns]
    return Table(caption, head, rows, mark, left_aligned=True)


def _any_cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return cell("yes" if value else "no")
    if isinstance(value, float):
        return Cell((Number(f"{value:.4g}".replace("-", "−"), value),))
    if isinstance(value, list | tuple):
        return cell(", ".join(map(str, value)))
    if isinstance(value, Mapping):
        return cell(", ".join(f"{key} {part}" for key, part in value.items()))
    return cell("–" if value is None else value)


def data_blocks(report: Mapping[str, Any]) -> list[Block]:
    """Describe the data set, its split, and the uses of its test part."""
    data, spacing = report["data"], report.get("pixel_spacing")
    keys = ("n_images", "n_videos", "n_patients")
    counts = [f"{data[key]} {key.removeprefix('n_')}" for key in keys if data.get(key)]
    facts = [
        ("data set", str(data["name"])),
        ("fingerprint", str(data["fingerprint"])),
        ("that of the run", "yes" if data.get("same_as_run") else "no"),
        ("counts", ", ".join(counts)),
        ("phrases", ", ".join(report.get("phrases") or ())),
        ("pixel spacing", "not stated, so distances are in pixels" if spacing is None else spacing_text(spacing)),
        ("scored", part_name(report)),
        ("fold", "" if report.get("fold") in (None, POOLED) else str(report["fold"])),
        ("split by", str(report["unit"])),
        ("split hash", str(data["split_hash"])),
        ("note", str(report.get("note") or "")),
    ]
    blocks: list[Block] = [facts_table("Scored data", facts)]
    if uses := report.get("test_uses"):
        head = [cell("time"), cell("weights"), cell("threshold and post-processing")]
        rows = [[cell(_short(one.get(key))) for key in ("time", "fingerprint", "decision")] for one in uses]
        blocks.append(
            Details(f"Uses of the test part by this run: {len(uses)}", [Table("", head, rows, left_aligned=True)])
        )
    return blocks


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def run_blocks(report: Mapping[str, Any]) -> list[Block]:
    """Describe the weights and the run that made them."""
    manifest = report.get("manifest") or {}
    parent = manifest.get("parent") or {}
    facts = [
        ("run", str(report["run"])),
        ("network", NETWORKS.get(str(report.get("network")), str(report.get("network") or ""))),
        ("weights", str(report["fingerprint"])),
        ("read from", str(report.get("source") or "")),
        ("trained", str(manifest.get("created") or "")),
        ("parent", f"{parent.get('name')}, {parent.get('fingerprint')}" if parent else ""),
        ("started from", "; ".join(_base(one) for one in manifest.get("weights") or ())),
        ("evaluated", str(report.get("created") or "")),
        ("versions", ", ".join(f"{name} {value}" for name, value in (manifest.get("versions") or {}).items())),
    ]
    blocks: list[Block] = [facts_table("Origin of the numbers", facts)]
    if folds := report.get("folds"):
        blocks.append(_generic("Runs of the folds, each on the images that it did not train on", folds))
    if config := manifest.get("config"):
        blocks.append(Details("Configuration of the run", [Code(json.dumps(config, indent=1, ensure_ascii=False))]))
    return blocks


def _base(weights: Mapping[str, Any]) -> str:
    parts = [str(weights.get(key)) for key in ("source", "kind", "revision", "fingerprint") if weights.get(key)]
    return ", ".join(parts)
