"""Write bench.md: the results of the bench, as tables that need no code to be understood."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench import scaling, startup

# Of each ratio: its title, and its requirement.
RATIOS = {
    "train_step": ("training step", "at least 2 times faster"),
    "peak_memory": ("peak memory of training", "at most 0.6 of it"),
    "cached_epoch": ("epoch of training from the feature cache, against one without", "at least 3 times faster"),
    "predict_phrases": ("prediction of 4 phrases an image, answers given", "at least 3 times faster"),
    "one_pass": ("prediction of 4 phrases an image, given against generated one by one", "at least 4 times faster"),
}


def table(found: Mapping[str, Any]) -> str:
    """Format the results of `python -m bench` as Markdown."""
    sections = [
        *(_machine(found), _ratios(found), _parts(found)),
        *(scaling.table(found["scaling"]), startup.table(found["startup"])),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _machine(found: Mapping[str, Any]) -> list[str]:
    own = found["machine"]
    description = f"{own['cores']} CPU cores ({own['processor']}), {own['threads']} threads, torch {own['torch']}"
    lines = [f"`python -m bench`, {description}, float32. Medians of runs in turns.", ""]
    lines += [f"- **{name}**: {text}" for name, text in found["networks"].items()]
    kept, flop = found["cache"], found["flop"]
    filled = f"filled once in {kept['fill_seconds']:.1f} s"
    return [
        *lines,
        f"- feature cache of **encoders**: {kept['images']} images of {kept['image_bytes'] / 1e6:.1f} MB, {filled}",
        f"- step of **small**: {flop['step'] / 1e9:.0f} GFLOP, {flop['per_second'] / 1e9:.0f} a second, "
        f"{flop['share']:.0%} of what a product of two large matrices reaches here",
    ]


def _ratios(found: Mapping[str, Any]) -> list[str]:
    lines = ["| | network | product | reference | ratio | wanted |", "|---|---|---|---|---|---|"]
    for name, (description, wanted) in RATIOS.items():
        pairs, network = found["pairs"][name], "encoders" if name == "cached_epoch" else "small"
        own, other = (statistics.median(pairs[mode]) for mode in ("product", "reference"))
        ratio = found["ratios"][name]
        if pairs["unit"] == "bytes":
            cells = f"{own / 1e9:.2f} GB | {other / 1e9:.2f} GB | **{ratio:.2f}**"
        else:
            cells = f"{own:.2f} s | {other:.2f} s | **{ratio:.1f}**"
        lines.append(f"| {description} | {network} | {cells} | {wanted} |")
    return lines


def _parts(found: Mapping[str, Any]) -> list[str]:
    columns = {
        f"{name}, {mode}": parts for name, modes in found["parts"].items() for mode, parts in modes.items()
    }  # fmt: skip
    names = list(dict.fromkeys(part for parts in columns.values() for part in parts))
    rows = {name: [f"{parts.get(name, 0.0):.3f}" for parts in columns.values()] for name in names}
    rows["**together**"] = [f"{sum(parts.values()):.3f}" for parts in columns.values()]
    rates = found["images_per_second"]
    rows["**images a second**"] = [
        f"{rates[name][mode]:.2f}" for name, modes in found["parts"].items() for mode in modes
    ]
    lines = [f"| seconds of a training step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
