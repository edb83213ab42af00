"""Format the results of `bench.gpu` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.pieces import LANGUAGE


def report(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format the lines of a page.

    Args:
        found: results of `bench.gpu.chapters.measure`, by the name of the size; any chapter may be missing.
    """
    lines = ["# Training and prediction at true sizes", ""]
    for size, measured in found.items():
        lines += [f"## {size}", "", *_size(measured), ""]
    return lines


def _size(measured: Mapping[str, Any]) -> Iterator[str]:
    if "ended" in measured:
        yield f"Not complete: {measured['ended']}."
        yield ""
    for title, chapter in measured.items():
        if title in ("model", "ended"):
            continue
        if isinstance(chapter, Mapping) and "left_out" in chapter:
            yield f"{title}: left out, {chapter['left_out']}."
        elif title in _RENDERERS:
            yield from _RENDERERS[title](chapter, measured)
        else:
            continue
        yield ""


def _machine(chapter: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[str]:
    memory = f", {chapter['gb']:.0f} GB" if "gb" in chapter else ""
    yield (
        f"{chapter['device']}{memory}, torch {chapter['torch']}; a product of large bf16 matrices reaches "
        f"{chapter['matrix_rate'] / 1e12:.2f} TFLOP/s here. Fractions below are of that rate, by the operations that "
        "the product needs, in the reference too."
    )


def _training(title: str) -> Any:
    def render(chapter: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> Iterator[str]:
        each = sum(map(sum, _costs(measured).values()))
        yield from _table((title, "batch", "samples/s", "peak GB", "fraction of the matrix rate"))
        for row in chapter:
            # With cached features the encoders do nothing, and so have no operations to be counted.
            fraction = "" if "cached" in row["mode"] else _fraction(row["samples_per_second"] * each, measured)
            yield _row(row["mode"], row["batch"], f"{row['samples_per_second']:.2f}", f"{row['peak_gb']:.1f}", fraction)

    return render


def _parts(chapter: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[str]:
    batch, seconds = chapter["batch"], chapter["seconds"]
    total = sum(times["both"] for times in seconds.values())
    yield from _table((f"part, batch of {batch}", "ms, forward", "ms, with backward", "of all", "TFLOP", "matrix rate"))
    for part, times in seconds.items():
        done = sum(_costs(measured).get(part, ())) * batch
        yield _row(
            part,
            f"{1e3 * times['forward']:.1f}",
            f"{1e3 * times['both']:.1f}",
            f"{times['both'] / total:.0%}",
            f"{done / 1e12:.2f}",
            _fraction(done / times["both"], measured),
        )
    yield ""
    rate = sum(_costs(measured).get(LANGUAGE, ())) * batch / seconds[LANGUAGE]["both"]
    yield f"The language model does {_fraction(rate, measured)} of the matrix rate."


def _profile(chapter: Mapping[str, Any], _: Mapping[str, Any]) -> Iterator[str]:
    rows = chapter["operators"]
    longest = ", ".join(f"{row['operator']} ({row['share']:.0%})" for row in rows[:3])
    yield f"Longest in a step of {chapter['batch']} images: {longest}."
    yield ""
    yield from _table(("operator", "ms of a step", "of all"))
    yield from (_row(row["operator"], f"{1e3 * row['seconds']:.1f}", f"{row['share']:.1%}") for row in rows)


def _prediction(chapter: Sequence[Mapping[str, Any]], _: Mapping[str, Any]) -> Iterator[str]:
    yield from _table(("prediction", "phrases an image", "mode", "images/s"))
    for row in chapter:
        yield _row(row["decode"], row["phrases"], row["mode"], f"{row['images_per_second']:.2f}")


_RENDERERS = {
    "machine": _machine,
    "training": _training("training"),
    "training, checkpointing": _training("training, checkpointing"),
    "training, compiled": _training("training, compiled"),
    "parts": _parts,
    "profile": _profile,
    "prediction": _prediction,
}


def _costs(measured: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
    """Return the operations of one image by part; none where they were left out."""
    found: Mapping[str, Any] = measured.get("operations", {})
    return {} if "left_out" in found else found


def _fraction(rate: float, measured: Mapping[str, Any]) -> str:
    highest = measured.get("machine", {}).get("matrix_rate")
    return f"{rate / highest:.0%}" if rate and highest else "unknown"


def _table(columns: Sequence[str]) -> Iterator[str]:
    yield _row(*columns)
    yield "|---" * len(columns) + "|"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
