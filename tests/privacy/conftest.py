"""A mapping of invented names, and the scanner that knows it."""

import json

import pytest

from vessel.privacy.scanner import Scanner

ID = "0012345678"
NAMES = ("Quillon Marsh Vex", "ana bell", "j_d", "O'Dwyer Una", "Zoë Müller", "홍보기", "Invented")
PATIENTS = (ID, "anabell", "7654321", "001")
STEMS = (
    "inventa_0001",
    "001_1_095",
    "scan (7) left",
    "case (8)",
    "5_1_12",
    f"Quillon Marsh Vex^({ID})_1-2_003_frame_000042",
)


def write_mapping(folder, *, names=(), patients=(), stems=()):
    """Write the mapping of a data set into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"patients": dict.fromkeys(patients, "p1"), "files": dict.fromkeys(stems, "p1_v1_000001")}
    (folder / "mapping.json").write_text(json.dumps({**kept, "names": list(names)}))
    return folder


@pytest.fixture
def scanner(tmp_path):
    return Scanner(write_mapping(tmp_path / "set.identity", names=NAMES, patients=PATIENTS, stems=STEMS))
