"""constraints.txt holds what pyproject.toml asks for, at versions that it accepts."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
ASKED = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(line for lines in EXTRAS.values() for line in lines),
]
REQUIREMENTS = [one for one in map(Requirement, ASKED) if one.name != PROJECT["project"]["name"]]


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})


def _pulled_in() -> dict[str, str]:
    """Return the installed version of all that the requirements pull in, by canonical name."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [one for one in REQUIREMENTS if _applies(one, set())]
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            pytest.fail(f"{requirement} is not installed: run `make setup`")
        versions[key[0]] = found.version
        waiting += [one for one in map(Requirement, found.requires or []) if _applies(one, set(requirement.extras))]
    return versions


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_has_a_pin_that_satisfies_it(requirement: Requirement) -> None:
    pin = _pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt has no {requirement.name}, which pyproject.toml asks for"
    assert requirement.specifier.contains(pin, prereleases=True), (
        f"constraints.txt has {requirement.name}=={pin}; pyproject.toml asks for {requirement}"
    )


def test_what_is_installed_is_what_is_pinned() -> None:
    pins = _pins()
    pulled_in = _pulled_in()
    assert len(pulled_in) > len(REQUIREMENTS) // 2
    other = {name: (version, pins.get(name)) for name, version in pulled_in.items() if pins.get(name) != version}
    assert not other, f"installed and pinned versions differ (installed, constraints.txt): {other}"
