"""Layout `phrases`: one folder of PNG masks a phrase."""

from __future__ import annotations

from vessel.data.phrases import normal_phrase
from vessel.data.readers.layout import Labels, SourceLayout, SourcePaths, list_files, list_folders
from vessel.data.readers.masks import read_masks
from vessel.errors import Problem


def _is_present(paths: SourcePaths) -> bool:
    return any(list_files(folder, ".png") for folder in list_folders(paths.folder / "masks"))


def _read(paths: SourcePaths, _: str) -> tuple[Labels, list[Problem]]:
    labels: Labels = {}
    problems: list[Problem] = []
    phrases: set[str] = set()
    for folder in list_folders(paths.folder / "masks"):
        phrase = normal_phrase(folder.name)
        if phrase in phrases or not phrase:
            problems.append(Problem(str(folder), f"a second folder of the phrase {phrase!r}", "merge or rename one"))
        phrases.add(phrase)
        of_phrase, bad = read_masks(list_files(folder, ".png"), phrase)
        problems += bad
        for key, label in of_phrase.items():
            labels.setdefault(key, {}).update(label)
    return labels, problems


LAYOUT = SourceLayout("masks/<phrase>/<stem>_mask.png, one folder per phrase", _is_present, _read)
