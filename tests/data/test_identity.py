"""Patients, videos and frames from file names, and what replaces them. All names are invented."""

import json
import re
import stat
from pathlib import Path

import pytest

from vessel.data.identity import GRAMMARS, RawIdentity, compile_grammar, parse, patient_keys, pseudonymise
from vessel.data.mapping import MappingFolder, read_mapping
from vessel.errors import BadItemsError, VesselError

ID = "0012345678"
SPELLINGS = {
    "A": f"Quillon Marsh Vex({ID})_1-2_003_0a1b2c3d",
    "B": f"Quillon_Marsh_Vex_{ID}__1-2_004_0a1b2c3e",
    "C caret": f"Quillon Marsh Vex^({ID})_1-2_005_0a1b2c3f",
    "C underscores": f"QUILLON_MARSH_VEX__{ID}__1-3_006_1a1b2c3f",
    "D": "quillon marsh vex",
    "D underscores": "quillon_marsh_vex",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_home_names_give_video_and_frame(spelling):
    video = SPELLINGS[spelling]
    assert parse(f"{video}_frame_000042", GRAMMARS) == RawIdentity(video, video, 42)


def test_study_numbers_give_patient_series_and_frame():
    assert parse("001_1_095", GRAMMARS) == RawIdentity("001", "001_1", 95)


@pytest.mark.parametrize("stem", ["image", "scan_12", "_frame_1"])
def test_other_names_are_not_guessed(stem):
    assert parse(stem, GRAMMARS) is None


def test_own_grammar():
    grammar = compile_grammar(r"case(?P<patient>\d+)-(?P<video>[LR])-(?P<frame>\d+)")
    assert parse("case7-L-12", grammar) == RawIdentity("7", "L", 12)
    assert parse("xcase7-L-12", grammar) is None
    assert parse("21", compile_grammar(r"(?P<patient>\d+)")) == RawIdentity("21", "21", None)


@pytest.mark.parametrize("identity", ["(", r"(?P<video>\d+)"])
def test_bad_grammar_is_refused(identity):
    with pytest.raises(VesselError, match="identity="):
        compile_grammar(identity)


def test_guard_D10_every_spelling_is_one_patient():
    keys, problems = patient_keys(SPELLINGS.values())
    assert problems == []
    assert set(keys.values()) == {ID}


def test_guard_D10_without_ids_the_normalised_name_decides():
    keys, _ = patient_keys(["Ana Bell^", "ana_bell", "ANA  BELL", "ana bella"])
    assert list(keys.values()) == ["anabell", "anabell", "anabell", "anabella"]


def test_guard_D10_two_ids_of_one_name_stay_apart_and_the_bare_name_is_a_problem():
    keys, problems = patient_keys([f"Ana Bell({ID})_1", "Ana Bell(0099999999)_1", "ana bell"])
    assert len(set(keys.values())) == 2
    assert [p.where for p in problems] == ["ana bell"]


def files(*videos):
    return [Path(f"{video}_frame_{n:06d}.jpg") for video in videos for n in (1, 5)]


def test_pseudonyms_tell_nothing_and_depend_on_the_salt():
    one = pseudonymise(files(*SPELLINGS.values(), "ana bell"), GRAMMARS, b"salt")
    assert len({i.patient for i in one.identities}) == 2
    assert len({i.video for i in one.identities}) == 7
    assert len({i.id for i in one.identities}) == 14
    assert all(re.fullmatch(r"p[0-9a-f]{8}_v\d_00000[15]", i.id) for i in one.identities)
    assert pseudonymise(files("ana bell"), GRAMMARS, b"salt").patients["anabell"] == one.patients["anabell"]
    assert pseudonymise(files("ana bell"), GRAMMARS, b"other").patients["anabell"] != one.patients["anabell"]


def test_names_without_identity_are_listed_all_at_once():
    with pytest.raises(BadItemsError) as caught:
        pseudonymise([Path("a.png"), *files("ana bell"), Path("b.png")], GRAMMARS, b"")
    assert [p.where for p in caught.value.problems] == ["a.png", "b.png"]
    assert "identity=" in str(caught.value)


def test_two_files_of_one_frame_are_a_problem():
    with pytest.raises(BadItemsError, match=r"001_1_05\.png: .* 001_1_5\.png"):
        pseudonymise([Path("001_1_5.png"), Path("001_1_05.png")], GRAMMARS, b"")


def test_frames_without_a_number_are_counted():
    grammar = compile_grammar(r"(?P<patient>\d+)(?P<video>[LR])[a-z]")
    files = [Path(f"{stem}.png") for stem in ("7La", "7Lb", "7Ra", "8La")]
    identities = pseudonymise(files, grammar, b"").identities
    assert [i.frame for i in identities] == [1, 2, 1, 1]
    assert [i.video[-2:] for i in identities] == ["v1", "v1", "v2", "v1"]


def keep(tmp_path, *videos):
    of = files(*videos)
    folder = MappingFolder(tmp_path / "set.identity")
    folder.write(b"salt", pseudonymise(of, GRAMMARS, b"salt"), [file.stem for file in of])
    return folder


def test_guard_D11_mapping_is_for_the_owner_only(tmp_path):
    folder = keep(tmp_path, *SPELLINGS.values())
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.path.iterdir()} == {0o600}
    assert folder.salt() == b"salt"
    kept = json.loads((folder.path / "mapping.json").read_text())
    assert kept["files"][f"{SPELLINGS['A']}_frame_000005"].endswith("_000005")
    assert list(kept["patients"]) == [ID]


def test_a_folder_of_the_users_keeps_its_mode_and_our_files_are_private(tmp_path):
    (tmp_path / "set.identity").mkdir()
    (tmp_path / "set.identity").chmod(0o750)
    folder = keep(tmp_path, "ana bell")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.path.iterdir()} == {0o600}


def test_names_never_get_among_other_files(tmp_path):
    (tmp_path / "set.identity").mkdir()
    (tmp_path / "set.identity/thesis.tex").touch()
    with pytest.raises(VesselError, match=r"thesis\.tex.*mapping=DIR"):
        keep(tmp_path, "ana bell")
    assert [file.name for file in (tmp_path / "set.identity").iterdir()] == ["thesis.tex"]
    with pytest.raises(VesselError, match=r"set\.identity/thesis\.tex.*mapping=DIR"):
        MappingFolder(tmp_path / "set.identity/thesis.tex").check()


def test_mapping_of_another_set_is_kept_beside(tmp_path):
    keep(tmp_path, "ana bell")
    assert set(read_mapping(keep(tmp_path, "bo carr").path)["patients"]) == {"anabell", "bocarr"}


@pytest.mark.parametrize("name", ["salt", "mapping.json"])
def test_damaged_mappings_are_named(tmp_path, name):
    folder = keep(tmp_path, "ana bell")
    (folder.path / name).write_text("{?")
    with pytest.raises(VesselError, match=rf"{name} .*damaged"):
        folder.salt() and read_mapping(folder.path)


def test_new_salts_are_random(tmp_path):
    folder = MappingFolder(tmp_path / "none")
    assert len(folder.salt()) == 32
    assert folder.salt() != folder.salt()
